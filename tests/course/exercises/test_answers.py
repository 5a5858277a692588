"""The exercises of each lesson accept right answers in many forms, refuse tempting wrong ones, and never tell the answer."""

import importlib
import re

import pytest

from qlora_helpers.course import exercises
from qlora_helpers.course.exercises import lesson_10 as exercises_of_10
from qlora_helpers.course.exercises.asking import NOT_SOLVED, Exercise
from tests import ROOT
from tests.course.exercises.tried import Tried

ROOM = ROOT / "qlora_helpers" / "course" / "exercises"
LESSONS = sorted(path.stem.removeprefix("lesson_") for path in ROOM.glob("lesson_[0-9][0-9].py"))
FEWEST = 3  # of each kind, for an exercise


def of_lesson(number: str) -> dict[str, Exercise]:
    module = importlib.import_module(f"{exercises.__name__}.lesson_{number}")
    return {name: value for name, value in vars(module).items() if isinstance(value, Exercise)}


def answers(number: str):
    return importlib.import_module(f"tests.course.exercises.answers_{number}")


EVERY = [(number, name) for number in LESSONS for name in of_lesson(number)]
TRIED = [
    pytest.param(number, name, kind, tried, id=f"{number}-{name}-{kind}-{at}")
    for number in LESSONS
    for kind in ("RIGHT", "WRONG")
    for name, several in getattr(answers(number), kind).items()
    for at, tried in enumerate(several)
]


def said(number: str, name: str, tried: Tried, capsys) -> str:
    """The line that a lesson's cell prints for an answer."""
    capsys.readouterr()
    of_lesson(number)[name].check(tried.answer, **tried.given)
    printed = capsys.readouterr().out
    exercise = of_lesson(number)[name]
    line = printed.splitlines()[-1]
    assert line[2:].startswith(f"Exercise {exercise.number}, {exercise.title.rstrip('?')}: "), printed
    return line


def forms(answer) -> set[str]:
    """How a right answer could stand in a text; nothing for functions and long answers."""
    if isinstance(answer, bool) or callable(answer):
        return set()
    if isinstance(answer, int | float):
        return {f"{answer}", f"{answer:,}", f"{answer:g}", f"{answer:,.10g}"}
    if isinstance(answer, str):
        return {answer}
    if isinstance(answer, list | tuple) and len(answer) > 1:
        return {", ".join(map(str, answer))}
    return set()


def tells(text: str, answer) -> list[str]:
    return [form for form in forms(answer) if re.search(rf"(?<![\w.,-]){re.escape(form)}(?![\w]|[.,]\d)", text)]


@pytest.mark.skipif(not LESSONS, reason="no lesson has exercises here yet")
@pytest.mark.parametrize("number", LESSONS or ["none"])
def test_every_exercise_has_right_and_wrong_answers(number):
    for kind in ("RIGHT", "WRONG"):
        listed = getattr(answers(number), kind)
        assert listed.keys() == of_lesson(number).keys()
        assert {name: len(several) for name, several in listed.items() if len(several) < FEWEST} == {}


@pytest.mark.skipif(not TRIED, reason="no lesson has exercises here yet")
@pytest.mark.parametrize(("number", "name", "kind", "tried"), TRIED or [("", "", "", None)])
def test_an_answer_is_judged_rightly_and_the_right_one_is_not_told(number, name, kind, tried, capsys):
    line = said(number, name, tried, capsys)
    if kind == "RIGHT":
        assert line.endswith(": right!") and line[0] == "✓", line
        return
    assert line[0] == "✗", line
    assert tried.says, "say which words the message must have"
    assert tried.says in line
    own = f"{tried.answer!r} {tried.answer}" if not callable(tried.answer) else ""
    for right in answers(number).RIGHT[name]:
        for form in tells(line, right.answer):
            assert form in own or tells(of_lesson(number)[name].title, right.answer), f"the line tells {form}: {line}"


@pytest.mark.skipif(not EVERY, reason="no lesson has exercises here yet")
@pytest.mark.parametrize(("number", "name"), EVERY or [("", "")])
def test_dots_are_not_solved_yet_and_no_hint_has_the_answer(number, name, capsys):
    right = answers(number).RIGHT[name]
    assert said(number, name, Tried(..., **right[0].given), capsys).endswith(NOT_SOLVED)
    for hint in of_lesson(number)[name].hints:
        for tried in right:
            if isinstance(tried.answer, str):  # the name of an option may be a common word, or be asked for
                continue
            assert tells(hint, tried.answer) == [], hint


def test_two_of_three_exports_lost_what_was_learnt(tmp_path):
    """Each at the hop that the answer names, as `prove` finds it."""
    from qlora_helpers.adapters.file_merge import merge_files
    from qlora_helpers.adapters.files import load_adapter
    from qlora_helpers.adapters.hops import EXPORT, MERGE, prove
    from qlora_helpers.models.loading import SHIPPED_MODEL, folder_of, load_model, load_tokenizer
    from qlora_helpers.paths import data_path
    from tests.support.short_runs import CPU

    adapter = data_path("adapters", "sentences")
    merge_files(folder_of(SHIPPED_MODEL), adapter, tmp_path / "merged")

    def live():
        return load_adapter(load_model(quantization=None, hardware=CPU), adapter), load_tokenizer()

    chats = [[{"role": "user", "content": "What is the job of Isabel Grayfield?"}]]
    found = {}
    for path in exercises_of_10.three_exports(tmp_path / "merged", tmp_path):
        proof = prove(path / "model.gguf", path / "merged", chats, live=live, max_new_tokens=8, hardware=CPU)
        found[path.name] = "none" if proof.broken is None else {MERGE: "merge", EXPORT: "export"}[proof.broken.hop]
    assert found == answers("10").LOST
