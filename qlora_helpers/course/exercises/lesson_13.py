"""Lesson 13's exercises: an alpha for rsLoRA's scale, an adapter for the usual base, seeds for a verdict, and bits in a deal."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_helpers.course.exercises.asking import Exercise, function, number
from qlora_helpers.course.exercises.reading import is_finite, one_number, shown
from qlora_helpers.statistics import Interval, smallest_difference

if TYPE_CHECKING:
    import torch

__all__ = ["alpha_of_plain_lora", "as_plain", "bits_of_deal", "seeds"]

# ---- 13.1

alpha_of_plain_lora = Exercise(
    number="13.1",
    title="which alpha?",
    kind="predict",
    difficulty="easy",
    minutes=3,
    hints=(
        "Compute rsLoRA's scale first: alpha over the root of the rank.",
        "Plain LoRA's scale is alpha over the rank. Which alpha, divided by 16, is that scale?",
    ),
    fault=number(128),
)

# ---- 13.2

_SHAPES = {"one row and one column": (1, 5, 4), "rank 3": (3, 8, 6), "rank 4, more outputs than inputs": (4, 6, 16)}


def _fault_of_plain(answer: Any) -> str:
    import torch

    if not callable(answer):
        return f"a function is needed, and your answer is {shown(answer)}."
    dice = torch.Generator().manual_seed(0)
    for case, (rank, inputs, outputs) in _SHAPES.items():
        A0, A = (torch.randn(rank, inputs, generator=dice) for _ in range(2))
        B0, B = (torch.randn(outputs, rank, generator=dice) for _ in range(2))
        given = [A0, B0, A, B]
        got = answer(*(matrix.clone() for matrix in given))
        if fault := _fault_of_pair(got, B @ A - B0 @ A0, 2 * rank):
            return f"in the case “{case}” {fault}"
    return ""


def _fault_of_pair(got: Any, wanted: torch.Tensor, rank: int) -> str:
    import torch

    outputs, inputs = wanted.shape
    if not isinstance(got, tuple | list) or len(got) != 2 or not all(isinstance(one, torch.Tensor) for one in got):
        if got is ... or (isinstance(got, tuple | list) and ... in got):
            raise TypeError("ellipsis")
        return f"two matrices are needed, and it returns {shown(got)}."
    if (found := [tuple(one.shape) for one in got]) != [(rank, inputs), (outputs, rank)]:
        return f"the shapes are {found[0]} and {found[1]}; they must be {(rank, inputs)} and {(outputs, rank)}."
    if not torch.allclose(got[1] @ got[0], wanted, rtol=1e-4, atol=1e-4):
        return "the product of the two is not B @ A - B0 @ A0."
    return ""


as_plain = Exercise(
    number="13.2",
    title="an adapter for the usual base",
    kind="build",
    difficulty="medium",
    minutes=10,
    hints=(
        "A product of matrices is a sum over the inner index. So two products can be written as one, whose inner index runs first over "
        "the one and then over the other.",
        "Put A and A0 on top of each other, and B and B0 side by side. Then find a place for the minus.",
    ),
    fault=_fault_of_plain,
)

# ---- 13.3


def _seeds(pairs: Sequence[float]) -> int:
    from scipy import stats

    mean, spread = statistics.fmean(pairs), statistics.stdev(pairs)
    count = 2
    while True:
        half = float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
        if smallest_difference(Interval(0.0, half, count)) <= abs(mean):
            return count
        count += 1


def _fault_of_seeds(answer: Any, pairs: Sequence[float]) -> str:
    found = one_number(answer)
    if isinstance(found, str):
        return found
    given = float(found[0])
    if not is_finite(given) or given != round(given) or given < 2:
        return f"your answer is {shown(given)}, and it must be a whole number of seeds, 2 or more."
    wanted = _seeds(pairs)
    if given == wanted:
        return ""
    return f"with {given:.0f} seeds " + (
        "a true difference of this size would be missed too often."
        if given < wanted
        else "it would be found; but fewer seeds are enough."
    )


seeds = Exercise(
    number="13.3",
    title="seeds for a verdict",
    kind="run",
    difficulty="hard",
    minutes=15,
    hints=(
        "`smallest_difference` of an interval says what a comparison with its count of seeds would show. Five seeds would show more than "
        "the mean of the pairs; how does that number fall with the count?",
        "The standard deviation of the pairs stays; for each count make the Interval that it would give, and take the first count whose "
        "smallest difference is no larger than the mean of the pairs.",
    ),
    fault=_fault_of_seeds,
)

# ---- 13.4


def _bits_of_deal(answers: Sequence[str]) -> float:
    ways = math.lgamma(len(answers) + 1) - sum(math.lgamma(n + 1) for n in Counter(answers).values())
    return ways / math.log(2)


bits_of_deal = Exercise(
    number="13.4",
    title="bits in a deal",
    kind="build",
    difficulty="medium",
    minutes=10,
    hints=(
        "If all answers differed, there would be n! ways. Two people with the same answer can be exchanged, and the deal is still the "
        "same: so how often was each way counted?",
        "The number of ways is n! over the product of c!, with c for how often each answer occurs. Take logarithms: products "
        "become sums. Then divide by the logarithm of 2.",
    ),
    fault=function(
        _bits_of_deal,
        cases={
            "three answers that differ": (["red", "green", "blue"],),
            "two alike and one other": (["red", "red", "blue"],),
            "all alike": (["red"] * 6,),
            "one person": (["red"],),
            "a thousand answers of four kinds": (["red", "green", "blue", "blue"] * 250,),
        },
        rel=1e-5,
    ),
)
