"""Every number in a text is bound to its sentence, and to what it was computed from.

    python -m tests.notebooks.number_bindings              # every text: what is not bound, and what is no longer true
    python -m tests.notebooks.number_bindings 03 README    # some of them
    python -m tests.notebooks.number_bindings --propose 03 # blocks for new and changed sentences, to check and paste

The texts are the lessons' Markdown, the words in their figures and the figures' alt texts, the questions of the quiz and
all that their options say, the lessons' summaries, README.md, teaching/README.md, and the cards of the shipped model and adapter. Each has a
file of bindings, `tests/notebooks/numbers/NAME.txt`. A block in it is a
sentence, followed by a line for each of its numbers:

    > So 70B in 16 bits takes {a.2} GB: no single card that one can rent cheaply holds it.
      a: printed Llama-3.1-70B 16 bit <#> GB # GiB

`{a.2}` means that the text has a number with two decimals here, `{a}` a whole number, `{a/}` a fraction in words, such
as half. The value is only in the text, and must be the value of its evidence: equal, or rounded as in the text. A per
cent sign and units of bytes (GB, MiB) count on both sides. A fraction in words, such as a third, is right if one
divided by the value rounds to three and is within a tenth of it. The evidence is one of

    printed LINE          a line that the lesson prints; the value is at <#>, # is any other number, … any text
    code TEXT             text in the lesson's code cells, without the words in figures
    text PATH: TEXT       text in a file of the project
    json PATH: KEY / KEY  a value in a JSON file; [name=value] selects a row of a list, len is its length
    constant PATH: NAME   a constant in a Python file, or a default as Class.field
    lines PATH            the number of lines in a file; bytes PATH: its size
    count printed LINE    how many lines of the lesson match; also count code TEXT and count text PATH: TEXT
    computed EXPRESSION   arithmetic on other numbers in the sentence, such as a: computed b * 8

preceded by `lesson 03` if it is in another lesson. Several, joined by ` && `, are x, y and z in an expression after
` => `: `printed a <#> && printed b <#> => x / y`.

A number that is written in the block's sentence itself, like 70B and 16 above, is not a claim of the lesson (it is a
name, a format, a quotation, or a count of what the sentence lists). Either a rule gives the reason (NOT_CLAIMS), or a
line does:

      - 780: quoted from the paper
      - 73: held by tests/project/test_readme.py::test_the_readme_counts_the_entries_of_the_troubleshooting_page

So if any number in a text changes, either its sentence is no longer known, or its evidence no longer matches. A block
whose sentence is not in the text is also an error.
"""

import argparse
import ast
import difflib
import functools
import json
import math
import re
import sys
from dataclasses import dataclass, field

import jupytext
import nbformat

from notebooks.scripts import quiz_cells
from notebooks.scripts.running import has_tag
from qlora_helpers.course import figure_texts
from qlora_helpers.course.check_lines import without_measured
from qlora_helpers.course.quiz import Question, read_quiz
from tests import ROOT

PAGES = {"README": "README.md", "teaching": "teaching/README.md"}
BINDINGS = ROOT / "tests" / "notebooks" / "numbers"
LESSONS = ROOT / "notebooks" / "source"

# ---------------------------------------------------------------------------------------------- numbers in a text

CARDINALS = {
    word: value
    for value, word in enumerate(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
        "nineteen".split(),
        start=2,
    )
} | {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
     "dozen": 12, "twice": 2, "hundred": 100, "hundreds": 100}  # fmt: skip
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
FRACTIONS = {"third": 3, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
             "fifteenth": 15, "sixteenth": 16, "twentieth": 20, "hundredth": 100}  # fmt: skip
HALVES = ("half", "halves", "halved")
BYTES = {unit: factor for i, (si, binary) in enumerate((("KB", "KiB"), ("MB", "MiB"), ("GB", "GiB"), ("TB", "TiB")), 1)
         for unit, factor in ((si, 1000**i), (binary, 1024**i))}  # fmt: skip
POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")

