"""Questions with options, read from a lesson's file, shown as Markdown, and marked."""

from __future__ import annotations

import json
import operator
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Option", "Question", "as_markdown", "has_quiz", "mark", "read_quiz"]

FOLDER = Path(__file__).parent
EXAMPLE = '{1: "b", 2: "a", 3: ..., 4: ...}'


@dataclass(frozen=True)
class Option:
    """One of a question's options: its letter, its text, and what is said to somebody who chose it."""

    letter: str
    text: str
    says: str
    right: bool


@dataclass(frozen=True)
class Question:
    """A question with its number, such as 2.3, and its options."""

    number: str
    text: str
    options: tuple[Option, ...]

    @property
    def right(self) -> Option:
        """The option that is right."""
        return next(option for option in self.options if option.right)

    def marked(self, answer: Any) -> str:
        """One line about an answer; never which option is right, unless it was chosen.

        Args:
            answer: a letter in any spelling (`"b"`, `"B)"`), or the option's place, counted from 1; `...`, `None` and an
                empty text are no answer yet. Anything else is told what an answer looks like.
        """
        name = f"Quiz {self.number}"
        if answer is None or answer is ... or (isinstance(answer, str) and not answer.strip()):
            return f"○ {name}: not answered yet"
        chosen = self._chosen(answer)
        if chosen is None:
            letters = [option.letter for option in self.options]
            return (
                f"✗ {name}: {answer!r} is none of the options: answer with {', '.join(letters[:-1])} or {letters[-1]}"
            )
        if chosen.right:
            return f"✓ {name}: right. {chosen.says}"
        return f"✗ {name}: {chosen.letter} is not right: {chosen.says}"

    def _chosen(self, answer: Any) -> Option | None:
        if isinstance(answer, str):
            answer = answer.strip().strip("().:").strip().lower()
            if answer.isdecimal():
                answer = int(answer)
        if not isinstance(answer, str | bool):
            try:
                place = operator.index(answer)
            except TypeError:
                return None
            return self.options[place - 1] if 1 <= place <= len(self.options) else None
        return next((option for option in self.options if option.letter == answer), None)


def _path(lesson: int | str) -> Path:
    try:
        return FOLDER / f"{int(lesson):02}.json"
    except ValueError:
        raise ValueError(f"lesson={lesson!r} must be the number of a lesson, such as 2") from None


def has_quiz(lesson: int | str) -> bool:
    """Whether there are questions for a lesson, given by its number."""
    return _path(lesson).exists()


def read_quiz(lesson: int | str) -> tuple[Question, ...]:
    """The questions of a lesson.

    Raises:
        FileNotFoundError: there are none.
        ValueError: `lesson` is no number, or its file is not as it should be: a question needs its `text`, three or four
            `options` by their letters, which one is `right`, and for each option a sentence that it `says`.
    """
    path = _path(lesson)
    if not path.exists():
        there = ", ".join(str(int(file.stem)) for file in sorted(FOLDER.glob("[0-9][0-9].json")))
        raise FileNotFoundError(f"lesson {int(lesson)} has no quiz: there are those of lessons {there}")
    questions = []
    for place, entry in enumerate(json.loads(path.read_text(encoding="utf-8")), start=1):
        number = f"{int(path.stem)}.{place}"
        letters = list(string.ascii_lowercase[: len(entry["options"])])
        if not 3 <= len(letters) <= 4 or list(entry["options"]) != letters:
            raise ValueError(
                f"{path.name}, question {number}: its options must be a, b, c and perhaps d, in this order"
            )
        if entry["right"] not in letters or entry["says"].keys() != set(letters):
            raise ValueError(f"{path.name}, question {number}: one option is right, and each has a sentence in `says`")
        options = (
            Option(letter, text, entry["says"][letter], letter == entry["right"])
            for letter, text in entry["options"].items()
        )
        questions.append(Question(number, entry["text"], tuple(options)))
    return tuple(questions)


def as_markdown(questions: tuple[Question, ...]) -> str:
    """The questions with their options, without what the options say."""
    return "\n\n".join(
        "\n".join(
            [f"**{question.number}** {question.text}", ""] + [f"- **{o.letter}** {o.text}" for o in question.options]
        )
        for question in questions
    )


def mark(lesson: int | str, answers: Any) -> None:
    """Print one line for each question of a lesson: right and why, not right and what it overlooks, or not answered.

    Args:
        answers: the answers by the numbers of the questions, such as `{1: "b", 2: "a", 3: ..., 4: ...}`, or a list of them
            in order. What is wrong with it is printed, and nothing is raised.

    Raises:
        FileNotFoundError: the lesson has no quiz.
        ValueError: `lesson` is no number of a lesson.
    """
    questions = read_quiz(lesson)
    if isinstance(answers, list | tuple):
        answers = dict(enumerate(answers, start=1))
    if answers is None or answers is ...:
        answers = {}
    if not isinstance(answers, Mapping):
        print(f"✗ Quiz {int(lesson)}: answers must be a dictionary such as {EXAMPLE}, and is {answers!r}")
        return
    given, unknown = {}, []
    for key, answer in answers.items():  # 3, "3" and "2.3" are the same question
        place = re.fullmatch(rf"(?:{int(lesson)}\.)?([1-9]\d*)", str(key).strip())
        if place and int(place[1]) <= len(questions):
            given[int(place[1])] = answer
        else:
            unknown.append(key)
    for place, question in enumerate(questions, start=1):
        print(question.marked(given.get(place)))
    for key in unknown:
        print(f"✗ Quiz {int(lesson)}: there is no question {key!r}: they are 1 to {len(questions)}")
