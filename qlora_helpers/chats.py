"""Read and check chat data: JSONL, one chat per line, in the `messages` format.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

Every bad line is reported with its file, its number and what is wrong. Nothing is dropped silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from qlora_helpers import validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Chat",
    "ChatError",
    "count_tokens",
    "fault_in",
    "lengths_of",
    "read_chats",
    "split_question",
    "tokenized",
]

ROLES = ("system", "user", "assistant")
Chat = list[dict[str, str]]
FORM = '{"messages": [...]}'


class ChatError(ValueError):
    """A chat file with bad lines; the message names them."""


def fault_in(chat: object) -> str | None:
    """What is wrong with one decoded line of a chat file; None if nothing is."""
    if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list) or not chat["messages"]:
        return f"no messages: expected {FORM} with at least one message"
    previous = None
    for number, message in enumerate(chat["messages"], start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f'message {number} is not {{"role": "…", "content": "…"}}'
        role, content = message.get("role"), message["content"]
        if role not in ROLES:
            return f"message {number} has the unknown role {role!r}: use one of {', '.join(ROLES)}"
        if role == "system" and number > 1:
            return f"message {number} has the role 'system', which may only come first"
        if role == previous:
            return f"messages {number - 1} and {number} both have the role {role!r}"
        if not content.strip():
            return f"message {number} ({role}) is an empty {'answer' if role == 'assistant' else 'message'}"
        if role == "assistant" and previous != "user":
            return f"message {number} is an answer without a question"
        previous = role
    if previous != "assistant":
        return "the last message is not an answer: there is nothing to learn from this chat"
    return None


def read_chats(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> list[Chat]:
    """Read a chat file and check every line.

    Args:
        path: a JSONL file. Empty lines are allowed.
        tokenizer, max_length: with both, a chat of more than `max_length` tokens is a fault too, since the trainer
            would cut its answer.

    Returns:
        The chats, each a list of messages.

    Raises:
        ChatError: bad lines, each named with file, line number and reason (the first 20 of them), or no chat at all.
        ValueError: `max_length` without a tokenizer, or not a positive whole number.
        OSError: the file cannot be read.
    """
    if max_length is not None and tokenizer is None:
        raise ValueError(f"max_length={max_length} is counted in tokens: pass the tokenizer too")
    if max_length is not None:
        max_length = validation.whole("max_length", max_length, otherwise="None for any length")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        cure = "name a JSONL file, one chat per line"
        raise type(error)(f"path={str(path)!r} cannot be read ({error.strerror}): {cure}") from error
    chats: dict[int, Chat] = {}
    faults: dict[int, str] = {}
    # as bytes: str.splitlines would also split at characters such as U+2028, which JSON allows inside a string
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            faults[number] = f"not UTF-8 at byte {error.start + 1}"
        except json.JSONDecodeError as error:
            faults[number] = f"not JSON: {error.msg} at column {error.colno}"
        else:
            if fault := fault_in(row):
                faults[number] = fault
            else:
                chats[number] = row["messages"]
    if max_length is not None:
        faults |= _too_long(chats, tokenizer, max_length)
    if faults:
        lines = [f"{path}, line {number}: {fault}" for number, fault in sorted(faults.items())]
        more = f"\n… and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ChatError("\n".join(lines[:20]) + more)
    if not chats:
        raise ChatError(f"path={str(path)!r}: there is no chat in this file. Each line must be one: {FORM}")
    return list(chats.values())


def _too_long(chats: dict[int, Chat], tokenizer, max_length: int) -> dict[int, str]:
    """What is wrong with the chats that are too long or that the chat template refuses, by line number."""
    faults, lengths = {}, {}
    try:
        lengths = dict(zip(chats, lengths_of(list(chats.values()), tokenizer), strict=True))
    except jinja2.TemplateError:  # find out which chat it is
        for number, chat in chats.items():
            try:
                lengths[number] = count_tokens(chat, tokenizer)
            except jinja2.TemplateError as error:
                faults[number] = f"the chat template refuses it: {error}"
    for number, length in lengths.items():
        if length > max_length:
            faults[number] = (
                f"{length} tokens, over max_length={max_length}: the answer would be cut. Raise max_length or shorten the chat"
            )
    return faults


def lengths_of(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of tokens of each chat in the chat template; one call for all is twice as fast as one for each."""
    return [len(ids) for ids in tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]] if chats else []


def tokenized(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Each chat in the chat template: its "input_ids", and "assistant_masks" with a 1 for each token of an answer."""
    if not chats:
        return []
    encoded = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [{"input_ids": ids, "assistant_masks": masks} for ids, masks in pairs]


def count_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of a chat in the chat template."""
    return len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])


def split_question(chat: Chat) -> tuple[Chat, str]:
    """The messages before the last answer, and that answer."""
    return chat[:-1], chat[-1]["content"]
