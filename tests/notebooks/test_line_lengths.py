"""The code of the lessons fits on a page: lines have at most 100 characters, but for one of each lesson."""

import pytest

from notebooks.scripts import build
from notebooks.scripts.running import code_cells
from tests import ROOT

LONGEST, MAY_BE_LONGER = 100, 1
EXERCISES = ROOT / "qlora_helpers" / "course" / "exercises"


def long_lines(name: str) -> list[str]:
    """The long lines of code in a lesson, with its solutions, and without the set-up cell of Colab's edition."""
    editions = [build.build_edition(name, edition, {}) for edition in ("learner", "solutions")]
    lines = [line for edition in editions for cell in code_cells(edition) for line in cell.source.splitlines()]
    return list(dict.fromkeys(line for line in lines if len(line) > LONGEST))


@pytest.mark.parametrize("name", build.lessons())
def test_a_lesson_has_at_most_one_long_line(name):
    if not (EXERCISES / f"lesson_{name[:2]}.py").exists():
        pytest.skip(f"lesson {name[:2]} has {len(long_lines(name))} long lines; counted once its exercises have moved")
    long = long_lines(name)
    assert len(long) <= MAY_BE_LONGER, "\n".join(f"{len(line)}: {line}" for line in long)


def test_a_line_is_long_from_101_characters_on(monkeypatch):
    def edition(name, edition, timings):
        lines = ["x" * 100, "y" * 101, "z" * 101] if edition == "learner" else ["y" * 101, "w" * 150]
        cells = [build.nbformat.v4.new_code_cell("\n".join(lines)), build.nbformat.v4.new_markdown_cell("t" * 200)]
        return build.nbformat.v4.new_notebook(cells=cells)

    monkeypatch.setattr(build, "build_edition", edition)
    assert long_lines("any") == ["y" * 101, "z" * 101, "w" * 150]
