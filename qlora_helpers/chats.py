"""Read and check chat data: JSONL, one chat per line, in the `messages` format.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

Every line is checked, and a file with a bad one is refused as a whole: nothing is dropped silently. The error names the
first 20 bad lines by number, each with its first fault, and counts the others.
"""

from __future__ import annotations

import codecs
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
    "check_texts",
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
    """The first thing that is wrong with one decoded line of a chat file; None if nothing is."""
    if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list) or not chat["messages"]:
        return f"no messages: expected {FORM} with at least one message"
    previous = None
    for number, message in enumerate(chat["messages"], start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f'message {number} is not {{"role": "…", "content": "…"}}'
        role, content = message.get("role"), message["content"]
        if role not in ROLES:
            return f"message {number} has the unknown role {validation.shown(role)}: use one of {', '.join(ROLES)}"
        if role == "system" and number > 1:
            return f"message {number} has the role 'system', which may only come first"
        if role == previous:
            return f"messages {number - 1} and {number} both have the role {role!r}"
        if not content.strip():
            return f"message {number} ({role}) is an empty {'answer' if role == 'assistant' else 'message'}"
        if role == "assistant" and previous != "user":
            return f"message {number} is an answer without a question"
        if half := _half_a_pair(content):
            return f"message {number} ({role}) {half}"
        previous = role
    if previous != "assistant":
        return "the last message is not an answer: there is nothing to learn from this chat"
    return None


def _half_a_pair(text: str) -> str:
    """What is wrong with a text that no tokenizer takes; "" if nothing is. JSON allows it, as \\ud83d without its other half."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start]).strip("'")
        return f"has half a surrogate pair ({half}) at character {error.start + 1}: replace it by the character that was meant"
    return ""


def read_chats(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> list[Chat]:
    """Read a chat file and check every line.

    Args:
        path: a JSONL file in UTF-8. Empty lines are allowed.
        tokenizer: with it, three more things are faults: a special token that is typed into a message, a chat that the
            chat template refuses, and one that is too long.
        max_length: in tokens. A longer chat is a fault, since the trainer would cut its answer.

    Returns:
        The chats, each a list of messages.

    Raises:
        ChatError: bad lines, the first 20 of them by file, line number and first fault, and the number of the others; or
            no chat at all.
        ValueError: `max_length` without a tokenizer, or not a positive whole number; or the tokenizer has no chat
            template.
        OSError: the file cannot be read.
    """
    if max_length is not None and tokenizer is None:
        raise ValueError(f"max_length={validation.shown(max_length)} is counted in tokens: pass the tokenizer too")
    if max_length is not None:
        max_length = validation.whole("max_length", max_length, otherwise="None for any length")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        cure = "name a JSONL file, one chat per line"
        raise type(error)(f"path={str(path)!r} cannot be read ({error.strerror}): {cure}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ChatError(f"path={str(path)!r}: this file is in UTF-16: save it in UTF-8")
    chats: dict[int, Chat] = {}
    faults: dict[int, str] = {}
    # as bytes: str.splitlines would also split at characters such as U+2028, which JSON allows inside a string
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        row, fault = _decoded(line)
        if fault := fault or fault_in(row):
            faults[number] = fault
        else:
            chats[number] = row["messages"]
    if tokenizer is not None:
        faults |= _faults_for(tokenizer, chats, max_length)
    if faults:
        lines = [f"{path}, line {number}: {fault}" for number, fault in sorted(faults.items())]
        more = f"\n… and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ChatError("\n".join(lines[:20]) + more)
    if not chats:
        raise ChatError(f"path={str(path)!r}: there is no chat in this file. Each line must be one: {FORM}")
    return list(chats.values())


class _NotJson(ValueError):
    """What Python's parser would take, and JSON does not have."""


def _no_constant(name: str) -> None:
    raise _NotJson(f"not JSON: {name} is no value of JSON")


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):  # the parser would keep the last value alone
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _NotJson(f"not JSON that can be trusted: the key {validation.shown(twice)} is there twice")
    return row


