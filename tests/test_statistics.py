"""Means and ratios with their intervals, and McNemar's test, compared with values from other sources."""

import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from qlora_helpers import evaluation
from qlora_helpers.statistics import difference, interval, mcnemar, ratio, smallest_difference

# Student's two-sided t for 95 %, by the number of values (from any table, at one degree of freedom less)
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262, 31: 2.042}


@pytest.mark.parametrize(("count", "t"), T.items())
def test_an_interval_is_t_standard_errors_wide_on_either_side(count, t):
    values = [random.Random(0).gauss(0, 1) * number for number in range(count)]
    assert interval(values).half == pytest.approx(t * statistics.stdev(values) / math.sqrt(count), rel=2e-4)


def test_an_interval_of_known_numbers():
    found = interval([1.0, 2.0, 3.0])
    assert (
        found.mean == 2 and found.count == 3 and found.half == pytest.approx(4.302653 / math.sqrt(3))
    )  # 4.303 in any table of Student's t
    assert found.is_noise and not interval([1.9, 2.0, 2.1]).is_noise
    assert found.verdict == "within noise" and interval([1.9, 2.0, 2.1]).verdict == "a difference"


def test_nineteen_of_twenty_intervals_hold_the_true_mean():
    draw = random.Random(0)
    held = [
        abs(found.mean - 7) <= found.half
        for found in (interval([draw.gauss(7, 2) for _ in range(5)]) for _ in range(4_000))
    ]
    assert statistics.fmean(held) == pytest.approx(0.95, abs=0.01)


def test_what_a_seed_does_to_both_cancels_out_in_a_difference():
    shared = [0.1, 0.5, 0.9, 0.3]
    one, other = (
        [x + 0.01 for x in shared],
        [x + y for x, y in zip(shared, [0.001, -0.001, 0.001, -0.001], strict=True)],
    )
    assert not difference(one, other).is_noise
    assert interval(one).half > 0.1


def test_what_a_question_does_to_both_cancels_out_in_a_difference():
    """Of 400 questions both know half; where they differ, one is right six times and the other never."""
    one, other = [question % 2 == 0 or question < 12 for question in range(400)], [q % 2 == 0 for q in range(400)]
    found = difference(one, other)
    assert found.mean == 6 / 400 and not found.is_noise
    assert found.half < interval(one).half / 3 and mcnemar(other, one) < 0.05


@pytest.mark.parametrize(("values", "match"), [([1.0], "length 1"), ([], "length 0")])
def test_too_few_values_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        interval(values)


def test_a_difference_needs_pairs():
    with pytest.raises(ValueError, match="values has 2 runs and others 3"):
        difference([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("share", "count", "said"),
    [
        (1.5, 10, "share=1.5: must be a number, 0 to 1"),
        (float("nan"), 10, "share=nan: must be a number, 0 to 1"),
        (0.5, 0, "count=0: must be a whole number, 1 or more"),
        (0.5, 2.5, "count=2.5: must be a whole number, 1 or more"),
    ],
)
def test_what_is_no_share_of_a_count_has_no_standard_error(share, count, said):
    with pytest.raises(ValueError, match=said):
        evaluation.standard_error(share, count)


def test_the_standard_error_of_a_share():
    assert evaluation.standard_error(0.5, 100) == pytest.approx(0.05)
    assert evaluation.standard_error(0.9, 400) == pytest.approx(0.015)
    assert evaluation.standard_error(1.0, 500) == 0


def test_a_ratio_of_equal_counts_is_the_mean_and_its_interval():
    values = [0.5, 2.0, 1.0, 3.5]
    found, wanted = ratio(values, [1, 1, 1, 1]), interval(values)
    assert (found.mean, found.half, found.count) == (pytest.approx(wanted.mean), pytest.approx(wanted.half), 4)
    assert found.standard_error == pytest.approx(stats.sem(values))


def test_the_interval_of_a_ratio_contains_the_true_one_in_95_of_100_cases():
    """Texts of very different length, each with a loss per token of its own around 2."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        counts = draw.integers(1, 60, 80)
        totals = counts * draw.normal(2, 0.5, 80)
        found = ratio(totals, counts)
        held += abs(found.mean - 2) <= found.half
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(
    ("totals", "counts", "said"),
    [
        ([1.0], [1], "totals has length 1: an interval needs 2 values or more"),
        ([1.0, 2.0], [1], "totals has length 2 and counts 1: pass one of each for every text"),
        ([1.0, 2.0], [0, 0], r"counts=\[0, 0\]: must add up to more than 0"),
    ],
)
def test_what_has_no_ratio_is_refused(totals, counts, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        ratio(totals, counts)


def test_mcnemar_counts_only_what_has_changed():
    before, after = [True] * 50 + [False] * 6, [True] * 49 + [False] + [True] * 6
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 7) / 2**7)  # 6 of 7 changes were gains
    assert mcnemar(before, before) == 1 and mcnemar([False] * 3, [True] * 3) == 0.25
    with pytest.raises(ValueError, match=r"^before has length 1 and after 2"):
        mcnemar([True], [True, False])


def test_the_smallest_difference_is_found_in_four_of_five_experiments():
    """By drawing: five differences with that mean are told from zero in 80 % of cases, and half of it far less often."""
    found = interval([0.3, -0.2, 0.5, 0.1, -0.4])
    spread = found.standard_error * math.sqrt(5)
    draw = np.random.default_rng(0)

    def power(mean: float) -> float:
        values = draw.normal(mean, spread, size=(20_000, 5))
        halves = T[5] * values.std(axis=1, ddof=1) / math.sqrt(5)
        return float((abs(values.mean(axis=1)) > halves).mean())

    assert power(smallest_difference(found)) == pytest.approx(0.8, abs=0.01)
    assert power(smallest_difference(found, power=0.5)) == pytest.approx(0.5, abs=0.01)
    assert power(smallest_difference(found) / 2) < 0.4


def test_the_smallest_difference_by_a_published_table():
    """Cohen's table 2.3 has 0.80 for a paired comparison of 10 cases at d = 1 (in standard deviations of the differences)."""
    values = np.random.default_rng(1).normal(size=10)
    values = (values - values.mean()) / values.std(ddof=1)
    assert smallest_difference(interval(list(values))) == pytest.approx(1.0, abs=0.01)


def test_without_a_spread_any_difference_is_found():
    assert smallest_difference(interval([0.25, 0.25, 0.25])) == 0
    assert smallest_difference(interval([0.1, 0.2, 0.3])) > 0.1  # three values, and a lower tail of nothing


@pytest.mark.parametrize("power", [0, 0.05, 1, "lots"])
def test_a_power_that_is_none_is_refused(power):
    with pytest.raises(ValueError, match="power="):
        smallest_difference(interval([0.1, 0.2]), power)
