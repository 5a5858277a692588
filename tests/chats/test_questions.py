"""Questions from files: each form, and what is refused by line."""

import json

import pytest

from qlora_helpers.chats import ChatError
from qlora_helpers.chats.questions import Question, read_questions
from qlora_helpers.paths import data_path

USER = [{"role": "user", "content": "Who?"}]
ANSWERED = [*USER, {"role": "assistant", "content": "Carl."}]


@pytest.fixture
def read(tmp_path):
    def from_text(name, text, system=None):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_questions(path, system)

    return from_text


def asked(questions):
    return [(question.line, question.chat[-1]["content"]) for question in questions]


def test_a_text_file_has_a_question_a_line(read):
    found = read("q.txt", "\ufeffWho?\r\n\n  Where? \u2028 or when?\n")
    assert asked(found) == [(1, "Who?"), (3, "Where? \u2028 or when?")]
    assert found[0] == Question(USER, 1)


def test_a_jsonl_file_has_chats_or_questions(read):
    rows = [
        {"messages": USER},
        {"messages": ANSWERED},
        {"messages": [*ANSWERED, {"role": "user", "content": "Why?"}]},
        {"question": "When?", "answer": "Never."},
        {"prompt": "Where?"},
        "Whose?",
    ]
    found = read("Q.JSONL", "\n".join(map(json.dumps, rows)))
    assert asked(found) == list(enumerate(["Who?", "Who?", "Why?", "When?", "Where?", "Whose?"], start=1))
    assert [question.expected for question in found] == [None, "Carl.", None, None, None, None]
    assert found[1].chat == USER and len(found[2].chat) == 3
    assert len(read_questions(data_path("chats", "test.jsonl"))) == 500


def test_a_csv_file_has_a_column_of_questions_or_one_alone(read):
    text = 'id,Question,answer\n1,"Who, then?",Carl\n\n2,"Where\nis he?",here\n'
    assert asked(read("q.csv", text)) == [(2, "Who, then?"), (5, "Where\nis he?")]
    assert asked(read("q.csv", 'Who?\n"Where, then?"\n')) == [(1, "Who?"), (2, "Where, then?")]
    assert asked(read("q.csv", "prompt\nWho?\n")) == [(2, "Who?")]
    assert asked(read("q.csv", "id,question\n1,Who?\n,\n2,Why?\n")) == [(2, "Who?"), (4, "Why?")]  # an empty row


def test_a_table_is_read_with_its_delimiter_and_in_its_encoding(read):
    table = "id;question\n1;Où est Zoé, ici?\n"
    for encoding in ("utf-8", "utf-16", "cp1252"):
        assert asked(read("q.csv", table.encode(encoding))) == [(2, "Où est Zoé, ici?")]
    assert asked(read("q.csv", "sep=\t\nid\tquestion\n1\tWho?\n")) == [(3, "Who?")]
    assert asked(read("q.csv", f"question\n{'Who? ' * 40_000}\n")) == [(2, ("Who? " * 40_000).strip())]


def test_a_system_message_is_put_before_each_chat_that_has_none(read):
    other = [{"role": "system", "content": "Be long."}, *USER]
    found = read("q.jsonl", "\n".join(json.dumps({"messages": chat}) for chat in (USER, other)), "Be brief.")
    assert [question.chat[0]["content"] for question in found] == ["Be brief.", "Be long."]
    assert [len(question.chat) for question in found] == [2, 2]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.txt", "\n \n", "q.txt: there is no question in this file"),
        ("q.csv", "", "q.csv: there is no question in this file"),
        ("q.csv", "a,b\n1,2\n", "q.csv has the columns 'a', 'b': name the one with the questions 'question'"),
        ("q.csv", "id,question\n1,Who, then?\n", "q.csv, line 2: it has 3 cells, and the first line has 2: put a text"),
        ("q.csv", "id,question\n1,\n", "q.csv, line 2: message 1 (user) is an empty message"),
        ("q.csv", 'question\n"Who\n', "q.csv, line 2: a text begins with a quote that never ends"),
        (
            "q.csv",
            "id;question\n1;Who; then?\n",
            "q.csv, line 2: it has 3 cells, and the first line has 2: put a text with ';'",
        ),
        ("q.csv", b"question\nWho\0?", "q.csv: byte 13 is NUL, so it is no text file"),
        ("q.jsonl", "{", "q.jsonl, line 1: not JSON: Expecting property name"),
        (
            "q.jsonl",
            '{"question": "a", "question": "b"}',
            "q.jsonl, line 1: not JSON that can be trusted: the key 'question'",
        ),
        ("q.jsonl", '"Who?"\n3', 'q.jsonl, line 2: neither "messages" nor a text under "question" or "prompt"'),
        ("q.jsonl", '{"messages": []}', "q.jsonl, line 1: message 1 is an answer without a question"),
        ("q.jsonl", '{"messages": [3]}', 'q.jsonl, line 1: message 1 is not {"role": "…", "content": "…"}'),
        ("q.jsonl", '"\\ud83d"', "q.jsonl, line 1: message 1 (user) has half a surrogate pair"),
        (
            "q.txt",
            b"Who\xff\xff\xff\xff",
            "q.txt: byte 4 (0xff) is not UTF-8, and it is not plainly Windows-1252 either",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(read, tmp_path, name, text, said):
    with pytest.raises(ChatError) as error:
        read(name, text)
    assert str(error.value).startswith(f"{tmp_path}/{said}")


def test_many_bad_lines_are_counted(read):
    with pytest.raises(
        ChatError, match=r"line 20: neither.*\n… and 5 more\nTo make .jsonl of another form .* --to NEW.jsonl$"
    ):
        read("q.jsonl", "3\n" * 25)
    with pytest.raises(ChatError, match=r"line 20: not JSON.*\n… and 5 more$"):
        read("q.jsonl", "{\n" * 25)


def test_a_file_of_another_kind_or_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"q.pdf: its name must end in one of .txt, .jsonl, .csv"):
        read_questions(tmp_path / "q.pdf")
    with pytest.raises(
        FileNotFoundError, match=r"q.txt cannot be read .No such file or directory.: name a file of questions"
    ):
        read_questions(tmp_path / "q.txt")