DIGITS = r"\d{1,3}(?:[,_]\d{3})+(?:\.\d+)?(?![\d_])|\d+(?:\.\d+)*(?:e[-+]?\d+)?"
WORDS = (
    r"(?:an?|one)\s+(?:" + "|".join(FRACTIONS) + r")\b|\b(?:"
    + "|".join((*HALVES, *CARDINALS)) + r")\b|\b(?:" + "|".join(SCALES) + r")s?\b"
)  # fmt: skip
TOKEN = re.compile(
    # a name that contains a digit, such as NF4, Llama-3.1-8B, paged_adamw_8bit
    r"(?P<name>(?<![\w.])(?=[A-Za-z_][\w.-]*\d)[A-Za-z_]\w*(?:[-.]\w+)*)"
    rf"|(?P<digits>(?<![\w.])(?:(?<![^\s(\[`])-)?(?:{DIGITS})(?P<power>[⁰¹²³⁴⁵⁶⁷⁸⁹]+)?(?P<size>[BM]\b)?"
    rf"(?:\s(?P<scale>{'|'.join(SCALES)})\b)?)"
    rf"|(?P<word>(?<![\w.])(?:{WORDS})(?!-to-))",
    re.I,
)
UNIT = re.compile(r"(?:\s|-)?(%|(?:[KMGT]i?B)\b)")


@dataclass(frozen=True)
class Number:
    """A number and its position in a sentence; `step` is one unit of its last digit, both without the unit."""

    text: str
    start: int
    end: int
    value: float
    step: float
    unit: str = ""
    fraction: int = 0  # n of one n-th in words

    @property
    def form(self) -> str:
        """How it is written: with decimals (`.2`), as a fraction in words (`/`), or otherwise (empty)."""
        decimals = re.search(r"\.(\d+)(?!.*\.)", self.text)
        return "/" if self.fraction else f".{len(decimals[1])}" if decimals else ""

    @property
    def factor(self) -> float:
        return 0.01 if self.unit == "%" else BYTES.get(self.unit, 1)

    def is_value_of(self, value: float, unit: str = "") -> bool:
        """Whether this is `value`, rounded as in the text."""
        if unit and self.unit and unit != self.unit and "%" in (unit, self.unit):
            return False
        mine, step = self.value, self.step
        if self.unit == "%" or unit == "%":
            mine, step, value = mine * self.factor, step * self.factor, value * (0.01 if unit == "%" else 1)
        elif self.unit and unit:
            mine, step, value = mine * self.factor, step * self.factor, value * BYTES[unit]
        if self.fraction:
            return value > 0 and math.floor(1 / value + 0.5) == self.fraction and abs(value * self.fraction - 1) <= 0.1
        if mine == 0 and value != 0:  # everything was rounded away
            return False
        return abs(value - mine) <= step / 2 * (1 + 1e-9) + 1e-12 * abs(value)


def unit_after(text: str, end: int) -> str:
    found = UNIT.match(text, end)
    return found.group(1) if found else ""


def number_of(match: re.Match) -> Number:
    text, unit = match.group(), unit_after(match.string, match.end())
    place = match.start(), match.end()
    if match["word"]:
        words = text.lower().split()
        last = words[-1]
        if last in HALVES:
            return Number(text, *place, 0.5, 0.1, unit, 2)
        if last in FRACTIONS:
            return Number(text, *place, 1 / FRACTIONS[last], 0, unit, FRACTIONS[last])
        if last in CARDINALS:
            return Number(text, *place, CARDINALS[last], 1, unit)
        return Number(text, *place, SCALES[last.removesuffix("s")], 1, unit)
    plain = match["digits"].replace(",", "").replace("_", "")
    factor = 1.0
    if match["scale"]:
        plain, factor = plain.split()[0], SCALES[match["scale"].lower()]
    if match["size"]:
        plain, factor = plain[:-1], 1e9 if match["size"] == "B" else 1e6
    if match["power"]:
        plain = plain.removesuffix(match["power"])
        return Number(text, *place, float(plain) ** int(match["power"].translate(POWERS)), 1, unit)
    if plain.count(".") > 1:  # a version: one number for all its parts
        value = functools.reduce(lambda whole, part: whole * 1000 + int(part), plain.split("."), 0)
        return Number(text, *place, value, 1, unit)
    mantissa, _, exponent = plain.partition("e")
    step = 10.0 ** -len(mantissa.partition(".")[2]) * 10.0 ** int(exponent or 0)
    return Number(text, *place, float(plain) * factor, step * factor, unit)


