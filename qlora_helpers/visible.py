"""Texts of others, which may hold anything: what would command a terminal, turn a line round or hide is shown instead."""

import unicodedata

__all__ = ["harmless", "shortened", "visible"]

_JOINERS = "\u200c\u200d"  # part of words in some scripts, and of emoji
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of Unicode: controls, formats, half pairs, ends of lines


def visible(text: str) -> str:
    """A text on one line: ⏎ for the end of a line, a space for a tab, and \\x1b or \\u202e for a character without a shape."""
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join(_shown(sign) for sign in text)


def harmless(text: str) -> str:
    """A text of several lines: as `visible`, but line feeds and tabs stay."""
    return "".join(sign if sign in "\n\t" else _shown(sign) for sign in text)


def _shown(sign: str) -> str:
    if unicodedata.category(sign) not in _HIDDEN or sign in _JOINERS:
        return sign
    return sign.encode("ascii", "backslashreplace").decode() if sign > "\x7f" else f"\\x{ord(sign):02x}"


def shortened(text: str, longest: int) -> str:
    """A text of at most so many characters; a longer one is cut, and ends with how long it was."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"
