"""Bytes of a text file as UTF-8: which encoding they are in, found from what is certain and never from statistics.

A mark at the beginning (BOM) says UTF-8, UTF-16 or UTF-32. Without one, bytes that are right as UTF-8 are UTF-8: other
encodings practically never look like it. Windows-1252 is what Excel and Windows programs write in Western Europe and
America. Nearly any bytes can be read as it, so it is taken only where nothing speaks against it, and the caller says so.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

__all__ = ["Text", "to_utf8"]

# UTF-32 comes first: its mark begins with that of UTF-16
_MARKS = {
    codecs.BOM_UTF32_LE: ("utf-32-le", "UTF-32"),
    codecs.BOM_UTF32_BE: ("utf-32-be", "UTF-32"),
    codecs.BOM_UTF16_LE: ("utf-16-le", "UTF-16"),
    codecs.BOM_UTF16_BE: ("utf-16-be", "UTF-16"),
}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# in Western languages letters with accents stand among plain ones; text of another alphabet, read as Windows-1252, has
# hardly anything else; text of an Eastern European one has signs, such as ¹, inside of words
_LETTER = "[A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\xff]"
_NOT_WESTERN = re.compile(rf"[\xa1-\xff]{{4}}|{_LETTER}[\xa1-\xb6\xb8-\xbf\xd7\xf7]+{_LETTER}")
_WORD = re.compile(r"\w*[^\x00-\x7f\W]+\w*|[^\x00-\x7f]")


@dataclass(frozen=True)
class Text:
    """What a file says.

    Attributes:
        content: in UTF-8, without a mark. With a fault, the bytes as they are.
        encoding: the encoding of the file, as a person knows it: "UTF-8", "UTF-16", "Windows-1252".
        example: a word that shows how Windows-1252 was read; "" for other encodings.
        fault: why these bytes are no text, with the first wrong byte (counted from 1); "" if they are.
    """

    content: bytes
    encoding: str = "UTF-8"
    example: str = ""
    fault: str = ""


def to_utf8(content: bytes) -> Text:
    """The text of a file in UTF-8, and which encoding it was in."""
    if content.startswith(codecs.BOM_UTF8):
        content = content.removeprefix(codecs.BOM_UTF8)
        return Text(content, fault=_fault_in_utf8(content))
    for mark, (codec, name) in _MARKS.items():
        if content.startswith(mark):
            try:
                return Text(content.removeprefix(mark).decode(codec).encode("utf-8"), name)
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                place = error.start + len(mark) + 1
                return Text(content, name, fault=f"its mark says {name}, but byte {place} is not {name}")
    if content.count(b"\0") > len(content) / 5:
        return Text(
            content, "UTF-16", fault="it has a NUL in every few bytes, as UTF-16 without its mark has: save it in UTF-8"
        )
    fault = _fault_in_utf8(content)
    return _as_windows_1252(content, fault) if fault else Text(content)


def _fault_in_utf8(content: bytes) -> str:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} (0x{content[error.start]:02x}) is not UTF-8"
    return ""


def _as_windows_1252(content: bytes, fault: str) -> Text:
    """Bytes that are not UTF-8 as Windows-1252, or what speaks against it."""
    as_utf8 = content.decode("utf-8", "surrogateescape")
    if any(sign > "\x7f" and not "\udc80" <= sign <= "\udcff" for sign in set(as_utf8)):
        return Text(
            content, fault=f"{fault}, though other bytes are: it is damaged, or in another encoding. Save it in UTF-8"
        )
    unknown = f"{fault}, and it is not plainly Windows-1252 either: save the file in UTF-8"
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return Text(content, fault=unknown)
    if _CONTROL.search(text) or _NOT_WESTERN.search(text):
        return Text(content, fault=unknown)
    return Text(text.encode("utf-8"), "Windows-1252", _WORD.search(text)[0][:40])
