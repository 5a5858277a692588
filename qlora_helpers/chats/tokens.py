"""Chats as tokens: the chat template, the marks of what the assistant says, and what a tokenizer cannot take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_helpers.chats.messages import Chat, half_a_pair
from qlora_helpers.chats.templates import CHUNK, TemplateError, ids_of, mark, missing_text, rendered, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_texts", "count_tokens", "faults_for", "lengths_of", "tokenized", "too_long_fault"]


def faults_for(tokenizer: PreTrainedTokenizerBase, chats: dict[int, Chat], max_length: int | None) -> dict[int, str]:
    """What is wrong with chats for this tokenizer, by their number. Of each the first thing is said."""
    faults = _faults_of_texts(chats, tokenizer)
    good = {number: chat for number, chat in chats.items() if number not in faults}
    texts, refused = rendered(good, tokenizer)
    faults |= refused
    faults |= {number: fault for number, text in texts.items() if (fault := missing_text(good[number], text))}
    if max_length is not None:
        for number, length in zip(texts, _lengths(list(texts.values()), tokenizer), strict=True):
            if length > max_length:
                faults.setdefault(number, too_long_fault(length, max_length))
    return faults


def too_long_fault(length: int, max_length: int) -> str:
    """What is wrong with a chat of too many tokens."""
    return (
        f"{length} tokens, over max_length={max_length}: the answer would be cut. Raise max_length or shorten the chat"
    )


def _faults_of_texts(chats: dict[int, Chat], tokenizer) -> dict[int, str]:
    """What is wrong with the texts of chats for this tokenizer, by the chat's number.

    A token that was added to a vocabulary without being special, such as Qwen's <think>, is text that a model writes.
    """
    places, texts, faults = [], [], {}
    for number, chat in chats.items():
        for place, message in enumerate(chat, start=1):
            if half := half_a_pair(message["content"]):
                faults.setdefault(number, f"message {place} ({message['role']}) {half}")
            else:
                places.append((number, f"message {place} ({message['role']})"))
                texts.append(message["content"])
    special = special_tokens(tokenizer)
    found = ids_of(texts, tokenizer)
    for (number, place), text, ids in zip(places, texts, found, strict=True):
        # any character may become the unknown token, which is no fault unless that itself is typed
        typed = [id for id in ids if id in special and (id != tokenizer.unk_token_id or special[id] in text)]
        if typed:
            fault = (
                f"{place} has {special[typed[0]]!r} in its text, which this tokenizer takes for a special token: leave it "
                "out, or put a space into it"
            )
            faults.setdefault(number, fault)
    return faults


def check_texts(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the tokenizer takes all that is written in the messages as plain text.

    Raises:
        ValueError: names the first chat in which a special token is typed, such as an end of turn, or half a surrogate
            pair.
    """
    if faults := _faults_of_texts(dict(enumerate(chats, start=1)), tokenizer):
        number = min(faults)
        raise ValueError(f"chat {number}: {faults[number]}")


def _texts(chats: list[Chat], tokenizer) -> list[str]:
    """Chats as the template writes them.

    Raises:
        ValueError: there is no template, or it refuses a chat.
    """
    texts, refused = rendered(dict(enumerate(chats, start=1)), tokenizer)
    if refused:
        raise _first(refused)
    return list(texts.values())


def _first(faults: dict[int, str]) -> TemplateError:
    """The error for chats that the template does not take; their faults by number."""
    number = min(faults)
    more = f" (chats with a fault like this: {len(faults):,})" if len(faults) > 1 else ""
    return TemplateError(f"chat {number}: {faults[number]}{more}")


def _lengths(texts: list[str], tokenizer) -> list[int]:
    """The number of tokens of rendered chats; not all at once, since ids take much more memory than text."""
    lengths = []
    for start in range(0, len(texts), CHUNK):
        lengths += map(len, ids_of(texts[start : start + CHUNK], tokenizer))
    return lengths


def lengths_of(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of tokens of each chat in the chat template.

    Raises:
        ValueError: there is no template, or it refuses a chat.
    """
    return _lengths(_texts(chats, tokenizer), tokenizer) if chats else []


def tokenized(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Each chat in the chat template: its "input_ids", and "assistant_masks" with a 1 for each token of an answer.

    The marks are the template's own; where it has none, they are found by comparison (`qlora_helpers.chats.templates`).

    Raises:
        ValueError: there is no template; or it refuses a chat, leaves out a message, ends no answer, or does not tell which
            tokens are the answer's. The message names the first such chat, the reason and a cure.
    """
    rows, faults = mark(dict(enumerate(chats, start=1)), tokenizer) if chats else ({}, {})
    if faults:
        raise _first(faults)
    return list(rows.values())


def count_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of a chat in the chat template."""
    return len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])