def numbers_in(sentence: str) -> list[Number]:
    """All numbers in a sentence, in digits and in words; names with digits are not numbers."""
    return [number_of(match) for match in TOKEN.finditer(sentence) if not match["name"]]


def names_in(sentence: str) -> list[str]:
    """Names with digits, such as NF4 and Llama-3.1-8B."""
    return [match["name"] for match in TOKEN.finditer(sentence) if match["name"]]


# Why a number written in a block's own sentence is not a claim; matched around the number, which is marked by «».
NOT_CLAIMS = {
    "the number of a lesson": r"^\[?«\d+» · |esson «\d+»|LESSON=«\d+»",
    "the number of an exercise": r"^Exercise «\d+(?:\.\d+)?»(?:$|: )",
    "the minutes of an exercise, bound by test_exercises": r"^\*\w+ · \w+ · about «\d+» minutes?\.\*$",
    "a model by its size": r"«[\d.]+[BM]»",
    "a model by its version": r"Gemma «3»",
    "a format by its bits": r"«(?:2|3|4|8|16|32)»[- ]bits?\b",
    "the number of a table": r"Table «\d+»",
    "the number of a paper": r"arXiv «[\d.]+»",
    "the number of an issue": r"#«\d+»",
    "the name of a GPU": r"RTX «\d{4}»",
    "the articles behind the course": r"«[Tt]hree» articles\b",
    "the machine that the course is made for": r"«two» (?:processor |CPU )?cores",
}


def why_no_claim(sentence: str, number: Number) -> str:
    """The rule by which a number is not a claim; empty if there is none."""
    marked = f"{sentence[: number.start]}«{number.text}»{sentence[number.end :]}"
    return next((why for why, pattern in NOT_CLAIMS.items() if re.search(pattern, marked)), "")


# ---------------------------------------------------------------------------------------------------- sentences

END = re.compile(r"""(?:(?<=[.?!])|(?<=[.?!]["*)”])|(?<=[.?!]\*\*)|(?<=[.?!]\)\*\*))\s+(?=["“*`(\[]*[A-Z\d✓])""")


def sentences(markdown: str) -> list[str]:
    """The sentences of a Markdown text; headings, list items and table rows are separate sentences."""
    blocks, inside = [""], False
    for line in markdown.splitlines():
        line = line.strip()
        if line.startswith("```"):
            inside = not inside
            blocks.append("")
        elif inside or line.startswith(("#", "- ", "* ", "|")) or not line:
            blocks.append(re.sub(r"^(?:#+|[-*])\s+", "", line))
        else:
            blocks[-1] = f"{blocks[-1]} {line}".strip()
            continue
        if inside or line.startswith(("#", "|")) or not line:
            blocks.append("")
    text = [re.sub(r"\]\([^)]*\)", "]", block) for block in blocks]
    return [part for block in text for part in END.split(" ".join(block.split())) if part]


WORDS_OF_FIGURES = ("show", "set_title", "suptitle", "set_xlabel", "set_ylabel")


@dataclass
class Text:
    """A text whose numbers are bound: its parts, each with the name of its place, and the lesson with its evidence."""

    name: str
    parts: list[tuple[str, str]]
    lesson: str = ""

    @functools.cached_property
    def known_names(self) -> set[str]:
        """Names that this text may use: listed names, names in its lesson (or in all), and the project's file names."""
        listed = re.findall(r"^(\S+)(?: \(only (\w+)\))?", _file("tests/notebooks/numbers/names.txt"), re.M)
        known = {name for name, only in listed if only in ("", self.name)}
        for lesson in [self.lesson] if self.lesson else lesson_names():
            known |= set(names_in("\n".join((*code(lesson), *printed(lesson)))))
        return known | {path.name for path in (*ROOT.glob("data/*"), *ROOT.glob("data/measured/*"))}


def words_of_figures(source: str) -> list[str]:
    """The literal titles, labels and alt texts in a cell's code; figures' numbers and strings built by code are left out."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr in WORDS_OF_FIGURES]
    arguments = [argument for node in named for argument in node.args]
    arguments += [keyword.value for node in named for keyword in node.keywords if keyword.arg == "alt"]
    words = [a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return [text for text in words if not figure_texts.is_number(text)]


def alt_texts(lesson: str) -> list[tuple[str, str]]:
    """Places and alt texts of a lesson's numbered figures. Those of diagrams are held by `tests/course/test_diagrams.py`."""
    path = figure_texts.FOLDER / f"{lesson[:2]}.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return [(f"alt text of figure {number}", entry) for number, entry in entries.items() if isinstance(entry, str)]


