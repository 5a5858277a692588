"""Right and wrong answers to lesson 8's exercises."""

import statistics
from dataclasses import replace

import numpy as np
import torch

from qlora_helpers.settings import Settings
from tests.course.exercises.tried import Tried

# ---- 8.1


def by_statistics(before):
    usual = statistics.median(before)
    spread = 1.4826 * statistics.median([abs(loss - usual) for loss in before])
    return usual + max(8 * spread, usual / 2, 0.5)


def by_numpy(before):
    usual = np.median(before)
    return usual + max(8 * 1.4826 * np.median(np.abs(np.array(before) - usual)), 0.5 * usual, 0.5)


def by_torch(before):
    losses = torch.tensor(before, dtype=torch.float64)
    usual = losses.quantile(0.5)
    return usual + torch.stack([8 * 1.4826 * (losses - usual).abs().quantile(0.5), usual / 2, torch.tensor(0.5)]).max()


def by_sorting(before):
    def median(values):
        values, half = sorted(values), len(values) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2

    usual = median(before)
    return max(usual + 8 * 1.4826 * median([abs(x - usual) for x in before]), 1.5 * usual, usual + 0.5)


def rounded(before):
    return round(by_statistics(before), 5)


def spreads_alone(before):
    usual = statistics.median(before)
    return usual + 8 * 1.4826 * statistics.median([abs(loss - usual) for loss in before])


def without_half_of_the_usual(before):
    return max(spreads_alone(before), statistics.median(before) + 0.5)


def without_the_half_nat(before):
    return max(spreads_alone(before), 1.5 * statistics.median(before))


def by_mean_and_deviation(before):
    usual = statistics.mean(before)
    return usual + max(8 * statistics.stdev(before), usual / 2, 0.5)


def without_the_factor(before):
    usual = statistics.median(before)
    return usual + max(8 * statistics.median([abs(loss - usual) for loss in before]), usual / 2, 0.5)


