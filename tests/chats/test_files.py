"""Every fault in a chat file is found and named; the files that ship with the course are right."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from qlora_helpers.chats import ChatError, read_chats, read_file, write_chats
from qlora_helpers.chats.files import said_of_the_dropped
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
    assert str(caught.value).startswith(
        f"path={str(path)!r}: there is no chat in this file: it is empty. Name a file of"
    )


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_file_that_cannot_be_read_names_the_argument_and_the_cure(name, tmp_path):
    with pytest.raises(
        OSError, match=r"path='.*' cannot be read \(.+\): name a file of JSONL, JSON, CSV, TSV or parquet"
    ):
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


def test_a_byte_order_mark_is_no_fault_and_utf_16_is_said(tmp_path, capsys):
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": GOOD}) + "\r\n"
    path.write_bytes(line.encode("utf-8-sig"))  # as Windows' Notepad may save it
    assert read_chats(path) == [GOOD] and capsys.readouterr().out == ""
    path.write_bytes(line.encode("utf-16"))
    assert read_chats(path) == [GOOD]
    assert capsys.readouterr().out == "chats.jsonl: 1 row of messages (JSONL, UTF-16)\n"


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
    path.write_bytes(b'{}\n{"messages": "\x81"}\n')
    with pytest.raises(ChatError, match="line 2: not UTF-8 at byte 15"):
        read_chats(path)


# Other forms, as a whole file; tests/chats/test_tables.py and test_forms.py have the parts


@pytest.fixture
def save(tmp_path):
    def to_file(content, name="faq.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return to_file


def test_one_line_says_what_was_found_and_what_became_what(save, capsys):
    path = save("Id;Frage;Antwort\r\n1;Wie groß?;So.\r\n2;Wo?;Hier.\r\n".encode("cp1252"))
    assert read_chats(path) == [
        chat(("user", "Wie groß?"), ("assistant", "So.")),
        chat(("user", "Wo?"), ("assistant", "Hier.")),
    ]
    assert capsys.readouterr().out == (
        'faq.csv: 2 rows of question-answer (CSV, semicolons, Windows-1252 as in "groß"): "Frage" became the user\'s message, '
        '"Antwort" the assistant\'s; not used: "Id" (2 rows)\n'
    )


def test_messages_in_jsonl_are_read_without_a_word(write, capsys):
    read_chats(write(GOOD))
    assert capsys.readouterr().out == ""


def test_what_was_changed_is_counted(write, capsys):
    developer = chat(("developer", "Be brief."), ("human", "Where?"), ("model", "Here."))
    file = read_file(write(developer, developer, GOOD))
    assert file.chats[0] == chat(("system", "Be brief."), ("user", "Where?"), ("assistant", "Here."))
    assert file.changed == {"developer became system": 2, "human became user": 2, "model became assistant": 2}
    assert file.said.endswith(
        "(JSONL): developer became system (2 times), human became user (2 times), model became assistant (2 times)"
    )
    read_chats(file.path)
    assert capsys.readouterr().out == file.said + "\n"


BAD = "question,answer\nWhere?,Here.\nWhen?,\nWho?,Me\nWhat?,\n,Yes\n"


def test_bad_rows_stop_the_reading_by_default(save):
    path = save(BAD)
    with pytest.raises(ChatError) as caught:
        read_file(path)
    assert str(caught.value).splitlines() == [
        f'{path}, row 2: "answer" is empty', f'{path}, row 4: "answer" is empty', f'{path}, row 5: "question" is empty',
    ]  # fmt: skip


def test_bad_rows_can_be_dropped_and_are_counted(save, capsys):
    file = read_file(save(BAD), on_bad="drop")
    assert file.rows == [1, 3] and [chat[-1]["content"] for chat in file.chats] == ["Here.", "Me"]
    assert file.dropped == {2: '"answer" is empty', 4: '"answer" is empty', 5: '"question" is empty'}
    assert file.kinds_of_faults() == [(2, 2, '"answer" is empty'), (1, 5, '"question" is empty')]
    assert read_chats(file.path, on_bad="drop") == file.chats
    assert capsys.readouterr().out.splitlines()[1:] == [
        "3 rows of faq.csv cannot be used, and are left out (rows are counted without the header):",
        '  2 rows, such as row 2: "answer" is empty',
        '  1 row: row 5: "question" is empty',
    ]
    one = read_file(save("question,answer\nWhere?,Here.\nWhen?,\n"), on_bad="drop")
    assert said_of_the_dropped(one).startswith(
        "1 row of faq.csv cannot be used, and is left out (rows are counted without the header):\n"
    )


@pytest.mark.parametrize(
    ("kinds", "last"),
    [(20, "  1 row: row 19: t"), (21, "  … and 1 more kind of fault"), (43, "  … and 23 more kinds of fault")],
)
def test_of_many_kinds_of_faults_the_first_are_named(kinds, last, save):
    file = replace(read_file(save("question,answer\nWhere?,Here.\n")), dropped={n: chr(97 + n) for n in range(kinds)})
    lines = said_of_the_dropped(file).splitlines()
    assert len(lines) == 1 + min(kinds, 21) and lines[-1] == last


def test_what_a_tokenizer_refuses_can_be_dropped_too(write, tokenizer):
    long, typed = chat(("user", "Where? " * 40), ("assistant", "Here.")), chat(("user", "a"), ("assistant", "<|end|>"))
    file = read_file(write(GOOD, long, "{", typed, GOOD), tokenizer, 32, on_bad="drop")
    assert file.rows == [1, 5] and list(file.dropped) == [2, 3, 4]
    assert "over max_length=32" in file.dropped[2] and "'<|end|>'" in file.dropped[4]


def test_a_file_of_bad_rows_alone_is_an_error_even_with_drop(save):
    with pytest.raises(ChatError, match='row 1: "answer" is empty'):
        read_file(save("question,answer\nWhere?,\n"), on_bad="drop")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_bad": "skip"}, "on_bad='skip': choose one of stop, drop"),
        (
            {"form": "csv"},
            "form='csv': choose one of messages, alpaca, sharegpt, prompt-completion, question-answer, or None",
        ),
    ],
)
def test_an_unknown_choice_names_the_known_ones(options, said, write):
    with pytest.raises(ValueError, match=said):
        read_chats(write(GOOD), **options)


def test_a_row_keeps_its_number_when_lines_are_empty_or_bad(write):
    file = read_file(write("", GOOD, "{", "", GOOD), on_bad="drop")
    assert (file.rows, file.row_name, list(file.dropped)) == ([2, 5], "line", [3])


# Writing


def test_what_is_written_is_read_again_as_the_same_chats(tmp_path):
    chats = [GOOD, WITH_LINE_SEPARATORS, chat(("system", "ß日本\0"), ("user", '"\\\n\r\n'), ("assistant", "\ufeff😀"))]
    path = tmp_path / "out.jsonl"
    write_chats(path, chats)
    assert read_chats(path) == chats
    assert path.read_bytes().count(b"\n") == len(chats) and "日本".encode() in path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"path='.*out.jsonl' is there already: name a new file"):
        write_chats(path, [GOOD])
    with monkeypatch.context() as patch:  # it appears while the file is written
        patch.setattr("os.path.lexists", lambda path: False)
        with pytest.raises(FileExistsError, match="is there already"):
            write_chats(path, [GOOD])
    assert path.read_text() == "mine"
    with pytest.raises(
        FileNotFoundError, match=r"cannot be written \(No such file or directory\): name a file in a folder"
    ):
        write_chats(tmp_path / "no" / "out.jsonl", [GOOD])
    with pytest.raises(KeyError):
        write_chats(tmp_path / "other.jsonl", (chat for chat in [GOOD, {}["fails"]] if chat))
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_it_is_written_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    write_chats(tmp_path / "out.jsonl", [GOOD])
    assert read_chats(tmp_path / "out.jsonl") == [GOOD]


# Size: 100,000 rows are to take less than a minute and 1 GB


MEASURED = """
import re, sys, time
from qlora_helpers.chats import read_file
before = time.process_time()
file = read_file(sys.argv[1])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(len(file.chats), time.process_time() - before, peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak of memory")
@pytest.mark.parametrize("name", ["chats.jsonl", "chats.csv", "chats.parquet"])
def test_20_000_rows_are_read_in_a_fifth_of_the_time_and_memory_that_100_000_may_take(name, tmp_path):
    path, text = tmp_path / name, "some words of a text of a usual length, " * 10
    rows = [{"question": f"{number} {text}", "answer": text} for number in range(20_000)]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith("csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True, check=True)
    count, seconds, kib = map(float, done.stdout.split())
    assert count == 20_000 and seconds < 60 / 5 and kib * 1024 < 1e9 / 5 + 150e6  # the libraries take about 100 MB