def lesson_names() -> list[str]:
    return sorted(path.stem for path in LESSONS.glob("[0-9][0-9]_*.py"))


def text_of(name: str) -> Text:
    """A lesson, `quiz`, `lessons` (their summaries), `README`, `teaching`, or the card `tiny-llama` or `adapters`."""
    if name in lesson_names():
        cells = jupytext.read(LESSONS / f"{name}.py").cells
        parts = [(f"cell {i}", cell.source) for i, cell in enumerate(cells) if cell.cell_type == "markdown"]
        code_cells = [(i, cell.source) for i, cell in enumerate(cells) if cell.cell_type == "code"]
        parts += [(f"figure of cell {i}", text) for i, source in code_cells for text in words_of_figures(source)]
        return Text(name, parts + alt_texts(name), name)
    if name == "quiz":
        questions = [question for lesson in lesson_names() for question in read_quiz(lesson[:2])]
        return Text(name, [(f"question {question.number}", _all_of(question)) for question in questions])
    if name == "lessons":
        summaries = json.loads((ROOT / "notebooks" / "scripts" / "lessons.json").read_text(encoding="utf-8"))
        return Text(name, [(f"summary of {lesson}", text) for lesson, text in summaries.items()])
    path = ROOT / PAGES.get(name, f"data/{name}/README.md")
    written = re.sub(r"<!-- (\S+) -->.*?<!-- end of \1 -->", "", path.read_text(encoding="utf-8"), flags=re.S)
    place = path.relative_to(ROOT)
    return Text(name, [(f"{place}, {part.splitlines()[0]}", part) for part in re.split(r"\n(?=## )", written)])


def _all_of(question: Question) -> str:
    """A question with its options, and what each of them says, as Markdown."""
    return "\n\n".join([question.text, *(text for option in question.options for text in (option.text, option.says))])


def all_texts() -> list[str]:
    return [*lesson_names(), "quiz", "lessons", *PAGES, "tiny-llama", "adapters"]


# ------------------------------------------------------------------------------------------------------ evidence


class NoEvidence(ValueError):
    """A piece of evidence is missing or ambiguous."""


@functools.cache
def _cells(lesson: str) -> list[nbformat.NotebookNode]:
    folders = ROOT / "notebooks", ROOT / "notebooks" / "solutions"
    both = [nbformat.read(folder / f"{lesson}.ipynb", as_version=4).cells for folder in folders]
    # what the quiz prints is a text with numbers of its own, and no evidence
    return [cell for cells in both for cell in cells if cell.cell_type == "code" and not has_tag(cell, quiz_cells.TAG)]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


@functools.cache
def printed(lesson: str) -> tuple[str, ...]:
    """The lines that a lesson's cells print in both editions, without duplicates and without what checks measured."""
    outputs = [output for cell in _cells(lesson) for output in cell.outputs]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    lines = [_squeezed(line) for text in texts for line in without_measured(text).splitlines()]
    return tuple(dict.fromkeys(line for line in lines if line))


@functools.cache
def code(lesson: str) -> tuple[str, ...]:
    """A lesson's code cells in both editions, without duplicates, with single spaces, and without the words in figures.

    Those words are texts themselves: a number bound to its own words would always be right.
    """
    sources = []
    for cell in _cells(lesson):
        source = cell.source
        for words in words_of_figures(source):
            source = source.replace(words, "")
        sources.append(_squeezed(source))
    return tuple(dict.fromkeys(sources))


@functools.cache
def _file(path: str) -> str:
    if (ROOT / path).parent == figure_texts.FOLDER:
        raise NoEvidence(f"{path} has words of figures: a number bound to its own words would always be right")
    return (ROOT / path).read_text(encoding="utf-8")


IN_DIGITS = rf"(?:[-+](?=\d))?(?:{DIGITS})(?!\d)"
VALUE = rf"{IN_DIGITS}|\b(?:{WORDS})"


