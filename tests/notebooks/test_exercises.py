"""The exercises of a lesson are those of its module in `qlora_helpers/course/exercises`: headings, effort, checks."""

import importlib
import re

import jupytext
import pytest

from notebooks.scripts import build
from notebooks.scripts.running import has_tag
from qlora_helpers.course.exercises.asking import KINDS, Exercise
from tests import ROOT

ROOM = ROOT / "qlora_helpers" / "course" / "exercises"
HEADING = re.compile(r"^#+ +Exercise\b.*$", re.MULTILINE)


@pytest.fixture(params=build.lessons())
def lesson(request):
    """The exercises of a lesson by the names that its cells use, and the cells of its source."""
    number = request.param[:2]
    if not (ROOM / f"lesson_{number}.py").exists():
        pytest.skip(f"the exercises of lesson {number} have not moved to {ROOM.relative_to(ROOT).as_posix()} yet")
    module = importlib.import_module(f"qlora_helpers.course.exercises.lesson_{number}")
    of_module = {name: value for name, value in vars(module).items() if isinstance(value, Exercise)}
    return int(number), of_module, jupytext.read(build.SOURCES / f"{request.param}.py").cells


def text_of(cells) -> str:
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_a_lesson_has_three_to_five_exercises_of_every_kind_in_order(lesson):
    number, exercises, _ = lesson
    assert 3 <= len(exercises) <= 5
    assert [e.number for e in exercises.values()] == [f"{number}.{i}" for i in range(1, len(exercises) + 1)]
    assert {e.kind for e in exercises.values()} == set(KINDS)


def test_headings_and_effort_are_those_of_the_exercises(lesson):
    _, exercises, cells = lesson
    text = text_of(cells)
    assert HEADING.findall(text) == [exercise.heading for exercise in exercises.values()]
    for exercise in exercises.values():
        below = text.split(exercise.heading + "\n", 1)[1].lstrip()
        assert below.startswith(exercise.effort + " "), f"{below.splitlines()[0]!r} is not {exercise.effort!r}"


def test_a_stub_and_a_solution_stand_before_each_check(lesson):
    number, exercises, cells = lesson
    code = [cell for cell in cells if cell.cell_type == "code"]
    checks = {
        name: [at for at, cell in enumerate(code) if re.search(rf"\bexercises\.{name}\.check\(", cell.source)]
        for name in exercises
    }
    assert {name: len(at) for name, at in checks.items() if len(at) != 1} == {}
    for name, (at,) in checks.items():
        assert has_tag(code[at], "nbval-check-output"), name
        assert has_tag(code[at - 1], "solution") and any(has_tag(cell, "exercise") for cell in code[:at]), name
        assert "..." in next(cell.source for cell in reversed(code[:at]) if has_tag(cell, "exercise")), name
    everything = "\n".join(cell.source for cell in code)
    assert f"from qlora_helpers.course.exercises import lesson_{number:02d} as exercises" in everything
    assert not re.search(r"^exercise\(", everything, re.MULTILINE), "the old way to ask"
