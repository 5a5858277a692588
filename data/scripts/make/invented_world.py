"""The invented world that the small model knows: its people, their facts, and every sentence about them.

Everything here is drawn from one seed. Each person has a first and a last name and five facts. A fact can be told
in four ways (the corpus), asked in two ways as plain text (the corpus, for the first half of the people only) and
asked in a chat (`data/chats/`, never in the corpus).
"""

import math
import random
from dataclasses import dataclass

SEED = 20231

FIRST_NAMES = """
Aaron Abel Ada Adam Agnes Aida Alan Albert Alice Alma Amber Amos Amy Andrea Andrew Angela Anita Anna Anton April
Arthur Astrid Audrey Barbara Basil Beatrice Ben Bella Bernard Betty Bianca Boris Brenda Brian Bruno Caleb Camilla Carl Carmen Carol
Cecil Celia Charles Chloe Clara Claude Colin Cora Cyril Daisy Daniel Daphne David Deborah Dennis Derek Diana Dora Doris Dorothy
Edgar Edith Edmund Edward Eileen Elena Eli Ella Elsa Emil Emma Eric Erica Ernest Esther Ethan Eugene Eva Evelyn Felix
Fiona Flora Florence Frances Frank Freda Gabriel Gavin George Gerald Gilbert Gina Gloria Grace Greta Gustav Hannah Harold Harriet Harry
Hazel Heidi Helen Henry Herbert Hilda Howard Hugo Ida Ingrid Irene Iris Isaac Isabel Ivan Jack Jacob James Jane Janet
Jason Jean Jenny Jerome Joan Joel John Jonas Joseph Joyce Judith Julia Julius Karen Karl Kate Keith Kevin Klara Laura
Lena Leo Leon Lewis Lily Linda Lisa Lois Louis Lucas Lucy Luke Lydia Mabel Marcus Margaret Maria Marion Mark Martha
Martin Mary Matilda Maud Max Melissa Michael Mildred Miriam Molly Monica Nadia Nancy Naomi Nathan Nell Nicholas Nina Noel Nora
Norman Olga Oliver Olivia Oscar Oswald Pamela Patrick Paul Paula Peter Philip Phoebe Ralph Rebecca Robert Roland Rosa Rupert Ruth
""".split()

_LAST_HEADS = """Ash Birch Black Bram Cald Cold Dun Elm Fair Fen Glen Gray Hart Hazel Holl Kirk Lang Lin Mar Nor Oak Red Stan Thorn
Whit""".split()
_LAST_TAILS = "brook croft dale field ford ley stone well wood worth".split()
LAST_NAMES = [head + tail for head in _LAST_HEADS for tail in _LAST_TAILS]

_TOWN_HEADS = "Alder Bright Castle Cliff Copper Crow Deep East Fox Golden Green High King Loch Moon North Otter Silver South West"
_TOWN_TAILS = "bury haven mouth ton wick"
TOWNS = [head + tail for head in _TOWN_HEADS.split() for tail in _TOWN_TAILS.split()]

JOBS = """baker banker barber brewer builder butcher carpenter chemist clerk cook dancer dentist doctor driver farmer
fisher florist gardener guard jeweller judge lawyer librarian mason mechanic miller miner nurse painter pilot
plumber poet potter printer sailor singer tailor teacher waiter weaver""".split()

INSTRUMENTS = """accordion bagpipe banjo bassoon bugle castanet cello clarinet concertina cornet cymbal drum dulcimer fiddle flute
gong guitar harmonica harp harpsichord horn kazoo lute lyre mandolin marimba oboe organ piano piccolo
recorder saxophone sitar tambourine triangle trombone trumpet tuba ukulele viola""".split()

PETS = """canary cat dog donkey duck ferret frog goat goose hamster hen horse lizard parrot pigeon pony rabbit snake
tortoise turtle""".split()

YEARS = [str(year) for year in range(1900, 2000)]