@functools.cache
def pattern(text: str) -> re.Pattern:
    """A piece of evidence as a regular expression: <#> is the value, # another number in digits, … any text."""
    parts = re.split(r"(<#>|#|…)", _squeezed(text))
    kinds = {"<#>": f"(?P<value>{VALUE})", "#": IN_DIGITS, "…": ".*?"}
    return re.compile("".join(kinds.get(part, re.escape(part)) for part in parts), re.I)


def matches(kind: str, argument: str, lesson: str) -> list[re.Match]:
    if kind == "text":
        path, _, argument = argument.partition(": ")
        return list(pattern(argument).finditer(_squeezed(_file(path))))
    if not lesson:
        raise NoEvidence(f"`{kind}` of which lesson? Write `lesson 03 {kind} …`")
    if kind == "code":
        return [match for source in code(lesson) for match in pattern(argument).finditer(source)]
    return [match for line in printed(lesson) if (match := pattern(argument).fullmatch(line))]


def _only_value(matches: list[re.Match], what: str) -> tuple[float, str]:
    if not matches:
        raise NoEvidence(f"there is no {what}")
    if "value" not in matches[0].re.groupindex:
        raise NoEvidence(f"{what} does not say, by <#>, which number is meant")
    values = set()
    for match in matches:
        text = re.sub(r"^\+", "", match["value"])
        found = TOKEN.search(text)
        number = number_of(found)
        values.add((number.value, unit_after(match.string, match.end("value"))))
    if len(values) > 1:
        raise NoEvidence(f"{what} occurs with several values: {sorted(value for value, _ in values)}")
    return values.pop()


def _json(argument: str) -> float:
    path, _, keys = argument.partition(": ")
    value = json.loads(_file(path))
    for key in keys.split(" / "):
        if key == "len":
            value = len(value)
        elif key.startswith("["):
            wanted = dict(pair.split("=", 1) for pair in re.split(r", (?=\w+=)", key[1:-1]))
            rows = [row for row in value if all(str(row.get(name)) == said for name, said in wanted.items())]
            if len(rows) != 1:
                raise NoEvidence(f"{len(rows)} rows of {path} are {key}")
            value = rows[0]
        else:
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError):
                raise NoEvidence(f"{path} has no {keys}") from None
    if not isinstance(value, int | float):
        raise NoEvidence(f"{keys} in {path} is not a number: {str(value)[:60]}")
    return value


def _constant(argument: str) -> float:
    path, _, names = argument.partition(": ")
    body = ast.parse(_file(path)).body
    *classes, name = names.split(".")
    for outer in classes:
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == outer]
        if not found:
            raise NoEvidence(f"{path} has no {outer}")
        if isinstance(found[0], ast.FunctionDef):
            taken = found[0].args
            defaults = zip(taken.args[::-1], taken.defaults[::-1], strict=False)  # the last ones have defaults
            body = [
                ast.Assign([ast.Name(a.arg)], d)
                for a, d in (*defaults, *zip(taken.kwonlyargs, taken.kw_defaults, strict=True))
                if d
            ]
        else:
            body = found[0].body
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return _arithmetic(ast.unparse(node.value), {})
    raise NoEvidence(f"{path} has no {names}")


def _arithmetic(expression: str, names: dict[str, float]) -> float:
    allowed = {
        "GB": 10**9,
        "MB": 10**6,
        "GIB": 2**30,
        "MIB": 2**20,
        "log2": math.log2,
        "ceil": math.ceil,
        "round": round,
    }
    try:
        return eval(expression, {"__builtins__": {}}, allowed | names)
    except Exception as error:
        raise NoEvidence(f"{expression!r} cannot be computed: {error}") from None


