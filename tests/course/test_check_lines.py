"""What a check measured stands in brackets and is not compared; all else is, with the digits that the tolerance leaves."""

import decimal
import fractions

import numpy as np
import pytest
import torch

from qlora_helpers.course.check_lines import beside, compared, rounded, without_measured
from qlora_helpers.course.checks import check


@pytest.mark.parametrize(
    ("value", "allowed", "text"),
    [
        (9.60693264, 0.288, "9.61"), (58.63200283, 1.76, "58.6"), (60.31637043, 1.2, "60.3"), (4.974030848, 0.099, "4.974"),
        (0.3003, 0.06, "0.3"), (1 / 3, 1e-6, "0.3333333"), (1 / 3, 1e-20, "0.3333333333"), (1234.5, 1000, "1,200"),
        (-9.606, 0.29, "-9.61"), (0.0, 0.1, "0"), (1e-9, 1e-3, "0"), (2e-5, 1e-7, "2e-05"), (5_703_281_152, 28_516_405, "5,703,000,000"),
        (1000, 0.5, "1,000"), (1000, 1, "1,000"), (12, 100, "10"), (10**20 + 1, 1, "100,000,000,000,000,000,001"), (9.99, 1, "10"),
        (np.float32(0.1), 0.01, "0.1"), (np.int64(1234), 1000, "1,200"), (torch.tensor(0.5), 0.1, "0.5"), (1.5, 0, "1.5"),
        (fractions.Fraction(1, 3), 0.1, "0.33"), (decimal.Decimal("1.25"), 1, "1.2"), (1e300, 1e298, "1e+300"),
    ],
)  # fmt: skip
def test_a_value_has_the_digits_that_its_tolerance_leaves(value, allowed, text):
    assert rounded(value, allowed) == text


@pytest.mark.parametrize(
    ("value", "bounds", "text"),
    [
        (0.91234, (0.85,), "0.912"), (0.049996, (0.05,), "0.049996"), (0.05, (0.05,), "0.05"), (0.0500001, (0.05,), "0.0500001"),
        (1234.5, (1000,), "1,230"), (999.7, (1000,), "999.7"), (1.2345e-5, (1,), "1.23e-05"), (41_943_040, (1,), "41,943,040"),
        (-0.5, (0, 1), "-0.5"), (0.0, (0,), "0"), (1e-12, (0,), "1e-12"), (float("inf"), (0,), "inf"), (True, (0,), "1"),
        (np.float32(0.1), (0,), "0.1"), (torch.tensor(3), (0,), "3"), (fractions.Fraction(1, 3), (0,), "0.333"), ("much", (0,), "much"),
    ],
)  # fmt: skip
def test_a_measured_value_shows_on_which_side_of_its_bounds_it_lies(value, bounds, text):
    assert beside(value, *bounds) == text


WAYS = [
    {"at_least": 0.25}, {"at_most": 0.75}, {"at_least": 0.25, "at_most": 0.75}, {"want": 0.5, "rel": 0.1}, {"want": 0.5, "abs": 0.1},
]  # fmt: skip


def line(capsys, got, **way) -> str:
    check("share (of all)", got, **way)
    return capsys.readouterr().out


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_was_measured_is_not_compared(way, capsys):
    one, other = line(capsys, 0.537, **way), line(capsys, 0.461, **way)
    assert one != other and compared(one) == compared(other) == without_measured(one)
    assert compared(one).startswith("✓ share (of all): ") and "measured" not in compared(one)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_changed_bound_tolerance_or_wanted_value_is_noticed(way, capsys):
    """The brackets hide nothing but what stands in them."""
    for name, value in way.items():
        changed = line(capsys, 0.5, **way | {name: value * 1.02})
        assert compared(changed) != compared(line(capsys, 0.5, **way)), name
    assert compared("✓ a: at least 1 (measured 2)") != compared("✓ b: at least 1 (measured 2)")
    assert compared("✗ a: at least 1 (measured 2)") != compared("✗ a: at least 1 (measured 3)")
    assert compared("0.5 (measured 0.5)") == "0.5 (measured 0.5)"  # no line of a check


def test_the_lines_around_a_check_are_kept(capsys):
    text = f"loss 0.5 (measured 3)\n{line(capsys, 0.5, at_least=0)}\n  rank (of 8)\n{line(capsys, 0.5, at_least=0)}"
    assert compared(text) == (
        "loss 0.5 (measured 3)\n✓ share (of all): at least 0\n\n  rank (of 8)\n✓ share (of all): at least 0\n"
    )


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ("✓ a: 9.60693264, within 3 %", "✓ a: 9.61, within 3 % (measured 9.5)"),
        ("✓ a: b: 5,703,281,152, within 0.5 %", "✓ a: b: 5,703,000,000, within 0.5 % (measured 5,703,281,152)"),
        ("✓ a: 0, within 1e-08", "✓ a: 0, within 1e-08 (measured 0)"),
        ("✓ a: -2e-05, within 10 %", "✓ a: -2e-05, within 10 % (measured -2.1e-05)"),
    ],
)
def test_a_line_that_was_stored_with_more_digits_and_without_brackets_is_the_same(stored, now):
    assert compared(stored) == compared(now)
    assert compared(
        stored.replace("9.6", "9.5").replace("5,703", "5,704").replace(" 0,", " 1,").replace("2e", "3e")
    ) != compared(now)
