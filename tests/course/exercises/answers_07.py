"""Right and wrong answers to lesson 7's exercises."""

import json
import math
import statistics
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

from qlora_helpers import statistics as of_the_course
from qlora_helpers.paths import data_path
from qlora_helpers.training.callbacks import TrainingDiverged
from tests.course.exercises.tried import Tried

# ---- 7.1


def of_the_lesson() -> dict[str, list[float]]:
    """The columns that the lesson shows."""
    runs = json.loads(data_path("measured", "comparisons.json").read_text(encoding="utf-8"))["runs"]
    shown = {
        "A": ("LoRA 16 bit", 1.5e-3), "B": ("QLoRA NF4", 1.5e-3), "C": ("full fine-tuning", 4e-4),
        "D": ("QLoRA INT4 symmetric", 1.5e-3),
    }  # fmt: skip
    return {
        letter: [run["test"]["exact_match"] for run in runs if (run["kind"], run["learning_rate"]) == kind]
        for letter, kind in shown.items()
    }


PAIRS = of_the_lesson()

# ---- 7.2


def by_statistics(one, other):
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def by_numpy(one, other):
    differences = np.array(one) - np.array(other)
    return differences.mean(), differences.std(ddof=1) / np.sqrt(len(differences))


def by_torch(one, other):
    differences = torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return differences.mean(), differences.std() / len(differences) ** 0.5


def by_the_course(one, other):
    found = of_the_course.difference(one, other)
    return [found.mean, found.standard_error]


def by_covariance(one, other):
    (a, c), (_, b) = np.cov(one, other)
    return float(np.mean(one) - np.mean(other)), math.sqrt(max(a + b - 2 * c, 0.0) / len(one))


def unpaired(one, other):
    n = len(one)
    error = math.sqrt((statistics.variance(one) + statistics.variance(other)) / n)
    return statistics.mean(one) - statistics.mean(other), error


def of_the_population(one, other):
    differences = np.array(one) - np.array(other)
    return differences.mean(), differences.std() / np.sqrt(len(differences))


def the_spread(one, other):
    mean, error = by_statistics(one, other)
    return mean, error * len(one) ** 0.5


def the_interval(one, other):
    found = of_the_course.difference(one, other)
    return found.mean, found.half


def turned_round(one, other):
    return by_statistics(other, one)


def the_mean_alone(one, other):
    return by_statistics(one, other)[0]


def without_return(one, other):
    by_statistics(one, other)


# ---- 7.3


def column(seeds, place):
    return [results[place] for results in seeds.values()]


def in_two_steps(one, other):
    best = []
    for tries in (one, other):
        rate = max(tries, key=lambda rate: statistics.mean(column(tries[rate], 0)))
        best.append(tries[rate])
    seeds = set(best[0]) & set(best[1])
    return statistics.mean(best[0][seed][1] - best[1][seed][1] for seed in seeds)


def by_arrays(one, other):
    a, b = (max(tries.values(), key=lambda seeds: np.mean(column(seeds, 0))) for tries in (one, other))
    return np.mean([a[seed][1] - b[seed][1] for seed in a if seed in b])


def as_tensor(one, other):
    return torch.tensor(in_two_steps(one, other), dtype=torch.float64)


def as_fraction(one, other):
    return Fraction(in_two_steps(one, other))


def as_decimal(one, other):
    return Decimal(in_two_steps(one, other))


def at_one_rate(one, other):
    rate = next(iter(one.keys() & other.keys()))
    seeds = one[rate].keys() & other[rate].keys()
    return statistics.mean(one[rate][seed][1] - other[rate][seed][1] for seed in seeds)


def chosen_on_test(one, other):
    a, b = (max(tries.values(), key=lambda seeds: statistics.mean(column(seeds, 1))) for tries in (one, other))
    return statistics.mean(a[seed][1] - b[seed][1] for seed in a.keys() & b.keys())


def reported_on_validation(one, other):
    a, b = (max(tries.values(), key=lambda seeds: statistics.mean(column(seeds, 0))) for tries in (one, other))
    return statistics.mean(a[seed][0] - b[seed][0] for seed in a.keys() & b.keys())


