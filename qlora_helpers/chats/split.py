"""Hold chats out of training: which of them, so that none is a copy of one that is trained on."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable

from qlora_helpers import validation
from qlora_helpers.chats.messages import Chat, check_chats

__all__ = ["shared_questions", "split"]


def split(chats: list[Chat], share: float, seed: int = 0) -> tuple[list[Chat], list[Chat]]:
    """Split chats into those to train on and those to validate on, each in the order that they had.

    Chats that begin with the same question stay on one side, whatever their answers: a model that has seen one of them
    would look better on the other than it is. Two questions are the same if all that comes before the first answer is,
    but for upper case and spaces. The side of a question depends on its text and the seed, not on the order of the chats.

    Args:
        share: of the chats that are held out, more than 0 and less than 1. At least one chat is held out, and one is
            left. Fewer than the share are held out where a question comes so often that it would be too many.
        seed: another one holds out other chats.

    Returns:
        (training chats, validation chats)

    Raises:
        ValueError: the share is out of its bounds, a chat is none, or there are not two different questions.
    """
    share = validation.number("share", share, above=0, below=1)
    seed = validation.whole("seed", seed, at_least=0)
    check_chats(chats)
    rows_of = defaultdict(list)
    for row, chat in enumerate(chats):
        rows_of[_question(chat)].append(row)
    if len(rows_of) < 2:
        raise ValueError(
            f"share={share:g}: the {len(chats)} chats have {len(rows_of)} different questions, and chats with the same question "
            "stay together. Two are needed, one to train on and one to hold out"
        )
    most = min(max(1, round(share * len(chats))), len(chats) - 1)
    held_out: set[int] = set()
    drawn = sorted(rows_of, key=lambda question: _drawn(question, seed))
    for question in drawn:
        if len(held_out) + len(rows_of[question]) <= most:
            held_out.update(rows_of[question])
    if not held_out:  # every question comes too often
        held_out.update(min((rows_of[question] for question in drawn), key=len))
    training = [chat for row, chat in enumerate(chats) if row not in held_out]
    return training, [chats[row] for row in sorted(held_out)]


def shared_questions(training: list[Chat], held_out: list[Chat]) -> int:
    """How many of the held-out chats begin with a question that a training chat begins with, too."""
    trained_on = {_question(chat) for chat in training}
    return sum(_question(chat) in trained_on for chat in held_out)


def _question(chat: Chat) -> Hashable:
    """What comes before the first answer."""
    asked = []
    for message in chat:
        if message["role"] == "assistant":
            break
        asked.append((message["role"], " ".join(message["content"].split()).casefold()))
    return tuple(asked)


def _drawn(question: Hashable, seed: int) -> bytes:
    """A number that looks random: the same on every machine and with every version of Python."""
    return hashlib.sha256(json.dumps([seed, question]).encode()).digest()
