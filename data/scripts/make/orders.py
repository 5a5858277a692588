"""Orders to a small shop in free text, and each as JSON: a task that a real model learns in minutes.

    python -m data.scripts.make.orders [FOLDER]

A chat is an instruction, an order as somebody would write it, and the order's five fields:

    Hello, my name is Nora Whitfield. I'd like three brass lanterns, please. I'll pick them up on Friday.
    {"name": "Nora Whitfield", "item": "brass lantern", "quantity": 3, "day": "Friday", "delivery": false}

An item is named as one of it is, whether `delivery` holds follows from the words, and some orders name a day that is not
meant, or say something that belongs to no field.

The three parts share no name, neither first nor last, no word of an item, and no phrasing: none of a test order's sentences
was in a training order with other names in it. What they share are the numbers, written as words or digits, and the days
of the week.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.scripts import DATA

SIZES = {"train": 192, "validation": 40, "test": 100}  # 192 are 48 steps of 4
FIELDS = ("name", "item", "quantity", "day", "delivery")
INSTRUCTION = f"Write the order as JSON with the keys {', '.join(FIELDS)}."
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Words:
    """What the orders of one part are made of. In braces is what is filled in.

    Attributes:
        first, last: names.
        kinds, things: an item is one of each, such as brass and lantern. The plural of a thing has an s.
        who: sentences that say the name.
        wants: sentences that say what is wanted; {items} is such as "three brass lanterns".
        fetched, brought: sentences that say on which day the customer comes, or wants it delivered.
        corrected: another way to say the day, which names a wrong one first.
        beside: sentences that belong to no field.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    kinds: tuple[str, ...]
    things: tuple[str, ...]
    who: tuple[str, ...]
    wants: tuple[str, ...]
    fetched: tuple[str, ...]
    brought: tuple[str, ...]
    corrected: tuple[str, ...]
    beside: tuple[str, ...]


WORDS = {
    "train": Words(
        first=("Nora", "Peter", "Ines", "Walter", "Greta", "Samuel", "Lucy", "Omar", "Helen", "Victor", "Paula", "Edgar",
               "Rosa", "Martin", "Clara", "Felix", "Judith", "Henry", "Alma", "Simon"),
        last=("Whitfield", "Mercer", "Okafor", "Lindgren", "Hale", "Petrov", "Castillo", "Brandt", "Farrow", "Nakamura",
              "Doyle", "Sutter", "Abbott", "Moreau", "Kessler", "Granger", "Varga", "Thorne", "Ibarra", "Rowe"),
        kinds=("brass", "blue", "wooden", "small", "striped", "leather", "round", "white", "iron", "cotton", "large",
               "green", "paper", "heavy", "painted", "silver"),
        things=("lantern", "teapot", "basket", "blanket", "kettle", "apron", "mirror", "candle", "bucket", "stool",
                "ladder", "cushion", "bottle", "hammer", "clock", "tray", "bowl", "rope", "jacket", "notebook"),
        who=("Hello, my name is {name}.", "This is {name}.", "Good morning, {name} here.", "Hi, I am {name}.",
             "{name} speaking.", "The order is for {name}.", "Please put it under the name {name}.",
             "You can write down {name}.", "My name: {name}.", "It's {name} again."),
        wants=("I'd like {items}, please.", "Can I have {items}?", "I need {items}.", "Please reserve {items} for me.",
               "I want to order {items}.", "Could you put aside {items}?", "We need {items}.", "Send me a bill for {items}.",
               "I am looking for {items}.", "Please get {items} ready."),
        fetched=("I'll pick it up on {day}.", "I can come by on {day}.", "I will be at your shop on {day}.",
                 "My son collects it on {day}.", "I'll fetch it myself, {day} suits me.", "On {day} I am in town and take it with me.",
                 "No need to bring it, I come on {day}."),
        brought=("Please deliver it on {day}.", "Bring it to my house on {day}.", "I am at home on {day}, so please bring it then.",
                 "Can your driver come on {day}?", "I have no car, so deliver it on {day}.", "Delivery on {day} would be best.",
                 "Please drop it at my door on {day}."),
        corrected=("Not {wrong}, {day} please: {how}", "First I thought of {wrong}, but no. {how}",
                   "{wrong} does not work for me. {how}"),
        beside=("Your shop was recommended by a friend.", "Thank you very much.", "It is a present.", "I was there last year.",
                "Greetings to your wife.", "The last one broke."),
    ),
    "validation": Words(
        first=("Agnes", "Bruno", "Stella", "Conrad", "Maya", "Theo", "Vera", "Julian"),
        last=("Pemberton", "Aldous", "Reyes", "Kowalski", "Winslow", "Haddad", "Sorensen", "Blythe"),
        kinds=("copper", "yellow", "folding", "woollen", "square", "plain"),
        things=("pan", "curtain", "scarf", "shelf bracket", "jug", "doormat", "toolbox", "vase"),
        who=("Dear shop, {name} writes to you.", "I'm called {name}.", "Name of the customer: {name}.",
             "Good day! You know me, {name}."),
        wants=("Would you sell me {items}?", "I'm after {items}.", "Set {items} to one side for me.",
               "My list says {items}."),
        fetched=("I shall call for it on {day}.", "You'll see me on {day}.", "I walk past your shop on {day} and will take it."),
        brought=("It should be brought here on {day}.", "Your van may come on {day}.", "Ship it to me on {day}."),
        corrected=("Forget {wrong}. {how}", "{wrong} would be too soon. {how}"),
        beside=("We met at the fair.", "I pay in cash.", "Sorry for the late message."),
    ),
    "test": Words(
        first=("Dorothy", "Ahmed", "Sylvia", "Gustav", "Naomi", "Patrick", "Ingrid", "Leon", "Beatrice", "Kofi", "Hannah",
               "Rupert"),
        last=("Ashworth", "Delgado", "Fischer", "Quinn", "Oduya", "Marlowe", "Tanaka", "Pritchard", "Vance", "Silva",
              "Holloway", "Eriksen"),
        kinds=("linen", "red", "glass", "tiny", "oval", "steel", "woven", "black", "bamboo", "antique"),
        things=("lamp", "pillow", "teacup", "chair", "umbrella", "saucepan", "broom", "picture frame", "suitcase", "plate",
                "table", "watering can", "napkin", "bench"),
        who=("Good evening, you are talking to {name}.", "Here is {name}.", "I'm {name}, a customer of yours.",
             "Book this for {name}, if you would.", "{name} is the name.", "Signed, {name}.",
             "A message from {name}."),
        wants=("I would love to buy {items}.", "Do you still have {items}?", "What I am missing is {items}.",
               "Keep {items} for me.", "It's about {items} that I want.", "Let me have {items}.",
               "My kitchen lacks {items}."),
        fetched=("My daughter will stop at the counter on {day} to take it along.", "I'd rather collect in person, on {day}.",
                 "Expect me at the till on {day}.", "I drive over on {day} to get it.", "Hold it until I turn up on {day}."),
        brought=("Have it carried to my flat on {day}.", "Leave it on my porch on {day}.", "My address is on file, send it over on {day}.",
                 "Somebody will open the door to your courier on {day}.", "I can't leave the house, so come to me on {day}."),
        corrected=("I said {wrong}, which was a mistake. {how}", "{wrong} is a holiday. {how}", "Better not {wrong}. {how}"),
        beside=("The weather is dreadful, isn't it?", "Mother will be pleased.", "I saw it in your window.", "No hurry with the invoice."),
    ),
}  # fmt: skip