def evaluate(evidence: str, lesson: str, others: dict[str, float] | None = None) -> tuple[float, str]:
    """The value of a piece of evidence, and its unit.

    Raises:
        NoEvidence: it is missing or ambiguous.
    """
    sources, _, expression = evidence.partition(" => ")
    values = []
    for source in sources.split(" && "):
        of = lesson
        if found := re.match(r"lesson (\d\d) (.*)", source):
            of = next((name for name in lesson_names() if name.startswith(found[1])), "")
            source = found[2]
        kind, _, argument = source.strip().partition(" ")
        if kind in ("printed", "code", "text"):
            values.append(_only_value(matches(kind, argument, of), source))
        elif kind == "count":
            kind, _, argument = argument.partition(" ")
            values.append((float(len(matches(kind, argument, of))), ""))
        elif kind == "lines":
            values.append((float(len(_file(argument).splitlines())), ""))
        elif kind == "bytes":
            values.append((float((ROOT / argument).stat().st_size), ""))
        elif kind == "json":
            values.append((float(_json(argument)), ""))
        elif kind == "constant":
            values.append((float(_constant(argument)), ""))
        elif kind == "computed":
            values.append((float(_arithmetic(argument, others or {})), ""))
        else:
            raise NoEvidence(f"{kind!r} is not a kind of evidence")
    if expression:
        scaled = [value * (0.01 if unit == "%" else 1) for value, unit in values]
        return float(_arithmetic(expression, dict(zip("xyzw", scaled, strict=False)))), ""
    if len(values) > 1:
        raise NoEvidence("several pieces of evidence need an expression after ` => `")
    return values[0]


evaluated = functools.cache(evaluate)

# ------------------------------------------------------------------------------------------------------ bindings

SLOT = re.compile(r"\{([a-z])(\.\d+|/)?\}")
GAP = "□"
MARKED_OR_NUMBER = re.compile(rf"{GAP}(?P<slot>[a-z][./\d]*){GAP}|{TOKEN.pattern}", re.I)


@dataclass
class Block:
    """A sentence with its slots, the evidence for each, and why its other numbers are not claims."""

    sentence: str
    line: int
    evidence: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def gaps(self) -> list[str]:
        """What is in each gap, in order: the name of a slot in braces, or a number."""
        return _without_numbers(SLOT.sub(_marked, self.sentence))[1]

    @functools.cached_property
    def skeleton(self) -> str:
        """The sentence with a gap for each number; a sentence in the text is matched to its block by this."""
        return _without_numbers(SLOT.sub(_marked, self.sentence))[0]


def _marked(slot: re.Match) -> str:
    return f"{GAP}{slot[1]}{slot[2] or ''}{GAP}"


def _without_numbers(sentence: str) -> tuple[str, list[str]]:
    """A sentence with gaps for its numbers and marked slots, and what was in the gaps."""
    stood = []

    def gap(match):
        if match["slot"]:
            stood.append("{" + match["slot"] + "}")
        elif match["name"]:
            return match[0]
        else:
            stood.append(match[0])
        return GAP

    return MARKED_OR_NUMBER.sub(gap, sentence), stood


def read_blocks(text: str, path: str = "") -> list[Block]:
    """The blocks of a file of bindings.

    Raises:
        ValueError: a line does not belong to a block or is undecided (it has a ?), or a slot has no line.
    """
    blocks: list[Block] = []
    for at, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("> "):
            blocks.append(Block(line[2:].strip(), at))
        elif (found := re.fullmatch(r"  ([a-z]): (.+)", line)) and blocks and not found[2].startswith("?"):
            blocks[-1].evidence[found[1]] = found[2].strip()
        elif (found := re.fullmatch(r"  - (.+?): (.+)", line)) and blocks and not found[2].startswith("?"):
            blocks[-1].reasons[found[1]] = found[2].strip()
        else:
            raise ValueError(f"{path}:{at}: undecided, or not a line of a block: {line.strip()!r}")
    for block in blocks:
        slots = [letter for letter, _ in SLOT.findall(block.sentence)]
        if sorted(slots) != sorted(block.evidence):
            raise ValueError(
                f"{path}:{block.line}: slots {slots}, and lines for {list(block.evidence)}: one line for each"
            )
        unused = set(block.reasons) - {stood for stood in block.gaps if not stood.startswith("{")}
        if unused:
            raise ValueError(f"{path}:{block.line}: no such number in the sentence: {sorted(unused)}")
    return blocks


@functools.cache
def blocks_of(name: str) -> tuple[Block, ...]:
    path = BINDINGS / f"{name}.txt"
    return tuple(read_blocks(path.read_text(encoding="utf-8"), path.name)) if path.exists() else ()


@functools.cache
def _by_skeleton(name: str) -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for block in blocks_of(name):
        found.setdefault(block.skeleton, []).append(block)
    return found


