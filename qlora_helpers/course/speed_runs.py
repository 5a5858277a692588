"""The runs of `data/measured/speed.json` in words: their labels are made for the measuring script, and not for readers."""

from __future__ import annotations

import re

__all__ = ["in_words"]

_WHO = {"articles": "the articles' recipe", "trl": "TRL", "ours": "this course", "unsloth": "Unsloth"}
_CHATS = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")


def in_words(label: str) -> tuple[str, str]:
    """The chats of a step, and how the run was made: `4x2048 full ours compiled` is ("4 of 2,048", "this course, compiled").

    Args:
        label: of a row, without the model and the gear in front. In its first word are the chats that go through the model
            at once, the most tokens of a chat and, where there are several, the passes of a step.

    Raises:
        ValueError: the label is not made like this.
    """
    size, *rest = label.split()
    found = _CHATS.fullmatch(size)
    if found is None or len(rest) < 2 or rest[0] not in ("full", "mixed") or rest[1] not in _WHO:
        raise ValueError(
            f"label={label!r}: must be such as '4x2048 full ours compiled', without the model and the gear"
        )
    batch, length, passes = found.groups()
    chats = f"{batch} of {'up to ' if rest[0] == 'mixed' else ''}{int(length):,}"
    return f"{passes} x {chats}" if passes else chats, ", ".join([_WHO[rest[1]], *map(_option, rest[2:])])


def _option(word: str) -> str:
    if word == "in-auto":
        return "budget: what is free"
    if word.endswith("16-bit"):
        return "16 bits" if word == "16-bit" else "4 bits once more"
    if budget := re.fullmatch(r"in-([\d.]+)GiB", word):
        return f"budget of {budget[1]} GiB"
    return word.replace("-of-", " of ").replace("none-", "none ") + (" checkpointed" if "-of-" in word else "")
