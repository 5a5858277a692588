"""JSON is read as it is, or refused with the place."""

import pytest

from qlora_helpers.chats.strict_json import NotJson, decode, decode_all, decode_bytes, quoted


def test_values_one_after_another():
    assert decode_all(' {"a": 1}\n\n[2] "x"\t3 ') == [{"a": 1}, [2], "x", 3] and decode_all(" \n") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('[1,\n 2,\n x]', "not JSON: Expecting value at line 3, column 2"),
        ("[NaN]", "not JSON: NaN is no value of JSON"),
        ('{"a": {"b": 1, "b": 2}}', "not JSON that can be trusted: the key 'b' is there twice"),
        ("[" * 100_000, "not JSON that Python reads: it is nested too deeply"),
        ("9" * 5_000, "not JSON that Python reads: Exceeds the limit (4300 digits)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text, said):
    for read, given in ((decode, text), (decode_all, text), (decode_bytes, text.encode())):
        with pytest.raises(NotJson) as caught:
            read(given)
        assert str(caught.value).startswith(said)


def test_a_wrong_byte_is_counted_from_one():
    with pytest.raises(NotJson, match=r"^not UTF-8 at byte 3$"):
        decode_bytes(b'["\xff"]')


def test_a_name_is_shown_on_one_line():
    assert quoted("Frage") == '"Frage"' and quoted("a\nb") == '"a\\nb"' and len(quoted("x" * 1000)) == 63
