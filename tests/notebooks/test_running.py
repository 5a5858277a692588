"""How one kernel runs two editions of a lesson."""

import os

import pytest
from nbformat.v4 import new_code_cell

from notebooks.scripts.running import in_one_kernel, peak_bytes


def cell(source: str, *tags: str):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


BEFORE, CHECK, AFTER = cell("before"), cell("exercise(...)", "nbval-check-output"), cell("after")
EXERCISE, SOLUTION = cell("x = ...", "exercise"), cell("x = 1", "solution")


def test_the_exercise_is_checked_unsolved_and_then_solved():
    runs = in_one_kernel([BEFORE, EXERCISE, CHECK, AFTER], [BEFORE, SOLUTION, CHECK, AFTER])
    assert [(who, cell.source) for who, cell in runs] == [
        (("learner", "solutions"), "before"),
        (("learner",), "x = ..."),
        (("learner",), "exercise(...)"),
        (("solutions",), "x = 1"),
        (("solutions",), "exercise(...)"),
        (("learner", "solutions"), "after"),
    ]


@pytest.mark.parametrize(
    ("learner", "solved", "says"),
    [
        ([BEFORE, AFTER], [BEFORE, CHECK], "in one edition only: 'after'"),
        ([BEFORE, EXERCISE], [BEFORE, SOLUTION], "no cell after it checks it: 'x = ...'"),
        ([BEFORE], [BEFORE, AFTER], "no cell after it checks it: 'after'"),
        ([BEFORE, AFTER], [BEFORE], "in one edition only: 'after'"),
    ],
)
def test_a_cell_that_stands_alone_is_named(learner, solved, says):
    with pytest.raises(ValueError, match=says):
        in_one_kernel(learner, solved)


def test_the_peak_of_a_process_is_what_it_once_held():
    before = peak_bytes(os.getpid())
    block = b"x" * (before // 2)  # written, so held
    assert len(block) and peak_bytes(os.getpid()) > before
    del block
    assert peak_bytes(os.getpid()) > before
