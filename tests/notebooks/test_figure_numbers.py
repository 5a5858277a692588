"""The figures of a lesson are numbered in the order in which they are shown, and each number has its alt text."""

import ast
import re

import jupytext
import pytest

from notebooks.scripts import build
from qlora_helpers.course import figure_texts


@pytest.fixture(params=build.lessons())
def lesson(request):
    """The number of a lesson whose figures are numbered, and its calls of `plots.show` in order."""
    number = request.param[:2]
    if not (figure_texts.FOLDER / f"{number}.json").exists():
        pytest.skip(f"the figures of lesson {number} have no numbers yet: there is no alt_texts/{number}.json")
    cells = [
        cell.source for cell in jupytext.read(build.SOURCES / f"{request.param}.py").cells if cell.cell_type == "code"
    ]
    nodes = [node for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return int(number), [node for node in nodes if ast.unparse(node.func) == "plots.show"]


def test_numbers_are_in_order_without_a_gap(lesson):
    number, shows = lesson
    given = [call.args[1].value for call in shows if len(call.args) > 1 and isinstance(call.args[1], ast.Constant)]
    assert given == [f"{number}.{at}" for at in range(1, len(shows) + 1)]


def test_each_number_has_one_alt_text(lesson):
    number, shows = lesson
    computed = {call.args[1].value for call in shows if any(keyword.arg == "alt" for keyword in call.keywords)}
    listed = set(figure_texts.texts_of_lesson(number))
    assert not computed & listed
    assert computed | listed == {call.args[1].value for call in shows}


def test_a_text_names_no_figure_that_is_not_there(lesson):
    number, shows = lesson
    text = next(build.SOURCES.glob(f"{number:02d}_*.py")).read_text(encoding="utf-8")
    named = {n for n in re.findall(r"[Ff]igure (\d+\.\d+)", text) if n.startswith(f"{number}.")}
    assert named <= {f"{number}.{at}" for at in range(1, len(shows) + 1)}
