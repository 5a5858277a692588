"""Lesson 7's exercises: difference or noise, the error of a paired difference, a fair comparison, and a rate for an alpha."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_helpers.course.exercises.asking import Exercise, choice, function
from qlora_helpers.course.exercises.judging import ExerciseBroken
from qlora_helpers.course.exercises.reading import is_finite, one_number, shown
from qlora_helpers.statistics import difference

__all__ = ["fair_difference", "noise", "paired", "rate_for_alpha"]

# ---- 7.1

_VERDICTS = {(False, True): "A and B", (True, False): "C and D", (False, False): "both", (True, True): "neither"}


def _more_than_noise(pairs: Mapping[str, Sequence[float]]) -> str:
    is_noise = [difference(pairs[one], pairs[other]).is_noise for one, other in ("AB", "CD")]
    return _VERDICTS[tuple(is_noise)]


noise = Exercise(
    number="7.1",
    title="difference or noise, by eye",
    kind="predict",
    difficulty="medium",
    minutes=5,
    hints=(
        "The larger mean difference need not be the surer one. Subtract seed by seed, and look how much that varies.",
        "Does one of the two win at every seed, and by about as much? Or does it win and lose?",
    ),
    fault=choice(
        _more_than_noise,
        {
            "A and B": ["AB", "A, B", "A & B", "A/B"],
            "C and D": ["CD", "C, D", "C & D", "C/D"],
            "both": [],
            "neither": [],
        },
    ),
)

# ---- 7.2


def _paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    found = difference(one, other)
    return found.mean, found.standard_error


paired = Exercise(
    number="7.2",
    title="the error of a paired difference",
    kind="build",
    difficulty="medium",
    minutes=10,
    hints=(
        "Make the list of differences first. From there on only that list counts, and not the two that it came from.",
        "The standard error of a mean is the standard deviation (dividing by n - 1) over the square root of n.",
    ),
    fault=function(
        _paired,
        cases={
            "five seeds": ([0.90, 0.88, 0.93, 0.86, 0.91], [0.85, 0.87, 0.88, 0.80, 0.86]),
            "both rise and fall together": ([0.1, 0.9, 0.4, 0.7], [0.2, 0.95, 0.52, 0.81]),
            "one rises as the other falls": ([0.2, 0.4, 0.6], [0.6, 0.4, 0.2]),
            "two seeds": ([1.0, 2.0], [0.5, 0.0]),
            "the same difference everywhere": ([0.75, 0.5, 0.25], [0.5, 0.25, 0.0]),
        },
        rel=1e-6,
    ),
)

# ---- 7.3

Tries = Mapping[float, Mapping[int, tuple[float, float]]]


def _fair_difference(one: Tries, other: Tries) -> float:
    def at_its_own_rate(tries: Tries) -> Mapping[int, tuple[float, float]]:
        return max(tries.values(), key=lambda seeds: sum(validation for validation, _ in seeds.values()) / len(seeds))

    a, b = at_its_own_rate(one), at_its_own_rate(other)
    shared = sorted(a.keys() & b.keys())
    return sum(a[seed][1] - b[seed][1] for seed in shared) / len(shared)


fair_difference = Exercise(
    number="7.3",
    title="a fair comparison",
    kind="build",
    difficulty="hard",
    minutes=15,
    hints=(
        "Two steps: choose one rate for each method, on validation alone, and only then look at test results and seeds.",
        "The own rate has the highest mean validation result over its seeds. Of the seeds at the two rates, keep those that are "
        "in both.",
    ),
    fault=function(
        _fair_difference,
        cases={
            "one rate each": ({1e-3: {0: (0.5, 0.5), 1: (0.5, 0.75)}}, {1e-3: {0: (0.5, 0.25), 1: (0.25, 0.25)}}),
            "each has a rate of its own": (
                {1e-3: {0: (0.9, 0.9), 1: (0.8, 0.8)}, 5e-4: {0: (0.4, 0.4), 1: (0.3, 0.3)}},
                {1e-3: {0: (0.6, 0.6), 1: (0.7, 0.7)}, 5e-4: {0: (0.85, 0.85), 1: (0.95, 0.95)}},
            ),
            "another rate is better on the test questions": (
                {1e-3: {0: (0.9, 0.8), 1: (0.85, 0.75)}, 2e-3: {0: (0.8, 0.95), 1: (0.75, 0.9)}},
                {1e-3: {0: (0.7, 0.7), 1: (0.75, 0.65)}, 5e-4: {0: (0.6, 0.9), 1: (0.5, 0.8)}},
            ),
            "one lucky seed at a worse rate": (
                {
                    1e-3: {0: (0.99, 0.98), 1: (0.1, 0.12), 2: (0.2, 0.2)},
                    5e-4: {0: (0.8, 0.8), 1: (0.7, 0.65), 2: (0.75, 0.75)},
                },
                {1e-3: {0: (0.6, 0.6), 1: (0.65, 0.6), 2: (0.7, 0.7)}},
            ),
            "more seeds of one than of the other": (
                {1e-3: {0: (0.9, 0.9), 1: (0.8, 0.8), 2: (0.85, 0.85), 3: (0.2, 0.2), 4: (0.3, 0.3)}},
                {
                    1e-3: {0: (0.7, 0.7), 1: (0.6, 0.6), 2: (0.65, 0.65)},
                    2e-3: {0: (0.4, 0.4), 1: (0.5, 0.5), 2: (0.6, 0.6), 3: (0.7, 0.7)},
                },
            ),
            "the seeds in another order": (
                {1e-3: {2: (0.9, 0.9), 0: (0.5, 0.5)}},
                {1e-3: {0: (0.4, 0.4), 1: (0.9, 0.9), 2: (0.6, 0.6)}},
            ),
        },
        rel=1e-6,
    ),
)

# ---- 7.4

_LOW_ENOUGH = 0.9  # at 2e-3 the run ends at about 2.2, at 6e-5 at about 3.2


def _fault_of_rate(answer: Any, loss_after: Callable[[float], float]) -> str:
    found = one_number(answer)
    if isinstance(found, str):
        return found
    rate = float(found[0])
    if not (is_finite(rate) and 0 < rate < 1):
        return f"your answer is {shown(rate)}, and a learning rate lies between 0 and 1."
    try:
        loss = loss_after(rate)
    except (RuntimeError, ValueError) as error:  # such as TrainingDiverged: a rate may be that high
        return f"at {rate:g} the run broke off ({str(error).splitlines()[0]:.100})."
    if not is_finite(one_number(loss)[0]):
        raise ExerciseBroken(f"loss_after({rate!r}) gave {loss!r}")
    if loss <= _LOW_ENOUGH:
        return ""
    return f"at {rate:g} the run ends with a validation loss of {loss:.2f}, which is more than {_LOW_ENOUGH}."


rate_for_alpha = Exercise(
    number="7.4",
    title="an alpha that is far too large",
    kind="run",
    difficulty="medium",
    minutes=10,
    hints=(
        "Alpha multiplies what the adapter adds. If it multiplies more, how far should a step go? Do not go too low, either.",
        "The usual rate was chosen with another alpha. Keep alpha times learning rate about as large as it was there.",
    ),
    fault=_fault_of_rate,
)
