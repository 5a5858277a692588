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

from qlora_helpers import validation
from qlora_helpers.chats.messages import FORM, Chat, ChatError, fault_in
from qlora_helpers.chats.tokens import faults_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_chats"]


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
        faults |= faults_for(tokenizer, chats, max_length)
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
