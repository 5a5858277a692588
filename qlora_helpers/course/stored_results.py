"""What the notebook of a lesson says about its exercises and its quiz, by the outputs that are stored in it.

Nothing is run. The lines are those that the checks of exercises and the quiz print:

    ✓ Exercise 2.1, the bits in a code: right!
    ○ Exercise 2.2, a format of your own: not solved yet. …
    ✗ Quiz 2.3: b is not right: …

They say what a learner's notebook showed when it was saved. Whatever makes that doubtful is noticed: an answer that was run
after its check, outputs that were cleared, a notebook of another version of the course.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.paths import COURSE

__all__ = ["RESULTS", "NotALesson", "NotebookResults", "TaskResult", "read_notebook"]

RESULTS = {"✓": "right", "✗": "wrong", "○": "open", "": "not run"}
LINE = re.compile(r"^([✓✗○]) (Exercise|Quiz) ([1-9]\d*\.[1-9]\d*)(?:, (.+?))?(?:: .*)?$", re.MULTILINE)
TITLE = re.compile(r"^# ([1-9]\d?) · (.+)$", re.MULTILINE)
EXERCISE = re.compile(r"^#+ Exercise ([1-9]\d*\.[1-9]\d*): (.+)$", re.MULTILINE)
QUIZ = re.compile(r"^#+ Quiz\b", re.MULTILINE)
QUESTION = re.compile(r"^\*\*([1-9]\d*\.[1-9]\d*)\*\*", re.MULTILINE)
EDITIONS = {"learner": "notebooks", "solutions": "notebooks/solutions", "colab": "colab"}


class NotALesson(ValueError):
    """A file that is no notebook of this course, or cannot be read; the message says why."""


@dataclass(frozen=True)
class TaskResult:
    """An exercise or a question of the quiz.

    Attributes:
        kind: "exercise" or "quiz".
        number: such as "2.1".
        title: of an exercise; empty for a question.
        result: one of `RESULTS`.
        notices: what makes the result doubtful, or is to be done.
    """

    kind: str
    number: str
    title: str
    result: str
    notices: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it is right without a doubt."""
        return self.result == "right" and not self.notices


@dataclass(frozen=True)
class NotebookResults:
    """What a notebook says.

    Attributes:
        file: where it lies.
        lesson: its number.
        title: of the lesson.
        tasks: its exercises and then the questions of its quiz, in order.
        notices: what concerns the whole notebook.
    """

    file: str
    lesson: int
    title: str
    tasks: tuple[TaskResult, ...]
    notices: tuple[str, ...] = ()

    @property
    def is_untouched(self) -> bool:
        """Whether nothing in it was answered."""
        return not any(task.result in ("right", "wrong") for task in self.tasks)

    @property
    def right(self) -> int:
        """How many exercises and questions are right without a doubt."""
        return sum(task.counts for task in self.tasks)