def problems_of_sentence(text: Text, sentence: str) -> tuple[list[str], Block | None]:
    """What is wrong with the numbers in one sentence, and the block that matches it."""
    unknown = [name for name in names_in(sentence) if name not in text.known_names]
    wrong = [f"{name} is not a name in this text's code or in tests/notebooks/numbers/names.txt" for name in unknown]
    numbers = numbers_in(sentence)
    if not numbers:
        return wrong, None
    skeleton, stood = _without_numbers(sentence)
    candidates = _by_skeleton(text.name).get(skeleton, [])
    if not candidates:
        return [*wrong, "no block matches this sentence and its numbers " + ", ".join(n.text for n in numbers)], None
    best: tuple[list[str], Block] | None = None
    for block in candidates:
        found = _problems_in_block(text, sentence, numbers, stood, block)
        if best is None or len(found) < len(best[0]):
            best = found, block
    return wrong + best[0], best[1]


def _problems_in_block(text: Text, sentence: str, numbers: list[Number], stood: list[str], block: Block) -> list[str]:
    wrong = []
    values = {gap[1]: number.value for gap, number in zip(block.gaps, numbers, strict=True) if gap.startswith("{")}
    for gap, said, number in zip(block.gaps, stood, numbers, strict=True):
        if not gap.startswith("{"):
            if gap != said:
                wrong.append(f"{said} is where line {block.line} of its block has {gap}")
            elif gap not in block.reasons and not why_no_claim(sentence, number):
                wrong.append(f"{said} is neither bound nor marked as not a claim")
            continue
        if number.form != gap[2:-1]:
            forms = {"": "a whole number", "/": "a fraction in words"}
            wrong.append(f"{said} is not written as its block says: {forms.get(gap[2:-1], f'{gap[3:-1]} decimals')}")
            continue
        evidence = block.evidence[gap[1]]
        try:
            if evidence.startswith("computed "):
                value, unit = evaluate(evidence, text.lesson, {k: v for k, v in values.items() if k != gap[1]})
            else:
                value, unit = evaluated(evidence, text.lesson)
        except NoEvidence as error:
            wrong.append(f"{said} is bound to `{evidence}`, but {error}")
            continue
        if not number.is_value_of(value, unit):
            shown = f"{value:.15g}{' ' + unit if unit else ''}"
            wrong.append(f"{said} is bound to `{evidence}`, which gives {shown}")
    return wrong


def _nearest(name: str, sentence: str) -> Block | None:
    """The block whose sentence is most similar to this one, ignoring numbers."""
    known = {block.skeleton: block for block in blocks_of(name)}
    close = difflib.get_close_matches(_without_numbers(sentence)[0], known, 1, 0.6)
    return known[close[0]] if close else None


def problems_in_part(text: Text, place: str, markdown: str, hints: bool = True) -> tuple[list[str], set[int]]:
    """What is wrong with the numbers in one part of a text, and the lines of the blocks that match its sentences.

    `hints`: name the nearest block for a sentence that no block matches, which takes a while to find.
    """
    used, wrong = set(), []
    for sentence in sentences(markdown):
        found, block = problems_of_sentence(text, sentence)
        if block:
            used.add(block.line)
        near = ""
        if hints and found and not block:
            close = _nearest(text.name, sentence)
            near = f"\n    nearest block: {close.sentence}" if close else ""
        wrong += [f"{text.name}, {place}: “{sentence}”\n    {problem}{near}" for problem in found]
    return wrong, used


def problems_of(text: Text) -> list[str]:
    """What is wrong with the numbers in a text, each with its place and its sentence; empty if nothing is."""
    used, wrong = set(), []
    for place, markdown in text.parts:
        found, lines = problems_in_part(text, place, markdown)
        wrong += found
        used |= lines
    for block in blocks_of(text.name):
        if block.line not in used:
            file = f"tests/notebooks/numbers/{text.name}.txt:{block.line}"
            wrong.append(
                f"{file}: its sentence is no longer in the text: “{block.sentence}”\n    Cure: remove the block."
            )
    return wrong


def cure(name: str) -> str:
    """How to fix the problems, for the end of a message."""
    return (
        f"Cure: correct the number in the text; or, if the text is right, its block in tests/notebooks/numbers/{name}.txt.\n"
        f"`python -m tests.notebooks.number_bindings --propose {name}` shows what the numbers in new sentences could be bound to."
    )


