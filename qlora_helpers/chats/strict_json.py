"""JSON that can be trusted: what Python's parser would take, and JSON does not have, is refused.

NaN and Infinity are no values of JSON, and of a key that is there twice the parser would keep the last value alone.
"""

from __future__ import annotations

import json
import re

from qlora_helpers import validation

__all__ = ["NotJson", "decode", "decode_all", "decode_bytes", "quoted"]


class NotJson(ValueError):
    """A text is not JSON, or none that can be trusted; the message says why."""


def _no_constant(name: str) -> None:
    raise NotJson(f"not JSON: {name} is no value of JSON")


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise NotJson(f"not JSON that can be trusted: the key {validation.shown(twice)} is there twice")
    return row


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_each_key_once)
_SPACE = re.compile(r"[ \t\n\r]*")


def _explained(error: Exception) -> NotJson:
    """What Python's parser says, in a message of ours."""
    if isinstance(error, NotJson):
        return error
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return NotJson(f"not JSON: {error.msg} at {place}")
    if isinstance(error, RecursionError):
        return NotJson("not JSON that Python reads: it is nested too deeply")
    return NotJson(f"not JSON that Python reads: {str(error).partition(';')[0]}")  # a number of thousands of digits


def decode(text: str) -> object:
    """One value.

    Raises:
        NotJson: says what is wrong, and where.
    """
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _explained(error) from error


def decode_bytes(line: bytes) -> object:
    """One value in UTF-8.

    Raises:
        NotJson: says what is wrong, and where.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 at byte {error.start + 1}") from error
    return decode(text)


def decode_all(text: str) -> list[object]:
    """Values one after another, over any number of lines.

    Raises:
        NotJson: says what is wrong, and where.
    """
    values, end = [], _SPACE.match(text).end()
    try:
        while end < len(text):
            value, end = _DECODER.raw_decode(text, end)
            values.append(value)
            end = _SPACE.match(text, end).end()
    except (ValueError, RecursionError) as error:
        raise _explained(error) from error
    return values


def quoted(name: str) -> str:
    """A name from a file for a message: in double quotes, on one line, cut if it is long."""
    return json.dumps(name if len(name) <= 60 else f"{name[:60]}…", ensure_ascii=False)
