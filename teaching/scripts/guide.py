"""The tables of the instructor's guide, teaching/README.md: how long each lesson takes, and what fits into a day.

Nobody was timed. The minutes are judged from the lessons, by the rates below, and rounded up to five. Texts, code and
exercises are counted in the sources, figures in the outputs of the built lessons.
"""

import json
import math
import re
from dataclasses import dataclass

import jupytext
import nbformat

from data.scripts.markdown_tables import fill
from notebooks.scripts.running import code_cells, has_tag
from qlora_helpers.course import quiz
from teaching.scripts import ROOT

PAGE = ROOT / "teaching" / "README.md"
NOTEBOOKS = ROOT / "notebooks"

SPOKEN = 130  # words of text that an instructor says in a minute
READ = 200  # words of text that a learner reads in a minute
SHOWN = 20  # seconds for a cell of code and its output on a slide
LINE = 5  # seconds for a learner to read a line of code
FIGURE = 60  # seconds for a figure, for both
QUESTION = 1  # minutes for a question of the quiz, for both


@dataclass(frozen=True)
class Extent:
    """What a lesson has, and the minutes that follow from it."""

    name: str
    title: str
    words: int
    cells: int
    lines: int
    figures: int
    exercises: tuple[int, ...]  # the minutes that each states
    questions: int
    seconds: int  # that it takes to run

    @property
    def teaching(self) -> int:
        """Minutes to teach it with its slides: the text, each cell, each figure, the quiz; without the exercises."""
        shown = self.words / SPOKEN + (self.cells * SHOWN + self.figures * FIGURE) / 60
        return _rounded(shown + self.questions * QUESTION)

    @property
    def exercising(self) -> int:
        """Minutes for its exercises, as they state them."""
        return sum(self.exercises)

    @property
    def working(self) -> int:
        """Minutes to work through it alone: text and code, figures, running it, the quiz and the exercises."""
        read = self.words / READ + (self.lines * LINE + self.figures * FIGURE + self.seconds) / 60
        return _rounded(read + self.questions * QUESTION + self.exercising)


def _rounded(minutes: float) -> int:
    return 5 * math.ceil(minutes / 5)


def extent(name: str, seconds: int) -> Extent:
    """What a lesson has; the cells of exercises and their checks are left out.

    Raises:
        ValueError: an exercise does not say how many minutes it takes.
    """
    cells = jupytext.read(NOTEBOOKS / "source" / f"{name}.py").cells
    text = [cell.source for cell in cells if cell.cell_type == "markdown"]
    code, in_exercise = [], False
    for cell in cells:
        in_exercise = cell.cell_type == "code" and (in_exercise or has_tag(cell, "exercise"))
        if cell.cell_type == "code" and not in_exercise:
            code.append(cell)
    built = [
        output
        for cell in code_cells(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4))
        for output in cell.outputs
    ]
    whole = "\n\n".join(text)
    headings = re.findall(r"^## Exercise \S+.*$", whole, re.M)
    minutes = [int(number) for number in re.findall(r"about (\d+) minutes?\.\*", whole)]
    if len(minutes) != len(headings):
        raise ValueError(
            f"lesson {name}: {len(headings)} exercises, and {len(minutes)} lines such as  *Build · easy · about 5 minutes.*"
        )
    return Extent(
        name,
        text[0].splitlines()[0].removeprefix("# "),
        len(whole.split()),
        len(code),
        sum(len(cell.source.splitlines()) for cell in code),
        sum("<img" in output.get("data", {}).get("text/html", "") for output in built),
        tuple(minutes),
        len(quiz.read_quiz(name[:2])) if quiz.has_quiz(name[:2]) else 0,
        seconds,
    )


def extents() -> dict[str, Extent]:
    """The extent of every lesson, by its name."""
    timings = json.loads((NOTEBOOKS / "scripts" / "timings.json").read_text(encoding="utf-8"))
    return {name: extent(name, timings[name]["seconds"]) for name in sorted(timings)}


# The paths through the course: its lessons by number; * with the time for the exercises in class.
PATHS = {
    "half a day": ("1", "2", "4*", "10"),
    "a day": ("1", "2", "3", "4*", "5", "8", "10"),
    "two days": ("1*", "2*", "3", "4*", "5*", "6", "7", "8*", "9", "10", "11", "12", "13"),
}
HOURS = {"half a day": 3.5, "a day": 6, "two days": 12}  # in class, without breaks


def lessons_table(found: dict[str, Extent]) -> str:
    """Each lesson's minutes, and what they follow from."""
    table = [
        "| lesson | to teach | its exercises | to work alone | words | cells of code | figures | exercises | questions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found.values():
        minutes = f"{one.teaching} min | {one.exercising} min | {one.working} min"
        has = f"{one.words:,} | {one.cells} | {one.figures} | {len(one.exercises)} | {one.questions}"
        table.append(f"| [{one.title}](../notebooks/{one.name}.ipynb) | {minutes} | {has} |")
    sums = [sum(getattr(one, what) for one in found.values()) for what in ("teaching", "exercising", "working")]
    hours = " | ".join(f"{minutes / 60:.1f} h" for minutes in sums)
    return "\n".join([*table, f"| all | {hours} | | | | | |"])


def minutes_of(path: str, found: dict[str, Extent]) -> int:
    """The minutes in class of a path, without breaks."""
    by_number = {one.name[:2]: one for one in found.values()}
    total = 0
    for part in PATHS[path]:
        one = by_number[part.removesuffix("*").zfill(2)]
        total += one.teaching + one.exercising * part.endswith("*")
    return total


def paths_table(found: dict[str, Extent]) -> str:
    """The paths, with the lessons of each and its minutes."""
    table = [
        "| path | lessons in class (bold: with exercises) | in class, without breaks | left to work alone |",
        "|---|---|---|---|",
    ]
    for path, parts in PATHS.items():
        total = minutes_of(path, found)
        names = ", ".join(f"**{part[:-1]}**" if part.endswith("*") else part for part in parts)
        numbers = [str(int(name[:2])) for name in found]
        left = [number for number in numbers if not {number, f"{number}*"} & {*parts}]
        without = [part for part in parts if not part.endswith("*")]
        rest = [f"exercises of {', '.join(without)}"] * bool(without) + [f"lessons {', '.join(left)}"] * bool(left)
        table.append(f"| {path} | {names} | {total // 60} h {total % 60:02} min | {'; '.join(rest)} |")
    return "\n".join(table)


def rates_table() -> str:
    """By which rates the minutes were judged."""
    return "\n".join(
        [
            "| what | to teach | to work alone |",
            "|---|---|---|",
            f"| text | {SPOKEN} words in a minute | {READ} words in a minute |",
            f"| code | {SHOWN} s for a cell and its output | {LINE} s for a line |",
            f"| a figure | {FIGURE} s | {FIGURE} s |",
            f"| a question of the quiz | {QUESTION} min | {QUESTION} min |",
            "| running the lesson | before class | as the lesson's first lines say |",
            "| exercises | extra | as each states |",
        ]
    )


def tables() -> dict[str, str]:
    """The generated parts of the guide, by their places."""
    found = extents()
    return {"rates": rates_table(), "lessons": lessons_table(found), "paths": paths_table(found)}


def fill_page() -> None:
    """Fill the tables of the guide, if they are not those of today's lessons."""
    page = PAGE.read_text(encoding="utf-8")
    filled = fill(page, tables())
    if filled != page:
        PAGE.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
