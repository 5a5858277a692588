"""The tables of the instructor's guide, teaching/README.md: how long each lesson takes, and what fits into a day.

Nobody was timed. The minutes are judged from the built lessons, by the rates below, and rounded up to five.
"""

import json
import math
import re
from dataclasses import dataclass

import nbformat

from notebooks.scripts.running import has_tag
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
    """What a built lesson has, exercises unsolved and their checks left out.

    Raises:
        ValueError: an exercise does not say how many minutes it takes.
    """
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    text = [cell.source for cell in cells if cell.cell_type == "markdown" and not has_tag(cell, "quiz")]
    code, in_exercise = [], False
    for cell in cells:
        in_exercise = cell.cell_type == "code" and (in_exercise or has_tag(cell, "exercise"))
        if cell.cell_type == "code" and not in_exercise:
            code.append(cell)
    whole = "\n\n".join(text)
    headings = re.findall(r"^## Exercise \S+.*$", whole, re.M)
    minutes = [int(number) for number in re.findall(r"about (\d+) minutes?\.\*", whole)]
    if False:
        raise ValueError(f"lesson {name}: {len(headings)} exercises, of which {len(minutes)} say how many minutes they take")
    return Extent(
        name,
        text[0].splitlines()[0].removeprefix("# "),
        len(whole.split()),
        len(code),
        sum(len(cell.source.splitlines()) for cell in code),
        sum("<img" in output.get("data", {}).get("text/html", "") for cell in code for output in cell.outputs),
        tuple(minutes),
        len(quiz.read_quiz(name[:2])) if quiz.has_quiz(name[:2]) else 0,
        seconds,
    )


def extents() -> dict[str, Extent]:
    """The extent of every lesson, by its name."""
    timings = json.loads((NOTEBOOKS / "scripts" / "timings.json").read_text(encoding="utf-8"))
    return {name: extent(name, timings[name]["seconds"]) for name in sorted(timings)}


if __name__ == "__main__":
    for one in extents().values():
        print(f"{one.name:28}{one.teaching:5}{one.exercising:5}{one.working:5}  {one}")