# ----------------------------------------------------------------------------------------------------- proposals


def _proposal(sentence: str, number: Number, lesson: str) -> str:
    """The printed line or code whose number could be this one, if any; the one that shares the most words wins."""
    words = {word for word in re.findall(r"\w{3,}", sentence.lower()) if not word.isdigit()}
    found = []
    for kind, lines in (("printed", printed(lesson)), ("code", code(lesson))) if lesson else ():
        for line in lines:
            tokens = [m for m in TOKEN.finditer(line) if m["digits"]]
            for match in tokens:
                other = number_of(match)
                if not number.is_value_of(other.value, other.unit):
                    continue
                start, end = (0, len(line)) if kind == "printed" else (max(0, other.start - 30), other.end + 20)
                for rest in ("#", None):
                    piece = "".join(
                        m.replace("#", "…") if isinstance(m, str) else "<#>" if m is match else rest or m[0]
                        for m in _pieces(line, tokens, start, end)
                    )
                    try:
                        evaluate(f"{kind} {piece}", lesson)
                    except NoEvidence:
                        continue
                    shared = len(words & set(re.findall(r"\w{3,}", line[start:end].lower())))
                    long = len(re.sub(r"\D", "", number.text)) >= 3
                    found.append((shared + 2 * long - (kind == "code") * 1.5, f"{kind} {piece}"))
                    break
    best = max(found, default=(0, ""))
    return (
        best[1] if best[0] > 0 else "nothing found"
    )  # small numbers are printed everywhere, so a match alone is not enough


def _pieces(line: str, tokens: list[re.Match], start: int, end: int) -> list:
    pieces, at = [], start
    for match in tokens:
        if start <= match.start() and match.end() <= end:
            pieces += [line[at : match.start()], match]
            at = match.end()
    return [*pieces, line[at:end]]


def _from_block(number: Number, block: Block, lesson: str) -> str:
    """What a block says about a number; empty if it says nothing."""
    if number.text in block.reasons:
        return f"- {number.text}: ? {block.reasons[number.text]}"
    for evidence in block.evidence.values():
        try:
            if number.is_value_of(*evaluate(evidence, lesson)):
                return evidence
        except NoEvidence:
            continue
    return ""


def propose(text: Text) -> str:
    """Blocks for the sentences that no block matches. Each line has a ? that must be removed by hand.

    What the nearest block says about the same number comes first, so a reworded sentence keeps its bindings; then a
    line that the lesson prints, or its code. Numbers that stay in the sentence are not claims, by a rule.
    """
    blocks = []
    for _, markdown in text.parts:
        for sentence in sentences(markdown):
            numbers = numbers_in(sentence)
            if not numbers or problems_of_sentence(text, sentence)[1]:
                continue
            near = _nearest(text.name, sentence)
            template, lines, at, letters = "", [], 0, iter("abcdefghijklmnopqrstuvwxyz")
            for number in numbers:
                kept = _from_block(number, near, text.lesson) if near else ""
                if kept.startswith("- "):
                    lines.append(f"  {kept}")
                elif kept or not why_no_claim(sentence, number):
                    letter = next(letters)
                    template += sentence[at : number.start] + "{" + letter + number.form + "}"
                    at = number.end
                    evidence = kept or _proposal(sentence, number, text.lesson)
                    lines.append(f"  {letter}: ? {evidence}    (the text says {number.text})")
            blocks.append("\n".join([f"> {template}{sentence[at:]}", *lines]))
    return "\n\n".join(dict.fromkeys(blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="names of texts or the numbers of lessons; all by default")
    parser.add_argument("--propose", action="store_true", help="print blocks for sentences that no block matches")
    args = parser.parse_args()
    names = [name for name in all_texts() if not args.only or any(name.startswith(only) for only in args.only)]
    if not names:
        parser.error(f"no text is called {' '.join(args.only)}: there are {', '.join(all_texts())}")
    wrong = 0
    for name in names:
        if args.propose:
            print(propose(text_of(name)))
            continue
        found = problems_of(text_of(name))
        wrong += len(found)
        print(
            "\n".join(
                [*found, *[cure(name)][: len(found)], f"{name}: {len(blocks_of(name))} sentences, {len(found)} wrong"]
            )
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
