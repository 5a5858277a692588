"""Lesson 8's exercises: the limit of a spike, a run to be cured, a look at one row, and three curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qlora_helpers.course.exercises.asking import Exercise, choice, function
from qlora_helpers.course.exercises.reading import shown
from qlora_helpers.settings import Settings
from qlora_helpers.training.spikes import NATS, SHARE, SPREADS

__all__ = ["causes", "cured", "fault_in_a_row", "limit", "three_curves"]

# ---- 8.1


def _limit(before: Sequence[float]) -> float:
    usual = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(loss - usual) for loss in before)
    return usual + max(SPREADS * spread, SHARE * usual, NATS)


limit = Exercise(
    number="8.1",
    title="the limit of a spike",
    kind="build",
    difficulty="medium",
    minutes=10,
    hints=(
        "statistics.median does it twice: once of the losses, and once of how far each of them is from the first result.",
        "Compute the three candidates, and let max choose. In a quiet run it is another one than in a noisy run.",
    ),
    fault=function(
        _limit,
        cases={
            "losses that vary": ([2.0, 2.2, 1.9, 2.1, 2.4],),
            "high losses that hardly vary": ([4.0, 4.01, 3.99, 4.02, 4.0],),
            "low losses that hardly vary": ([0.3, 0.31, 0.29, 0.3, 0.32],),
            "one odd batch among them": ([1.0, 1.1, 0.9, 9.0, 1.05],),
            "an even number of losses": ([1.2, 2.6, 1.9, 3.3],),
            "a falling loss": ([5.4, 5.1, 4.1, 2.9, 1.8, 1.0, 0.7],),
        },
        rel=1e-6,
    ),
)

# ---- 8.2

_STEPS_AT_THE_END, _LOW_ENOUGH = 3, 2.5
_FIXED = ("optimizer", "steps", "batch_size")


def _fault_of_cure(answer: Any, sick: Settings, losses_of: Callable[[Settings], Sequence[tuple[int, float]]]) -> str:
    if not isinstance(answer, Settings):
        return f"your answer is {shown(answer)}, and no Settings: write replace(sick, …) with what you change."
    mine, given = asdict(answer), asdict(sick)
    if changed := [name for name in _FIXED if mine[name] != given[name]]:
        return f"you have changed {changed[0]}, which is to stay as it is."
    losses = [loss for _, loss in losses_of(answer)]
    if len(losses) < answer.steps:
        return (
            f"your run broke off: it has {len(losses)} losses instead of {answer.steps}, so it diverged or did not log."
        )
    end = statistics.mean(losses[-_STEPS_AT_THE_END:])
    if end <= _LOW_ENOUGH:
        return ""
    said = f"the last {_STEPS_AT_THE_END} losses of your run have a mean of {end:.1f}"
    highest = max(losses)
    if not math.isfinite(end) or highest > 1.5 * losses[0]:
        return f"{said}, and it went up to {highest:.1f}: it still diverges."
    return f"{said}, which is not low enough. It has not leapt: is the rate still too high, or too low now?"


cured = Exercise(
    number="8.2",
    title="a run to be cured",
    kind="run",
    difficulty="medium",
    minutes=10,
    hints=(
        "AdamW takes a step that hardly depends on how long the gradient is. So what decides how far it goes?",
        "Neither a warm-up nor clipping is enough. Lower the rate by a factor of 3, and again, until the run learns.",
    ),
    fault=_fault_of_cure,
)

# ---- 8.3


def _fault_in_a_row(ids: Sequence[int], labels: Sequence[int], first: int, closing: int) -> str:
    if list(ids).count(first) > 1:
        return "two first tokens"
    if labels[-1] != closing:
        return "the end is not learnt"
    return "the question is learnt" if labels[0] != -100 else ""


_ROW = [1, 4, 20, 21, 2, 5, 30, 31, 2]  # 1 begins, 2 closes a message, 4 and 5 are the roles
_TWO_ANSWERS = [*_ROW, 4, 22, 2, 5, 32, 2]

fault_in_a_row = Exercise(
    number="8.3",
    title="a look at one row, by code",
    kind="build",
    difficulty="medium",
    minutes=10,
    hints=(
        "Three questions in this order, each with its own return: how often is `first` there, and what are two labels?",
        "The closing token also ends the question, so it may be there and yet not be learnt. Look at the labels, by place.",
    ),
    fault=function(
        _fault_in_a_row,
        cases={
            "a row as it should be": (_ROW, [*[-100] * 6, 30, 31, 2], 1, 2),
            "the first token twice": ([1, *_ROW], [*[-100] * 7, 30, 31, 2], 1, 2),
            "the first token twice, and all learnt": ([1, *_ROW], [1, *_ROW], 1, 2),
            "a cut answer": (_ROW[:-1], [*[-100] * 6, 30, 31], 1, 2),
            "a closing token that does not count": (_ROW, [*[-100] * 6, 30, 31, -100], 1, 2),
            "two answers, and only the first one's end counts": (
                _TWO_ANSWERS, [*[-100] * 6, 30, 31, 2, *[-100] * 4, 32, -100], 1, 2,
            ),
            "everything is learnt": (_ROW, _ROW, 1, 2),
            "nothing is learnt": (_ROW, [-100] * 9, 1, 2),
            "other numbers for the tokens": ([7, 3, 9], [-100, 3, 9], 7, 9),
        },
    ),
)  # fmt: skip

# ---- 8.4

_CURVES = {  # letter: the row of data/measured/stability.json, and what its curve shows
    "A": ("5 times the rate, no warm-up", "rate too high"),
    "B": ("the end outside of the mark", "looks healthy"),
    "C": ("collator, a pad of its own", "question learnt"),  # its collator learns all tokens
}
_CAUSES = {
    "rate too high": ["too high", "high rate"],
    "rate too low": ["too low", "low rate"],
    "question learnt": ["question", "the question is learnt", "loss on the question"],
    "looks healthy": ["healthy", "it looks healthy"],
}


def three_curves(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """The losses of three runs under the letters that the exercise uses.

    Args:
        rows: of `data/measured/stability.json`, by their names.
    """
    return {letter: rows[name]["losses"] for letter, (name, _) in _CURVES.items()}


def _fault_of_causes(answer: Any) -> str:
    if isinstance(answer, list | tuple) and len(answer) == len(_CURVES):
        answer = dict(zip(_CURVES, answer, strict=True))
    if not isinstance(answer, Mapping) or {str(key).strip().upper() for key in answer} != set(_CURVES):
        return f"your answer is {shown(answer)}, and not a dictionary with a cause for A, B and C."
    given = {str(key).strip().upper(): value for key, value in answer.items()}
    for letter, (_, cause) in _CURVES.items():
        if wrong := choice(cause, _CAUSES)(given[letter]):
            return f"{letter}: {wrong}"
    return ""


causes = Exercise(
    number="8.4",
    title="three curves",
    kind="predict",
    difficulty="medium",
    minutes=5,
    hints=(
        "Three things to look at: where a curve begins, how far down it comes, and whether it comes up again.",
        "What nobody can guess keeps a loss high without any leap. And some faults in the data do not show in a loss.",
    ),
    fault=_fault_of_causes,
)
