"""Several options in the right order, such as a prediction for each of several cases."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qlora_helpers.course.exercises.judging import Fault, choice

__all__ = ["in_order"]


def in_order(right: Sequence[str], options: Collection[str] | Mapping[str, Collection[Any]]) -> Fault:
    """Right are these options in this order, in a list, a tuple or an array. Spelling is forgiven as in `choice`.

    What is wrong is said with how many of them are right, but not which.

    Raises:
        ValueError: as `choice` does.
    """
    right = list(right)
    judges = [choice(one, options) for one in right]
    known = [choice(option, options) for option in options]
    listed = ", ".join(map(str, options))

    def fault(answer: Any) -> str:
        if isinstance(answer, str | Mapping) or not hasattr(answer, "__len__") or not hasattr(answer, "__getitem__"):
            return f"your answer is {answer!r}, where a list of {len(right)} words is asked for."
        if len(answer) != len(right):
            return f"your answer has {len(answer)} entries, where {len(right)} are asked for."
        for one in answer:
            if all(is_not(one) for is_not in known):
                return f"your answer has {one!r} in it, which is none of: {listed}."
        hits = sum(not judge(one) for judge, one in zip(judges, answer, strict=True))
        return "" if hits == len(right) else f"{hits} of {len(right)} {'is' if hits == 1 else 'are'} right."

    return fault
