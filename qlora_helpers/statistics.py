"""Statistics for the lessons: runs that differ only in their seed, and how close values are to a normal distribution.

scipy computes all of it. It is imported where it is used, since importing it takes a second.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Interval", "difference", "excess_kurtosis", "interval", "qq_correlation"]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval: of many such intervals, 95 % contain the true mean.

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
    """The mean difference between two kinds of runs, paired by seed, so that what a seed does to both cancels out.

    Raises:
        ValueError: the two differ in length, or have fewer than two values.
    """
    if len(values) != len(others):
        raise ValueError(f"values has {len(values)} runs and others {len(others)}: pass one of each for every seed")
    return interval([a - b for a, b in zip(values, others, strict=True)])


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
