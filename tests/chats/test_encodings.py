"""Which encoding a file is in: found from what is certain, else refused with the place."""

import re

import pytest

from qlora_helpers.chats.encodings import to_utf8

TEXT = "question;answer\r\nWo ist die Straße?;Hier – für „dich“.\r\n"


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("utf-8", "UTF-8"), ("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("cp1252", "Windows-1252"),
    ],
)  # fmt: skip
def test_the_same_text_in_each_encoding(codec, name):
    text = to_utf8(TEXT.encode(codec))
    assert (text.content.decode("utf-8"), text.encoding, text.fault) == (TEXT, name, "")
    assert text.example == ("Straße" if codec == "cp1252" else "")


def test_utf_16_with_the_high_byte_first():
    assert to_utf8(b"\xfe\xff" + TEXT.encode("utf-16-be")).content.decode("utf-8") == TEXT


@pytest.mark.parametrize("text", ["", "plain", "\n\r\n", "日本語", "a\0b and more text"])
def test_utf_8_is_taken_as_it_is(text):
    assert to_utf8(text.encode("utf-8")).content == text.encode("utf-8")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("Где улица?".encode("cp1251"), r"^byte 1 \(0xc3\) is not UTF-8, and it is not plainly Windows-1252"),
        (
            "Dzień: Książka jest tu".encode("cp1250"),
            r"^byte 5 \(0xf1\) is not UTF-8, and it is not plainly Windows-1252",
        ),
        (b"a\x81", r"^byte 2 \(0x81\) is not UTF-8, and it is not plainly Windows-1252"),
        (b"a\x07\xe9", r"^byte 3 \(0xe9\) is not UTF-8, and it is not plainly Windows-1252"),
        ("Straße ".encode() + b"\xff", r"^byte 9 \(0xff\) is not UTF-8, though other bytes are: it is damaged"),
        (b"\xef\xbb\xbf\xff", r"^byte 1 \(0xff\) is not UTF-8$"),
        (TEXT.encode("utf-16-le"), "^it has a NUL in every few bytes, as UTF-16 without its mark"),
        (TEXT.encode("utf-16")[:-1], f"^its mark says UTF-16, but byte {2 * len(TEXT) + 1} is not UTF-16"),
    ],
)
def test_what_is_no_text_says_where(content, fault):
    text = to_utf8(content)
    assert re.search(fault, text.fault), text.fault


@pytest.mark.parametrize("text", ["¿Qué? «Sí»", "Crème brûlée à 5 €", "Größe: 3 m² à 20 °C", "L’été, c’est…", "Þæð"])
def test_western_languages_are_plainly_windows_1252(text):
    assert to_utf8(text.encode("cp1252")).content.decode("utf-8") == text