def _decoded(line: bytes) -> tuple[object, str | None]:
    """One line as Python objects, and what is wrong with it as JSON."""
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_each_key_once), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}"
    except _NotJson as error:
        return None, str(error)
    except RecursionError:
        return None, "not JSON that Python reads: it is nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        return None, f"not JSON that Python reads: {str(error).partition(';')[0]}"


def _faults_for(tokenizer, chats: dict[int, Chat], max_length: int | None) -> dict[int, str]:
    """What is wrong with chats for this tokenizer, by line number."""
    faults = _faults_of_texts(chats, tokenizer)
    good = {number: chat for number, chat in chats.items() if number not in faults}
    try:
        lengths = dict(zip(good, lengths_of(list(good.values()), tokenizer), strict=True))
    except _TemplateError:  # find out which chats it is
        refused = _refused(good, tokenizer)
        faults |= refused
        lengths = {number: count_tokens(chat, tokenizer) for number, chat in good.items() if number not in refused}
    for number, length in lengths.items():
        if max_length is not None and length > max_length:
            faults[number] = (
                f"{length} tokens, over max_length={max_length}: the answer would be cut. Raise max_length or shorten the chat"
            )
    return faults


def _faults_of_texts(chats: dict[int, Chat], tokenizer) -> dict[int, str]:
    """What is wrong with the texts of chats for this tokenizer, by the chat's number.

    A token that was added to a vocabulary without being special, such as Qwen's <think>, is text that a model writes.
    """
    places, texts, faults = [], [], {}
    for number, chat in chats.items():
        for place, message in enumerate(chat, start=1):
            if half := _half_a_pair(message["content"]):
                faults.setdefault(number, f"message {place} ({message['role']}) {half}")
            else:
                places.append((number, f"message {place} ({message['role']})"))
                texts.append(message["content"])
    special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    found = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
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


class _TemplateError(ValueError):
    """The chat template refuses a chat."""


def _refused(chats: dict[int, Chat], tokenizer) -> dict[int, str]:
    """What the chat template says of the chats that it refuses, by their number."""
    refused = {}
    for number, chat in chats.items():
        try:
            tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception as error:  # a template is a program, and may fail in any way
            said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            refused[number] = f"the chat template refuses it: {' '.join(said.split())}"
    return refused


def _encoded(chats: list[Chat], tokenizer, masks: bool = False):
    """Chats in the chat template; one call for all is twice as fast as one for each.

    Raises:
        ValueError: there is no template; or it refuses a chat, whose number is named.
    """
    if not tokenizer.chat_template:
        raise ValueError("tokenizer.chat_template is not set: take the tokenizer of a model that was made for chats")
    try:
        return tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=masks)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"tokenizer.chat_template is no Jinja template: {error} (line {error.lineno})") from error
    except Exception as error:  # as in `_refused`; where no chat is to blame, it is raised as it is
        refused = _refused(dict(enumerate(chats, start=1)), tokenizer)
        if not refused:
            raise
        raise _TemplateError(f"chat {min(refused)}: {refused[min(refused)]}") from error


def lengths_of(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of tokens of each chat in the chat template.

    Raises:
        ValueError: there is no template, or it refuses a chat.
    """
    return [len(ids) for ids in _encoded(chats, tokenizer)["input_ids"]] if chats else []


def tokenized(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Each chat in the chat template: its "input_ids", and "assistant_masks" with a 1 for each token of an answer.

    Raises:
        ValueError: there is no template, or it refuses a chat.
    """
    if not chats:
        return []
    encoded = _encoded(chats, tokenizer, masks=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [{"input_ids": ids, "assistant_masks": masks} for ids, masks in pairs]


def count_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of a chat in the chat template."""
    return len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])


def split_question(chat: Chat) -> tuple[Chat, str]:
    """The messages before the last answer, and that answer."""
    return chat[:-1], chat[-1]["content"]