def read_notebook(path: Path) -> NotebookResults:
    """What a notebook says about its exercises and its quiz.

    Raises:
        NotALesson: it cannot be read, or is no lesson of this course.
    """
    notebook = _read(path)
    cells = [cell for cell in notebook["cells"] if isinstance(cell, dict)]
    found = next((match for cell in cells[:4] if _is(cell, "markdown") and (match := TITLE.search(_text(cell)))), None)
    if found is None:
        raise NotALesson("is no lesson of this course: none of its first cells has a lesson's title")
    lesson, title = int(found[1]), found[2].strip()
    expected = _expected(cells)
    given = _given(lesson)
    tasks = [_task(cells, kind, number, text) for (kind, number), text in expected.items()]
    missing = [number for kind, number in given["expected"] if (kind, number) not in expected and kind == "exercise"]
    code = [cell for cell in cells if _is(cell, "code")]
    notices = []
    if code and not any(cell.get("outputs") for cell in code):
        notices.append("its outputs were cleared: run it again from the top, and save it")
    edition = _edition_of(notebook, given)
    if edition == "solutions":
        notices.append("it is the solved edition: its results are the course's own")
    elif edition == "another":
        notices.append("it comes from another version of the course than the one here")
    if missing:
        notices.append(f"it lacks exercise{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return NotebookResults(str(path), lesson, title, tuple(tasks), tuple(notices))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotALesson(f"cannot be read: {error.strerror or error}") from error
    if not content.strip():
        raise NotALesson("is empty")
    try:
        notebook = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NotALesson("is not in UTF-8, as notebooks are: it was changed by another program") from error
    except (ValueError, RecursionError) as error:
        if re.search(rb"^(<{7}|>{7}) ", content, re.MULTILINE):
            raise NotALesson("has the conflict marks of a merge in it") from error
        raise NotALesson(f"is no whole notebook: {str(error).splitlines()[0]}") from error
    if isinstance(notebook, dict) and "worksheets" in notebook:
        raise NotALesson("is in the old format 3: open it in JupyterLab, and save it")
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise NotALesson("is no notebook: it has no cells")
    return notebook


def _is(cell: Mapping[str, Any], kind: str) -> bool:
    return cell.get("cell_type") == kind


def _joined(text: Any) -> str:
    """A text that a notebook may store as a list of lines."""
    return "".join(part for part in text if isinstance(part, str)) if isinstance(text, list) else str(text or "")


def _text(cell: Mapping[str, Any]) -> str:
    return _joined(cell.get("source"))


def _printed(cell: Mapping[str, Any]) -> str:
    outputs = cell.get("outputs") if isinstance(cell.get("outputs"), list) else []
    return "\n".join(_joined(one.get("text")) for one in outputs if isinstance(one, dict) and "text" in one)


def _count(cell: Mapping[str, Any]) -> int | None:
    count = cell.get("execution_count")
    return count if isinstance(count, int) else None


def _expected(cells: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """The exercises and questions that a notebook names in its text or in an output: their titles by (kind, number)."""
    exercises, questions = {}, {}
    in_quiz = False
    for cell in cells:
        if _is(cell, "markdown"):
            text = _text(cell)
            exercises |= {("exercise", number): title.strip() for number, title in EXERCISE.findall(text)}
            in_quiz = bool(QUIZ.search(text)) or (in_quiz and not re.search(r"^#+ ", text, re.MULTILINE))
            if in_quiz:
                questions |= {("quiz", number): "" for number in QUESTION.findall(text)}
        elif _is(cell, "code"):
            for _, kind, number, title in LINE.findall(_printed(cell)):
                which = exercises if kind == "Exercise" else questions
                which.setdefault((kind.lower(), number), title)
    return {key: found[key] for found in (exercises, questions) for key in sorted(found, key=_place)}


def _place(key: tuple[str, str]) -> tuple[int, ...]:
    return tuple(map(int, key[1].split(".")))


def _task(cells: list[dict[str, Any]], kind: str, number: str, title: str) -> TaskResult:
    """The last result that a notebook stores for an exercise or a question, and whether it may be out of date."""
    at, mark = None, ""
    for place, cell in enumerate(cells):
        lines = LINE.findall(_printed(cell)) if _is(cell, "code") else []
        mine = [sign for sign, said, its, _ in lines if (said.lower(), its) == (kind, number)]
        later = at is None or (_count(cell) or 0) >= (_count(cells[at]) or 0)  # one that was run again elsewhere
        if mine and later:
            at, mark = place, mine[-1]
    if at is None:
        return TaskResult(kind, number, title, RESULTS[""])
    answers = _answers(cells, at, kind, number)
    notices = []
    checked = _count(cells[at])
    if checked and any((_count(cell) or 0) > checked for cell in answers):
        notices.append("the answer was run after its check: run the check again")
    elif mark == "○" and answers and not any("..." in _text(cell) for cell in answers):
        notices.append("the dots are gone from the answer, but the check is older: run both cells")
    return TaskResult(kind, number, title, RESULTS[mark], tuple(notices))


def _answers(cells: list[dict[str, Any]], check: int, kind: str, number: str) -> list[dict[str, Any]]:
    """The code cells between the heading of an exercise or a quiz and its check."""

    def is_heading(cell: dict[str, Any]) -> bool:
        text = _text(cell)
        named = (
            any(its == number for its, _ in EXERCISE.findall(text)) if kind == "exercise" else bool(QUIZ.search(text))
        )
        return _is(cell, "markdown") and named

    heading = next((place for place in range(check - 1, -1, -1) if is_heading(cells[place])), None)
    if heading is None:
        return []
    return [cell for cell in cells[heading:check] if _is(cell, "code")]


# ---- The course's own notebooks


@functools.cache
def _given(lesson: int) -> dict[str, Any]:
    """What the course that lies here has of a lesson: the hashes of its editions' code, and its exercises."""
    hashes, expected = {}, {}
    for edition, folder in EDITIONS.items():
        for path in sorted((COURSE / folder).glob(f"{lesson:02d}_*.ipynb")):
            try:
                notebook = _read(path)
            except NotALesson:
                continue
            if (made := _hash(notebook)) is not None:
                hashes[edition] = made
            if edition == "learner":
                expected = _expected(notebook["cells"])
    return {"hashes": hashes, "expected": expected}


def _hash(notebook: Mapping[str, Any]) -> str | None:
    """The hash that the build writes into a notebook; editing the notebook does not change it."""
    metadata = notebook.get("metadata")
    made = metadata.get("course") if isinstance(metadata, dict) else None
    return made.get("executed_code") if isinstance(made, dict) else None


def _edition_of(notebook: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Which edition a notebook was copied from; "another" version; or empty if that cannot be told."""
    made = _hash(notebook)
    if made is None or not given["hashes"]:
        return ""
    return next((edition for edition, known in given["hashes"].items() if known == made), "another")