def _plural(item: str) -> str:
    return item + ("es" if item.endswith(("s", "ch", "sh", "x")) else "s")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def order(words: Words, draw: random.Random) -> tuple[str, dict]:
    """One order: its text and its fields."""
    name = f"{draw.choice(words.first)} {draw.choice(words.last)}"
    item = f"{draw.choice(words.kinds)} {draw.choice(words.things)}"
    quantity = 1 if draw.random() < 0.2 else draw.randint(2, len(NUMBERS))
    count = draw.choice((str(quantity), NUMBERS[quantity - 1]))
    one = draw.choice((f"{_article(item)} {item}", f"one {item}"))
    items = one if quantity == 1 else f"{count} {_plural(item)}"
    day, wrong = draw.sample(DAYS, 2)
    delivery = draw.random() < 0.5
    how = draw.choice(words.brought if delivery else words.fetched).format(day=day)
    if draw.random() < 0.2:
        how = draw.choice(words.corrected).format(wrong=wrong, day=day, how=how)
    sentences = [draw.choice(words.who).format(name=name), draw.choice(words.wants).format(items=items), how]
    if draw.random() < 0.3:  # who it is from may come last
        sentences = [*sentences[1:], sentences[0]]
    if draw.random() < 0.3:
        sentences.insert(draw.randrange(1, len(sentences) + 1), draw.choice(words.beside))
    fields = (name, item, quantity, day, delivery)
    return " ".join(sentences), dict(zip(FIELDS, fields, strict=True))


def orders(part: str, seed: int = 0) -> Iterator[tuple[str, dict]]:
    """Orders of a part without end, none of them twice: their texts and fields."""
    draw, seen = random.Random(f"{part} {seed}"), set()
    while True:
        text, fields = order(WORDS[part], draw)
        if text not in seen:
            seen.add(text)
            yield text, fields


def as_chat(text: str, fields: dict) -> list[dict[str, str]]:
    """An order as a chat: the instruction, the order, its JSON."""
    said = {"system": INSTRUCTION, "user": text, "assistant": json.dumps(fields)}
    return [{"role": role, "content": content} for role, content in said.items()]


def made() -> dict[str, str]:
    """The text of each file, by its name."""
    files = {}
    for part, size in SIZES.items():
        chats = [as_chat(*one) for one, _ in zip(orders(part), range(size), strict=False)]
        files[f"{part}.jsonl"] = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    return files


def main(folder: Path = DATA / "chats" / "orders") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