def by_the_upper_middle(before):
    usual = sorted(before)[len(before) // 2]
    spread = 1.4826 * sorted(abs(loss - usual) for loss in before)[len(before) // 2]
    return usual + max(8 * spread, usual / 2, 0.5)


def the_sum(before):
    usual = statistics.median(before)
    return usual + 8 * 1.4826 * statistics.median([abs(loss - usual) for loss in before]) + usual / 2 + 0.5


def the_distance_alone(before):
    return by_statistics(before) - statistics.median(before)


# ---- 8.2

SICK = Settings(steps=12, batch_size=4, learning_rate=0.05, warmup_steps=0, max_grad_norm=None, log_steps=1)


def measured(settings: Settings) -> list[tuple[int, float]]:
    """The losses of the lesson's runs as they were measured: by the learning rate, and by little else."""
    far = settings.learning_rate * settings.alpha / 32
    for most, losses in (
        (2e-4, [5.3, 5.07, 5.14, 4.68, 5.26, 5.14, 4.59, 5.24, 5.45, 5.53, 4.8, 6.06]),
        (1e-3, [5.3, 5.07, 5.12, 4.63, 5.16, 5.03, 4.49, 5.11, 5.11, 5.31, 4.57, 5.78]),
        (3e-3, [5.3, 5.07, 5.05, 4.41, 4.69, 4.32, 3.95, 4.24, 3.16, 3.52, 3.29, 3.65]),
        (7e-3, [5.3, 5.07, 4.9, 3.88, 3.42, 2.62, 2.37, 2.66, 2.55, 2.2, 2.24, 1.59]),
        (2e-2, [5.3, 5.07, 4.67, 2.86, 2.07, 2.75, 1.77, 1.79, 1.81, 0.73, 1.15, 0.86]),
        (1e9, [5.3, 5.07, 2.59, 40.43, 30.19, 52.72, 22.74, 19.26, 19.77, 17.07, 14.9, 13.74]),
    ):
        if far <= most:
            return list(enumerate(losses[:: settings.log_steps], start=1))
    return [(1, 5.3)]


RUN = {"sick": SICK, "losses_of": measured}

# ---- 8.3


def in_order(ids, labels, first, closing):
    if ids.count(first) > 1:
        return "two first tokens"
    if labels[-1] != closing:
        return "the end is not learnt"
    return "the question is learnt" if labels[0] != -100 else ""


def by_a_table(ids, labels, first, closing):
    faults = {
        "two first tokens": sum(token == first for token in ids) > 1,
        "the end is not learnt": labels[-1] != closing,
        "the question is learnt": labels[0] != -100,
    }
    return next((name for name, found in faults.items() if found), "")


def by_numpy_ids(ids, labels, first, closing):
    ids, labels = np.array(ids), np.array(labels)
    if (ids == first).sum() >= 2:
        return "two first tokens"
    return "the end is not learnt" if labels[-1] != closing else "the question is learnt" * bool(labels[0] != -100)


def anywhere(ids, labels, first, closing):
    if ids.count(first) > 1:
        return "two first tokens"
    if closing not in labels:
        return "the end is not learnt"
    return "the question is learnt" if labels[0] != -100 else ""


def of_the_ids(ids, labels, first, closing):
    if ids.count(first) > 1:
        return "two first tokens"
    if ids[-1] != closing:
        return "the end is not learnt"
    return "the question is learnt" if labels[0] != -100 else ""


def in_another_order(ids, labels, first, closing):
    if labels[0] != -100:
        return "the question is learnt"
    if ids.count(first) > 1:
        return "two first tokens"
    return "" if labels[-1] == closing else "the end is not learnt"


def with_numbers_of_its_own(ids, labels, first, closing):
    return in_order(ids, labels, 1, 2)


def with_none(ids, labels, first, closing):
    return in_order(ids, labels, first, closing) or None


# ---- 8.4

HEALTHY, HIGH, LOW, QUESTION = "looks healthy", "rate too high", "rate too low", "question learnt"

RIGHT = {
    "limit": [Tried(answer) for answer in (by_statistics, by_numpy, by_torch, by_sorting, rounded)],
    "cured": [
        Tried(replace(SICK, **changes), **RUN)
        for changes in (
            {"learning_rate": 5e-3}, {"learning_rate": 0.01}, {"learning_rate": 6e-3, "warmup_steps": 2},
            {"learning_rate": 5e-3, "max_grad_norm": 0.3}, {"alpha": 4},
        )
    ],
    "fault_in_a_row": [Tried(answer) for answer in (in_order, by_a_table, by_numpy_ids)],
    "causes": [
        Tried({"A": HIGH, "B": HEALTHY, "C": QUESTION}),
        Tried([HIGH, HEALTHY, QUESTION]),
        Tried((HIGH, HEALTHY, QUESTION)),
        Tried({"a": "Rate too high", "b": "healthy", "c": "question"}),
        Tried({"C": "question learnt ", "B": "looks-healthy", "A": "too high"}),
    ],
}  # fmt: skip
WRONG = {
    "limit": [
        Tried(spreads_alone, says="in the case “high losses that hardly vary”"),
        Tried(without_half_of_the_usual, says="in the case “high losses that hardly vary”"),
        Tried(without_the_half_nat, says="in the case “low losses that hardly vary”"),
        Tried(by_mean_and_deviation, says="in the case “losses that vary”"),
        Tried(without_the_factor, says="in the case “losses that vary”"),
        Tried(by_the_upper_middle, says="in the case “an even number of losses”"),
        Tried(the_sum, says="in the case “losses that vary”"),
        Tried(the_distance_alone, says="in the case “losses that vary”"),
        Tried(3.28608, says="and not a function"),
    ],
    "cured": [
        Tried(SICK, says="it still diverges", **RUN),
        Tried(replace(SICK, max_grad_norm=0.3), says="it still diverges", **RUN),
        Tried(replace(SICK, warmup_steps=12, max_grad_norm=0.3), says="it still diverges", **RUN),
        Tried(replace(SICK, learning_rate=2e-4), says="is the rate still too high, or too low now?", **RUN),
        Tried(replace(SICK, steps=2), says="you have changed steps", **RUN),
        Tried(replace(SICK, optimizer="sgd"), says="you have changed optimizer", **RUN),
        Tried(replace(SICK, learning_rate=5e-3, log_steps=6), says="2 losses instead of 12", **RUN),
        Tried(0.005, says="and no Settings", **RUN),
    ],
    "fault_in_a_row": [
        Tried(anywhere, says="in the case “two answers, and only the first one's end counts”"),
        Tried(of_the_ids, says="in the case “a closing token that does not count”"),
        Tried(in_another_order, says="in the case “the first token twice, and all learnt”"),
        Tried(with_numbers_of_its_own, says="in the case “other numbers for the tokens”"),
        Tried(with_none, says="gives None"),
    ],
    "causes": [
        Tried({"A": HIGH, "B": LOW, "C": QUESTION}, says="B: "),
        Tried({"A": HEALTHY, "B": HEALTHY, "C": QUESTION}, says="A: "),
        Tried([HIGH, HEALTHY, LOW], says="C: "),
        Tried(HIGH, says="not a dictionary with a cause for A, B and C"),
    ],
}
