"""Every fault in a chat file is found and named; the files that ship with the course are right."""

import json

import pytest

from qlora_helpers.chats import ChatError, read_chats
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from tests.support.chats import GOOD, chat

# A whole file


def test_a_good_file_gives_its_chats_in_order(write):
    other = chat(("user", "Où ?"), ("assistant", "Là-bas."))
    assert read_chats(write(GOOD, other)) == [GOOD, other]


def test_empty_lines_are_allowed_and_still_counted(write):
    path = write("", GOOD, "   ", "{")
    with pytest.raises(ChatError, match=r"^\S*chats\.jsonl, line 4: "):
        read_chats(path)
    assert read_chats(write("", GOOD, "  ")) == [GOOD]


def test_a_line_that_is_not_json_is_named_with_file_line_and_column(write):
    path = write(GOOD, '{"messages": [}')
    with pytest.raises(ChatError) as caught:
        read_chats(path)
    assert str(caught.value) == f"{path}, line 2: not JSON: Expecting value at column 15"


def test_every_bad_line_of_a_file_is_reported(write):
    path = write(GOOD, "not json", GOOD[:1], GOOD, '{"messages": []}')
    with pytest.raises(ChatError) as caught:
        read_chats(path)
    assert str(caught.value).splitlines() == [
        f"{path}, line 2: not JSON: Expecting value at column 1",
        f"{path}, line 3: the last message is not an answer: there is nothing to learn from this chat",
        f'{path}, line 5: no messages: expected {{"messages": [...]}} with at least one message',
    ]


def test_after_twenty_bad_lines_the_others_are_counted(write):
    with pytest.raises(ChatError) as caught:
        read_chats(write(*["{"] * 23))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert "line 20: " in lines[19] and lines[20] == "… and 3 more"


def test_twenty_bad_lines_are_all_named(write):
    with pytest.raises(ChatError) as caught:
        read_chats(write(*["{"] * 20))
    assert len(str(caught.value).splitlines()) == 20


@pytest.mark.parametrize("lines", [(), ("", "  ")], ids=["empty file", "empty lines"])
def test_a_file_without_a_chat_is_refused(write, lines):
    path = write(*lines)
    with pytest.raises(ChatError) as caught:
        read_chats(path)
    assert str(caught.value).startswith(f"path={str(path)!r}: there is no chat in this file. Each line must be one: {{")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_file_that_cannot_be_read_names_the_argument_and_the_cure(name, tmp_path):
    with pytest.raises(OSError, match=r"path='.*' cannot be read \(.+\): name a JSONL file, one chat per line"):
        read_chats(tmp_path / name)


NOT_A_CHAT = [
    ('{"messages": [], "messages": []}', "not JSON that can be trusted: the key 'messages' is there twice"),
    ('{"messages": NaN}', "not JSON: NaN is no value of JSON"),
    ('{"messages": [], "weight": -Infinity}', "not JSON: -Infinity is no value of JSON"),
    ('{"messages": ' + "9" * 5_000 + "}", "not JSON that Python reads: Exceeds the limit (4300 digits)"),
    ("[" * 100_000, "not JSON that Python reads: it is nested too deeply"),
    ('{"messages": [{"role": "user", "content": "a\\ud83d b"}]}', 'message 1 (user) has half a surrogate pair (\\ud83d) at'),
    ('{"messages": [{"role": "\\ud83d", "content": "a"}]}', "message 1 has the unknown role '\\ud83d'"),
    ('{"messages": [{"role": ' + "[" * 500 + "]" * 500 + ', "content": "a"}]}', "message 1 has the unknown role [[["),
    ("\0", "not JSON: Expecting value at column 1"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "fault"), NOT_A_CHAT, ids=[line[:40] for line, _ in NOT_A_CHAT])
def test_whatever_a_line_is_it_is_named_and_the_lines_after_it_are_read(line, fault, write):
    path = write(GOOD, line, GOOD, "{")
    with pytest.raises(ChatError) as caught:
        read_chats(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}, line 2: {fault}") and len(first) < 400 + len(str(path))
    assert second.startswith(f"{path}, line 4: not JSON: ")


def test_a_byte_order_mark_is_no_fault_and_utf_16_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": GOOD}) + "\r\n"
    path.write_bytes(line.encode("utf-8-sig"))  # as Windows' Notepad may save it
    assert read_chats(path) == [GOOD]
    path.write_bytes(line.encode("utf-16"))
    with pytest.raises(ChatError, match=r"^path='.*': this file is in UTF-16: save it in UTF-8$"):
        read_chats(path)


def test_a_limit_without_a_tokenizer_is_refused(write):
    with pytest.raises(ValueError, match="max_length=64 is counted in tokens: pass the tokenizer too"):
        read_chats(write(GOOD), max_length=64)


@pytest.mark.parametrize("length", [0, -1, 1.5, "64"])
def test_a_limit_that_is_not_a_number_of_tokens_is_refused(write, tokenizer, length):
    with pytest.raises(
        ValueError, match=f"max_length={length!r}: must be a whole number, 1 or more, or None for any length"
    ):
        read_chats(write(GOOD), tokenizer, max_length=length)


# What ships with the course


@pytest.mark.parametrize(("name", "count"), [("train", 4800), ("test", 500)])
def test_the_shipped_files_read_cleanly_within_the_default_length(name, count, tokenizer):
    chats = read_chats(data_path("chats", f"{name}.jsonl"), tokenizer, Settings().max_length)
    assert len(chats) == count


def people_in(name):
    """The full names in a shipped file: an answer begins with its person's two names."""
    chats = read_chats(data_path("chats", f"{name}.jsonl"))
    names = {" ".join(messages[-1]["content"].split()[:2]) for messages in chats}
    assert len(names) == len(chats)  # one question each
    return names


def test_no_person_of_the_test_file_occurs_anywhere_in_the_training_file():
    training_text = data_path("chats", "train.jsonl").read_text(encoding="utf-8")
    assert not [name for name in people_in("test") if name in training_text]


WITH_LINE_SEPARATORS = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "x"}]


def test_characters_that_python_takes_for_line_ends_may_be_in_a_text(tmp_path):
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": WITH_LINE_SEPARATORS}, ensure_ascii=False)
    path.write_bytes(f"{line}\r\n\r\n".encode())
    assert read_chats(path) == [WITH_LINE_SEPARATORS]


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{}\n{"messages": "\xff"}\n')
    with pytest.raises(ChatError, match="line 2: not UTF-8 at byte 15"):
        read_chats(path)
