"""Statistics: runs that differ only in their seed, a model before and after training on the same cases, and how close
values are to a normal distribution.

One convention holds in the whole course:

- what is compared has a 95 % confidence interval by Student's t. What two scores share, such as their seeds or their questions,
  is subtracted pair by pair before the interval is computed (`difference`, and `ratio` of differences);
- beside each comparison stands its power: how small a difference it could have shown (`smallest_difference`);
- a score on its own, as in a report on one run, has one standard error, and says so: "± is one standard error." Two such
  errors do not tell whether the scores differ.

scipy computes all of it. It is imported where it is used, since importing it takes a second.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_helpers import validation

if TYPE_CHECKING:
    import torch

__all__ = [
    "Interval",
    "difference",
    "excess_kurtosis",
    "interval",
    "mcnemar",
    "qq_correlation",
    "ratio",
    "smallest_difference",
    "standard_error",
]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval: of many such intervals, 95 % contain the true mean.

    It says nothing about where the mean of a repeat would be: that has an error of its own, and with five values lies outside of
    the first interval in about 12 % of cases.

    Attributes:
        mean: of the values.
        half: half the width of the interval, in the unit of the values.
        count: the number of values.
    """

    mean: float
    half: float
    count: int

    @property
    def is_noise(self) -> bool:
        """Whether the interval contains zero: for a difference, that none was found."""
        return abs(self.mean) <= self.half

    @property
    def verdict(self) -> str:
        """Of a difference, in the words of all lessons: "within noise" or "a difference"."""
        return "within noise" if self.is_noise else "a difference"

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, in the unit of the values."""
        from scipy import stats

        return self.half / float(stats.t.ppf(0.975, self.count - 1))


def interval(values: Sequence[float]) -> Interval:
    """The mean of some values and its 95 % confidence interval by Student's t, which assumes a normal distribution.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy import stats

    if len(values) < 2:
        raise ValueError(f"values has length {len(values)}: an interval needs 2 values or more")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return Interval(statistics.fmean(values), float(half), len(values))


def difference(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean difference between two kinds of scores, paired by what they share: runs by their seed, or the right and wrong
    answers of two models by their question. So what a seed or a question does to both cancels out.

    Args:
        values, others: in the same order of seeds, or of questions.

    Raises:
        ValueError: the two differ in length, or have fewer than two values.
    """
    if len(values) != len(others):
        raise ValueError(
            f"values has {len(values)} runs and others {len(others)}: pass one of each for every seed or question"
        )
    return interval([a - b for a, b in zip(values, others, strict=True)])


def smallest_difference(found: Interval, power: float = 0.8) -> float:
    """How large a true difference would have to be for an experiment like this one to find it as often as `power` says.

    An experiment finds a difference if its 95 % interval does not contain zero. With n values that spread as these do, and a
    true mean d, t = mean / standard error has a noncentral t distribution with n - 1 degrees of freedom and the
    noncentrality d / standard error (Cohen, Statistical Power Analysis, 2nd ed., chapter 2). Differences below this size may
    be there although none was found.

    Args:
        found: of `difference` or `interval`; its spread is what counts, not its mean.
        power: more than 0.05 and less than 1: in this share of experiments it would be found.

    Returns:
        The difference, in the unit of the values.

    Raises:
        ValueError: the power is out of its bounds.
    """
    from scipy import optimize, stats

    power = validation.number("power", power, above=0.05, below=1)
    if not found.half:
        return 0.0
    freedom = found.count - 1
    limit = float(stats.t.ppf(0.975, freedom))

    def missed(noncentrality: float) -> float:
        wrong_way = float(stats.nct.cdf(-limit, freedom, noncentrality))  # scipy has no value where it is as good as 0
        return (
            power - float(stats.nct.sf(limit, freedom, noncentrality)) - (0.0 if math.isnan(wrong_way) else wrong_way)
        )

    upper = limit
    while missed(upper) > 0:
        upper *= 2
    return float(optimize.brentq(missed, 0.0, upper)) * found.standard_error


def standard_error(share: float, count: int) -> float:
    """The standard error of a share measured on `count` independent cases: sqrt(share (1 - share) / count).

    Raises:
        ValueError: the share is not from 0 to 1, or the count is no positive whole number.
    """
    share, count = validation.number("share", share, at_least=0, at_most=1), validation.whole("count", count)
    return math.sqrt(share * (1 - share) / count)


def ratio(totals: Sequence[float], counts: Sequence[float]) -> Interval:
    """The sum of all totals over the sum of all counts, such as a loss per token, and its 95 % confidence interval.

    The tokens of one text are not independent of one another, so what varies is taken to be the text: with residuals
    e = total - ratio * count of n texts, the standard error is sqrt(n / (n - 1) * sum(e²)) / sum(counts), and the
    interval is Student's t with n - 1 degrees of freedom (Cochran, Sampling Techniques, 3rd ed., section 6.3; for scores
    of language models: Miller 2024, arXiv:2411.00640). For the difference of two models pass the differences of their
    totals.

    Raises:
        ValueError: the two differ in length, there are fewer than two, or the counts add up to nothing.
    """
    from scipy import stats

    if len(totals) != len(counts):
        raise ValueError(f"totals has length {len(totals)} and counts {len(counts)}: pass one of each for every text")
    if (n := len(totals)) < 2:
        raise ValueError(f"totals has length {n}: an interval needs 2 values or more")
    if (count := math.fsum(counts)) <= 0:
        raise ValueError(f"counts={validation.shown(list(counts))}: must add up to more than 0")
    mean = math.fsum(totals) / count
    squares = math.fsum((total - mean * one) ** 2 for total, one in zip(totals, counts, strict=True))
    error = math.sqrt(n / (n - 1) * squares) / count
    return Interval(mean, float(stats.t.ppf(0.975, n - 1)) * error, n)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """How likely a change of right answers this large is by chance alone: the exact test of McNemar, two-sided.

    Only cases that changed count: by chance, each is as likely to have become right as wrong (a binomial test with 1/2).
    1 if none has changed.

    Raises:
        ValueError: the two differ in length.
    """
    from scipy import stats

    if len(before) != len(after):
        raise ValueError(f"before has length {len(before)} and after {len(after)}: pass the same cases")
    gained = sum(not one and bool(other) for one, other in zip(before, after, strict=True))
    lost = sum(bool(one) and not other for one, other in zip(before, after, strict=True))
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def qq_correlation(values: torch.Tensor) -> float:
    """Correlation of the sorted values with the quantiles of a normal distribution; 1 for a perfect fit.

    The quantiles are taken at (k - 3/8) / (n + 1/4), k = 1 ... n (Blom).
    """
    import numpy as np
    from scipy import stats

    ordered = values.flatten().double().sort().values.cpu().numpy()
    places = (np.arange(1, len(ordered) + 1) - 0.375) / (len(ordered) + 0.25)
    return float(stats.pearsonr(ordered, stats.norm.ppf(places)).statistic)


def excess_kurtosis(values: torch.Tensor) -> float:
    """Fourth standardised moment minus 3: 0 for a normal distribution, positive for heavy tails."""
    from scipy import stats

    return float(stats.kurtosis(values.flatten().double().cpu().numpy()))
