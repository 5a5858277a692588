"""The quiz of a lesson as cells of its notebook: the questions, a cell for the answers, and one that marks them.

The cells need nothing of their lesson, so a changed question does not make its outputs stale: they are run here, by
themselves, whenever a notebook is put together.
"""

import contextlib
import copy
import io
import re

import nbformat
from nbformat import NotebookNode

from notebooks.scripts.running import code_cells, has_tag
from qlora_helpers.course import quiz

TAG = "quiz"
BEFORE = "## You have"  # the heading of a lesson's last cell
INTRODUCTION = """## Quiz

What do you take along? Write a letter in place of each `...`, and run both cells below. An answer that is not right is told
what it overlooks; change it, and run them again."""


def cells_of(lesson: int, edition: str) -> list[NotebookNode]:
    """The quiz of a lesson for one edition, without outputs; the solved one has the right answers.

    Raises:
        FileNotFoundError: the lesson has no quiz.
    """
    questions = quiz.read_quiz(lesson)
    solved = edition == "solutions"
    answers = (f'"{question.right.letter}"' if solved else "..." for question in questions)
    given = ", ".join(f"{place}: {answer}" for place, answer in enumerate(answers, start=1))
    marking = f"from qlora_helpers.course import quiz\n\nquiz.mark({lesson}, quiz_answers)"
    return [
        nbformat.v4.new_markdown_cell(f"{INTRODUCTION}\n\n{quiz.as_markdown(questions)}", metadata={"tags": [TAG]}),
        nbformat.v4.new_code_cell(
            f"quiz_answers = {{{given}}}", metadata={"tags": [TAG, "solution" if solved else "exercise"]}
        ),
        nbformat.v4.new_code_cell(marking, metadata={"tags": [TAG, "nbval-check-output"]}),
    ]


def put_in(cells: list[NotebookNode], lesson: int, edition: str) -> list[NotebookNode]:
    """A lesson's cells with its quiz, if it has one, before "You have"; at the end if there is no such heading.

    A text that stands above the heading in the same cell becomes a cell of its own.
    """
    if not quiz.has_quiz(lesson):
        return cells
    made = cells_of(lesson, edition)
    for at in reversed(range(len(cells))):
        if cells[at].cell_type == "markdown" and (heading := re.search(rf"^{BEFORE}", cells[at].source, re.M)):
            above, end = cells[at].source[: heading.start()].strip(), cells[at].source[heading.start() :]
            tags = cells[at].metadata
            before = [nbformat.v4.new_markdown_cell(above, metadata=copy.deepcopy(tags))] if above else []
            after = nbformat.v4.new_markdown_cell(end, metadata=tags)
            return [*cells[:at], *before, *made, after, *cells[at + 1 :]]
    return [*cells, *made]


def run(notebook: NotebookNode) -> None:
    """Run the quiz of a notebook, which needs no other cell, and store what it prints."""
    names: dict = {}
    for count, cell in enumerate(code_cells(notebook), start=1):
        if has_tag(cell, TAG):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(cell.source, names)
            stream = nbformat.v4.new_output("stream", name="stdout", text=said.getvalue())
            cell.outputs, cell.execution_count = [stream] if said.getvalue() else [], count
