"""Make chats fit into a number of tokens, and say what was done to them.

A trainer cuts a row that is too long at its end, and the end is the answer. Here the answer stays whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.chats.messages import Chat, ChatError
from qlora_helpers.chats.templates import ids_of
from qlora_helpers.chats.tokens import lengths_of, too_long_fault
from qlora_helpers.chats.words import UNSPACED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOO_LONG", "Fitted", "fit_to_length"]

TOO_LONG = ("stop", "drop", "cut-question")
GAP = " … "
_PIECE = re.compile(rf"\s*(?:[{UNSPACED}]|[^\s{UNSPACED}]+)")


@dataclass(frozen=True)
class Fitted:
    """What happened to chats that were made to fit.

    Attributes:
        total: the number of chats that were given.
        max_length: in tokens.
        longest: the tokens of the longest chat that was given.
        cut: the chats whose longest question lost its middle, by number (the first is 1), with the tokens of the chat before
            and after.
        dropped: the chats that were left out, by number, with the reason.
        name: what the numbers count: chats, or the rows or lines of a file.
    """

    total: int
    max_length: int
    longest: int
    cut: dict[int, tuple[int, int]] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    name: str = "chat"

    @property
    def said(self) -> str:
        """What happened, as a sentence with its counts."""
        if not (self.cut or self.dropped):
            return f"All {self.total:,} chats fit into {self.max_length:,} tokens: the longest has {self.longest:,}."
        parts = []
        if self.cut:
            lost = sum(before - after for before, after in self.cut.values())
            parts.append(
                f"in {len(self.cut):,} the middle of the longest question was cut out ({lost:,} tokens in all; beginning, end "
                f"and answers are whole; the first is {self.name} {min(self.cut)})"
            )
        if self.dropped:
            number = min(self.dropped)
            parts.append(f"{len(self.dropped):,} left out (the first is {self.name} {number}: {self.dropped[number]})")
        count = len(self.cut) + len(self.dropped)
        return f"Of {self.total:,} chats {count:,} had more than {self.max_length:,} tokens: {'; '.join(parts)}."


def fit_to_length(
    chats: list[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int, too_long: str = "stop"
) -> tuple[list[Chat], Fitted]:
    """Make each chat fit into `max_length` tokens of the chat template.

    Args:
        too_long: what to do with a chat that does not fit: "stop" refuses all; "drop" leaves it out; "cut-question" takes
            words out of the middle of its longest question and puts " … " there, so that both the beginning and the end
            of the question stay. If not even two words of it fit, the chat is left out.

    Returns:
        The chats that fit, in their order, and what happened. The given chats are not changed.

    Raises:
        ValueError: an argument has a value that is not allowed, or the chat template refuses a chat.
        ChatError: with "stop", the first 20 chats that are too long, and the number of the others; or no chat is left.
    """
    max_length = validation.whole("max_length", max_length)
    validation.one_of("too_long", too_long, TOO_LONG)
    lengths = lengths_of(chats, tokenizer)
    over = {number: length for number, length in enumerate(lengths, start=1) if length > max_length}
    if over and too_long == "stop":
        lines = [f"chat {number}: {too_long_fault(length, max_length)}" for number, length in over.items()]
        more = f"\n… and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ChatError("\n".join(lines[:20]) + more)
    cut: dict[int, tuple[Chat, int]] = {}
    if too_long == "cut-question":
        cut = _cut({number: chats[number - 1] for number in over}, over, tokenizer, max_length)
        reason = "too long even with two words of its longest question"
    else:
        reason = "too long"
    dropped = {number: f"{length:,} tokens, {reason}" for number, length in over.items() if number not in cut}
    fitted = Fitted(
        total=len(chats),
        max_length=max_length,
        longest=max(lengths, default=0),
        cut={number: (over[number], after) for number, (_, after) in cut.items()},
        dropped=dropped,
    )
    kept = [cut[number][0] if number in cut else chat for number, chat in enumerate(chats, 1) if number not in dropped]
    if chats and not kept:
        raise ChatError(f"no chat is left. {fitted.said} Raise max_length")
    return kept, fitted


def _cut(chats: dict[int, Chat], lengths: dict[int, int], tokenizer, max_length: int) -> dict[int, tuple[Chat, int]]:
    """The chats that fit once their longest question is shorter, by number, with their tokens then."""
    places = {number: _longest_question(chat) for number, chat in chats.items()}
    pieces = {number: _pieces(chats[number][places[number]]["content"]) for number in chats}
    kept = {number: len(pieces[number]) for number in chats}
    lengths, fit, tried = dict(lengths), {}, dict(chats)
    while tried:
        questions = [tried[number][places[number]]["content"] for number in tried]
        for number, of_question in zip(list(tried), map(len, ids_of(questions, tokenizer)), strict=True):
            # in proportion, and at least one fewer
            share = 1 - (lengths[number] - max_length) / max(1, of_question)
            kept[number] = min(kept[number] - 1, int(kept[number] * share))
        tried = {
            number: _with(chats[number], places[number], _shorter(pieces[number], kept[number]))
            for number in tried
            if kept[number] >= 2
        }
        lengths |= dict(zip(tried, lengths_of(list(tried.values()), tokenizer), strict=True))
        fit |= {number: (chat, lengths[number]) for number, chat in tried.items() if lengths[number] <= max_length}
        tried = {number: chat for number, chat in tried.items() if number not in fit}
    return dict(sorted(fit.items()))


def _longest_question(chat: Chat) -> int:
    questions = [place for place, message in enumerate(chat) if message["role"] == "user"]
    return max(questions, key=lambda place: len(chat[place]["content"]))


def _pieces(text: str) -> list[str]:
    """The words of a text with the white space before each; of a single long word, its characters."""
    pieces = _PIECE.findall(text)
    return pieces if len(pieces) > 2 else list(text.strip())


def _shorter(pieces: list[str], kept: int) -> str:
    """The first and the last of the pieces, `kept` in all."""
    first = (kept + 1) // 2
    return "".join(pieces[:first]) + GAP + "".join(pieces[len(pieces) - (kept - first) :]).lstrip()


def _with(chat: Chat, place: int, content: str) -> Chat:
    return [*chat[:place], chat[place] | {"content": content}, *chat[place + 1 :]]
