"""The instructor's guide: its tables are counted from the lessons, its commands are there, and its paths fit their days."""

import re

import nbformat
import pytest

from data.scripts.markdown_tables import fill
from notebooks.scripts import build
from teaching.scripts import guide
from tests import ROOT

PAGE = guide.PAGE.read_text(encoding="utf-8")
FOUND = guide.extents()


def test_the_tables_are_up_to_date():
    assert fill(PAGE, guide.tables()) == PAGE, "run: make notebooks, or make teaching"


def test_every_lesson_has_a_section_with_what_it_is_for_needs_and_can_skip():
    sections = re.split(r"\n### ", PAGE)[1:]
    names = [re.match(r"\[(\d+) · [^\]]*\]\(\.\./notebooks/(\w+)\.ipynb\)", section).groups() for section in sections]
    assert [name for _, name in names] == build.lessons()
    assert [int(number) for number, _ in names] == [int(name[:2]) for name in build.lessons()]
    for section in sections:
        assert all(f"- **{what}:**" in section for what in ("For", "Needs", "If time is short")), section[:40]


def test_answers_to_common_questions_lead_to_the_lesson_that_shows_it():
    (part,) = re.findall(r"\n## What learners ask\n(.*?)\n## ", PAGE, re.S)
    answers = re.split(r"\n\n(?=\*\*)", part.strip())
    assert len(answers) >= 10
    for answer in answers:
        assert re.match(r"\*\*[^*]+[?.]\*\* ", answer), answer[:60]
        assert re.search(r"\]\(\.\./(notebooks/\w+\.ipynb|TROUBLESHOOTING\.md)\)", answer), answer[:60]


def test_commands_that_it_names_are_there():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"teaching", "preflight", "lab"} <= set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGE, re.M)) <= targets
    commands = {path.stem for path in (ROOT / "qlora_helpers" / "commands").glob("*.py")}
    assert {"doctor", "progress"} <= set(re.findall(r"python -m qlora_helpers (\w+)", PAGE)) <= commands


@pytest.mark.parametrize("path", guide.PATHS)
def test_a_path_fits_its_time_and_uses_most_of_it(path):
    minutes = guide.minutes_of(path, FOUND)
    assert 0.6 * guide.HOURS[path] * 60 <= minutes <= guide.HOURS[path] * 60


def test_paths_grow_and_name_lessons_in_order():
    known = [str(int(name[:2])) for name in build.lessons()]
    before: set[str] = set()
    for parts in guide.PATHS.values():
        numbers = [part.removesuffix("*") for part in parts]
        assert numbers == sorted(numbers, key=int) and set(numbers) <= set(known)
        assert before <= set(numbers)
        before = set(numbers)
    assert before == set(known), "two days are the whole course"


LESSON = """# %% [markdown]
# # 1 · One two three

# %%
a = 1
b = 2

# %% [markdown]
# ## Exercise 1.1: x
#
# *Build · easy · about 7 minutes.* Do it.

# %% tags=["exercise"]
x = ...

# %% tags=["solution"]
x = 1

# %%
check(x)
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function that makes a lesson 1 of this source, with a figure in its notebook, and counts it."""
    monkeypatch.setattr(guide, "NOTEBOOKS", tmp_path)
    (tmp_path / "source").mkdir()
    figure = nbformat.v4.new_output("display_data", data={"text/html": '<img alt="a" src="data:,">'})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=[figure])])
    nbformat.write(notebook, tmp_path / "01_one.ipynb")

    def counted(source: str) -> guide.Extent:
        (tmp_path / "source" / "01_one.py").write_text(source, encoding="utf-8")
        return guide.extent("01_one", 30)

    return counted


def test_what_is_counted(small):
    one = small(LESSON)
    assert (one.title, one.words, one.cells, one.lines, one.figures) == ("1 · One two three", 19, 1, 2, 1)
    assert (one.exercises, one.exercising, one.questions, one.seconds) == ((7,), 7, 4, 30)


def test_minutes_follow_from_the_rates():
    one = guide.Extent("x", "x", 1300, 30, 240, 2, (10, 5), 4, 60)
    assert one.teaching == 30  # 10 for the text, 10 for the cells, 2 for the figures, 4 for the quiz; in fives
    assert one.working == 50  # 6.5 + 20 for the lines + 2 + 1 to run + 4 + 15 for the exercises


def test_an_exercise_without_minutes_is_refused(small):
    with pytest.raises(ValueError, match="lesson 01_one: 2 exercises, and 1 lines such as"):
        small(f"{LESSON}\n# %% [markdown]\n# ## Exercise 1.2: y\n#\n# Without a time.\n")
