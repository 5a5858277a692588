"""Standard streams that take any character, whatever their encoding.

A pipe on Windows is in cp1252, and under LC_ALL=C all is ASCII: Python then stops at the first ✓. Here such a character is
written in plain ASCII, as a sign that means the same or as its escape (\\u8a9e).
"""

import codecs
import io
import sys

__all__ = ["take_any_character"]

PLAIN = {
    "✓": "[ok]", "✗": "[!]", "○": "( )", "·": "-", "…": "...", "–": "-", "‘": "'", "’": "'", "“": '"', "”": '"',
    "×": "x", "→": "->", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~", "█": "#", "⏎": "\\n",
}  # fmt: skip
_NAME = "qlora_helpers.plain"
# what Python sets by itself; any other way was chosen by the user, with PYTHONIOENCODING
_OF_PYTHON = ("strict", "surrogateescape", "backslashreplace")


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    """As `codecs.register_error` wants it: what to write for the characters that the encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    left_out = error.object[error.start : error.end]
    escaped = (PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in left_out)
    return "".join(escaped), error.end


codecs.register_error(_NAME, _in_plain)


def take_any_character() -> None:
    """Let standard output and error write any character, and standard input read any byte."""
    for stream, errors in ((sys.stdout, _NAME), (sys.stderr, _NAME), (sys.stdin, "replace")):
        # a notebook's streams are of another kind, and take everything
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _OF_PYTHON:
            stream.reconfigure(errors=errors)
