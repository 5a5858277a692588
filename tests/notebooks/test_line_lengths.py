"""What the lessons show fits beside each other: code has at most 100 characters in a line, but for one line of each lesson,
and a table at most as many as a browser's window of 1,280 pixels.
"""

import re

import nbformat
import pytest

from notebooks.scripts import build
from notebooks.scripts.running import code_cells
from tests import ROOT

LONGEST, MAY_BE_LONGER = 100, 1
WIDEST_TABLE = 110
RULE = re.compile(r"-+(  -+)+")  # below the headings of a table
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


def wide_tables(notebook) -> list[str]:
    """The widest line of each table that a notebook shows and that is too wide, so that a browser would break its lines."""
    wide = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            lines = output.text.splitlines() if output.output_type == "stream" else []
            for number, line in enumerate(lines):
                if RULE.fullmatch(line):
                    end = next((at for at in range(number, len(lines)) if not lines[at].strip()), len(lines))
                    wide += [max(lines[number - 1 : end], key=len)]
    return [line for line in wide if len(line) > WIDEST_TABLE]


@pytest.mark.parametrize("name", build.lessons())
def test_a_table_is_no_wider_than_a_window(name):
    wide = wide_tables(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4))
    assert not wide, "\n".join(f"{len(line)}: {line}" for line in wide)


def test_a_table_is_wide_if_one_of_its_lines_is():
    table = "one  two\n---  ---\n1    2\n" + "x" * (WIDEST_TABLE + 1) + "  3\n\n" + "y" * 200
    new = build.nbformat.v4
    cells = [
        new.new_code_cell("", outputs=[new.new_output("stream", text=text)]) for text in (table, "z" * 200, table[:20])
    ]
    assert wide_tables(new.new_notebook(cells=cells)) == ["x" * (WIDEST_TABLE + 1) + "  3"]