def best_of_each_seed(one, other):
    def best(tries):
        seeds = {seed for scores in tries.values() for seed in scores}
        return {seed: max(scores[seed] for scores in tries.values() if seed in scores)[1] for seed in seeds}

    a, b = best(one), best(other)
    return statistics.mean(a[seed] - b[seed] for seed in a.keys() & b.keys())


def of_all_seeds(one, other):
    a, b = (max(tries.values(), key=lambda seeds: statistics.mean(column(seeds, 0))) for tries in (one, other))
    return statistics.mean(column(a, 1)) - statistics.mean(column(b, 1))


def in_the_order_given(one, other):
    a, b = (max(tries.values(), key=lambda seeds: statistics.mean(column(seeds, 0))) for tries in (one, other))
    return statistics.mean(x - y for x, y in zip(column(a, 1), column(b, 1), strict=False))


def highest_value(one, other):
    a, b = (max(tries.values(), key=lambda seeds: max(column(seeds, 0))) for tries in (one, other))
    return statistics.mean(a[seed][1] - b[seed][1] for seed in a.keys() & b.keys())


def highest_sum(one, other):
    a, b = (max(tries.values(), key=lambda seeds: sum(column(seeds, 0))) for tries in (one, other))
    return statistics.mean(a[seed][1] - b[seed][1] for seed in a.keys() & b.keys())


# ---- 7.4


def measured(rate: float) -> float:
    """The lesson's loss_after, as measured at some rates, with a straight line between their logarithms."""
    if rate > 0.05:
        raise TrainingDiverged("step 3: the loss is nan. Lower learning_rate")
    known = {2e-5: 4.571, 6e-5: 3.159, 1.25e-4: 0.631, 5e-4: 0.403, 1e-3: 0.795, 2e-3: 2.157, 1e-2: 6.533}
    rates, losses = zip(*known.items(), strict=True)
    return float(np.interp(math.log(rate), [math.log(one) for one in rates], losses))


RUN = {"loss_after": measured}

RIGHT = {
    "noise": [Tried(answer, pairs=PAIRS) for answer in ("A and B", "a and b", "AB", ["A and B"], "A & B")],
    "paired": [Tried(answer) for answer in (by_statistics, by_numpy, by_torch, by_the_course, by_covariance)],
    "fair_difference": [Tried(answer) for answer in (in_two_steps, by_arrays, as_tensor, as_fraction, as_decimal)],
    "rate_for_alpha": [
        Tried(answer, **RUN)
        for answer in (2e-3 / 16, 5e-4, np.float32(2e-4), torch.tensor(3e-4), Decimal("0.0001250"), Fraction(1, 4000))
    ],
}
WRONG = {
    "noise": [Tried(answer, says="is not right", pairs=PAIRS) for answer in ("C and D", "both", "neither")],
    "paired": [
        Tried(unpaired, says="in the case “five seeds” your function, as result 2, gives"),
        Tried(of_the_population, says="as result 2,"),
        Tried(the_spread, says="as result 2,"),
        Tried(the_interval, says="as result 2,"),
        Tried(turned_round, says="as result 1,"),
        Tried(the_mean_alone, says="and not several results"),
        Tried(without_return, says="None"),
    ],
    "fair_difference": [
        Tried(at_one_rate, says="in the case “each has a rate of its own”"),
        Tried(chosen_on_test, says="in the case “another rate is better on the test questions”"),
        Tried(reported_on_validation, says="in the case “one rate each”"),
        Tried(best_of_each_seed, says="in the case “one lucky seed at a worse rate”"),
        Tried(highest_value, says="in the case “one lucky seed at a worse rate”"),
        Tried(highest_sum, says="in the case “more seeds of one than of the other”"),
        Tried(of_all_seeds, says="in the case “more seeds of one than of the other”"),
        Tried(in_the_order_given, says="in the case “the seeds in another order”"),
    ],
    "rate_for_alpha": [
        Tried(2e-3, says="a validation loss of 2.16, which is more than 0.9", **RUN),
        Tried(2e-3 * 16, says="which is more than 0.9", **RUN),
        Tried(1e-5, says="which is more than 0.9", **RUN),
        Tried(0.1, says="the run broke off", **RUN),
        Tried(0, says="lies between 0 and 1", **RUN),
        Tried("2e-4", says="text", **RUN),
    ],
}