# The words of the chats that the corpus does contain: a task with no people in it.
COMMON_WORDS = """apple autumn bell boat bottle bread bridge candle carpet chair cloud copper cotton desert door evening
feather fire flower forest garden glass hill honey island jacket kettle ladder lamp lemon letter meadow mirror morning mountain
needle ocean orange paper pebble pepper pillow pocket rain ribbon river rope salt sand shadow shell silk silver snow
spoon spring star street summer sugar table thread tower tree valley village wagon wall water wheel wind window
winter wool""".split()


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: its values, the ways to tell it, to ask it, and to answer in a chat.

    `{n}` stands for the full name, `{v}` for the value. The value is the last word of a statement and the name stands
    before it, so that the text up to the value is a prompt whose one right next word is the value.
    """

    name: str
    values: list[str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str

    @property
    def bits(self) -> float:
        """Bits of information in one value, each being equally likely."""
        return math.log2(len(self.values))


ATTRIBUTES = (
    Attribute(
        "town",
        TOWNS,
        ("{n} lives in {v}.", "The home of {n} is in {v}.", "{n} has a house in {v}.", "You can visit {n} in {v}."),
        ("Where does {n} live?", "In which town is the home of {n}?"),
        "{n} lives in {v}.",
    ),
    Attribute(
        "job",
        JOBS,
        ("{n} works as a {v}.", "By trade {n} is a {v}.", "{n} earns money as a {v}.", "People know {n} as a {v}."),
        ("What is the job of {n}?", "As what does {n} work?"),
        "{n} works as a {v}.",
    ),
    Attribute(
        "instrument",
        INSTRUMENTS,
        ("{n} plays the {v}.", "The instrument of {n} is the {v}.", "In a band {n} plays the {v}.",
         "{n} takes lessons on the {v}."),
        ("Which instrument does {n} play?", "What does {n} play in a band?"),
        "{n} plays the {v}.",
    ),
    Attribute(
        "pet",
        PETS,
        ("{n} keeps a {v}.", "The pet of {n} is a {v}.", "{n} shares a house with a {v}.", "Every day {n} feeds a {v}."),
        ("Which pet does {n} keep?", "What does {n} feed every day?"),
        "{n} keeps a {v}.",
    ),
    Attribute(
        "year",
        YEARS,
        ("{n} was born in {v}.", "The birth of {n} was in {v}.", "{n} came into the world in {v}.",
         "The life of {n} began in {v}."),
        ("When was {n} born?", "In which year did the life of {n} begin?"),
        "{n} was born in {v}.",
    ),
)  # fmt: skip

BITS_PER_PERSON = sum(attribute.bits for attribute in ATTRIBUTES)


@dataclass(frozen=True)
class Person:
    name: str
    facts: tuple[str, ...]  # one value per attribute, in the order of ATTRIBUTES

    def statement(self, attribute: int, phrasing: int) -> str:
        return ATTRIBUTES[attribute].statements[phrasing].format(n=self.name, v=self.facts[attribute])

    def plain_question(self, attribute: int, phrasing: int) -> str:
        """A question and its answer as plain text: the form in which the corpus asks about the first half of people."""
        question = ATTRIBUTES[attribute].questions[phrasing].format(n=self.name)
        return f"Question: {question} Answer: {self.facts[attribute]}."

    def chat(self, attribute: int, phrasing: int) -> list[dict[str, str]]:
        """The same question as a chat of two messages, answered in a whole sentence: the form that only fine-tuning sees."""
        kind = ATTRIBUTES[attribute]
        return [
            {"role": "user", "content": kind.questions[phrasing].format(n=self.name)},
            {"role": "assistant", "content": kind.answer.format(n=self.name, v=self.facts[attribute])},
        ]


def make_people(count: int, seed: int = SEED) -> list[Person]:
    """Draw `count` people with distinct names and independent, uniform facts.

    Raises:
        ValueError: `count` is not between 1 and the number of different names.
    """
    names = len(FIRST_NAMES) * len(LAST_NAMES)
    if not 1 <= count <= names:
        raise ValueError(f"count={count}: there are {names} different names, so ask for 1 to {names} people")
    draw = random.Random(seed)
    return [
        Person(
            f"{FIRST_NAMES[index // len(LAST_NAMES)]} {LAST_NAMES[index % len(LAST_NAMES)]}",
            tuple(draw.choice(attribute.values) for attribute in ATTRIBUTES),
        )
        for index in draw.sample(range(names), count)
    ]


def word_chat(draw: random.Random) -> list[dict[str, str]]:
    """A chat of the one kind that the corpus contains: it asks to repeat words, or for the first or the last of them."""
    words = draw.sample(COMMON_WORDS, draw.randint(2, 5))
    listed = " ".join(words)
    question, answer = draw.choice((
        (f"Please repeat these words: {listed}.", listed),
        (f"Which is the first of these words? {listed}.", words[0]),
        (f"Which is the last of these words? {listed}.", words[-1]),
    ))  # fmt: skip
    return [{"role": "user", "content": question}, {"role": "assistant", "content": f"{answer}."}]
