"""What a terminal would obey is shown instead. (Encodings are tested with the commands.)"""

import pytest

from qlora_helpers.streams import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\rb\x08\x7f\x00\x0b", r"a\rb\x08\x7f\x00\x0b"),
        ("\x9b31m\x85", r"\x9b31m\x85"),  # the same commands in one character
        ("abc\u202edef\u2066", r"abc\u202edef\u2066"),
        ("line\n\tand où ✓ 語 👩\u200d🔬 \\x1b", "line\n\tand où ✓ 語 👩\u200d🔬 \\x1b"),
    ],
)
def test_control_characters_are_shown_and_text_is_left_alone(text, shown):
    assert visible(text) == shown
