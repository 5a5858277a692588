"""An exercise for the tests of this room, and what it prints."""

import pytest

from tests.course.exercises.made_up import SAID


@pytest.fixture
def said(capsys):
    """What `check` prints for an answer, without the part that is the same for all."""

    def line(exercise, answer, **given):
        exercise.check(answer, **given)
        printed = capsys.readouterr().out
        assert printed.endswith("\n") and printed[2:].startswith(SAID), printed
        return printed[0] + " " + printed[2 + len(SAID) : -1]

    return line
