"""What a terminal would obey is shown instead. (Encodings are tested with the commands.)"""

import pytest

from qlora_helpers.visible import harmless, shortened, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ümlaut 日本 €", "plain ümlaut 日本 €"),
        ("a\nb\r\nc\td", "a⏎b⏎c d"),
        ("\x1b[2J\x00\x7f\x9b", "\\x1b[2J\\x00\\x7f\\x9b"),
        ("\u202egnp.exe\u2069", "\\u202egnp.exe\\u2069"),
        ("\u2028 \ud800 \U000e0041", "\\u2028 \\ud800 \\U000e0041"),
        ("👩\u200d🔬 می\u200cخواهم à\u00a0la", "👩\u200d🔬 می\u200cخواهم à\u00a0la"),  # part of a word
    ],
)
def test_what_would_move_the_cursor_or_hide_is_shown(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\rb\x08\x7f\x00\x0b", r"a\x0db\x08\x7f\x00\x0b"),
        ("\x9b31m\x85", r"\x9b31m\x85"),  # the same commands in one character
        ("abc\u202edef\u2066", r"abc\u202edef\u2066"),
        ("line\n\tand où ✓ 語 👩\u200d🔬 \\x1b", "line\n\tand où ✓ 語 👩\u200d🔬 \\x1b"),
    ],
)
def test_lines_and_tabs_may_stay(text, shown):
    assert harmless(text) == shown


def test_a_long_text_is_cut_and_says_so():
    assert shortened("abc", 3) == "abc"
    assert shortened("a" * 1234, 3) == "aaa… (1,234 characters)"
