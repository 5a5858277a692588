"""The form of a file is told by its columns, never guessed between two; each row becomes messages, or has a fault."""

import pytest

from qlora_helpers.chats.forms import FORMS, columns_of, convert, detect
from qlora_helpers.chats.messages import ChatError
from tests.support.chats import GOOD, chat

SHAREGPT = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]


def reading(*rows, form=None):
    return detect(columns_of(rows), form)


def one(row, form=None):
    """The chat of a row, and what was changed in it."""
    changed = []
    return convert(row, reading(row, form=form), changed), changed


def fault(row, *others):
    """What is wrong with a row in a file with other rows."""
    with pytest.raises(ChatError) as caught:
        convert(row, reading(row, *others), [])
    return str(caught.value)


# Each form

ROWS = [
    ({"messages": GOOD}, "messages", ""),
    ({"thread": GOOD, "id": 1}, "messages", '"thread" holds the messages'),
    ({"conversations": GOOD}, "messages", '"conversations" holds the messages'),
    (
        {"conversations": SHAREGPT},
        "sharegpt",
        '"conversations" became messages: "from" the role (human: user, gpt: assistant), "value" the content',
    ),
    ({"instruction": "Where?", "output": "Here."}, "alpaca", '"instruction" became the user\'s message, "output" the assistant\'s'),
    (
        {"instruction": "Where?", "input": "", "output": "Here.", "text": "Below is"},
        "alpaca",
        '"instruction", with "input" after an empty line where there is any, became the user\'s message, "output" the '
        "assistant's",
    ),
    (
        {"instruction": "Where?", "context": None, "response": "Here.", "category": "qa"},
        "alpaca",
        '"instruction" became the user\'s message, "response" the assistant\'s',
    ),
    ({"prompt": "Where?", "completion": "Here."}, "prompt-completion", '"prompt" became the user\'s message, "completion" the assistant\'s'),
    ({"prompt": "Where?", "response": "Here."}, "prompt-completion", '"prompt" became the user\'s message, "response" the assistant\'s'),
    (
        {"prompt": GOOD[:1], "completion": GOOD[1:]},
        "prompt-completion",
        'the messages of "prompt" and "completion" were put together',
    ),
    ({"question": "Where?", "answer": "Here."}, "question-answer", '"question" became the user\'s message, "answer" the assistant\'s'),
    ({"Query": "Where?", "Response": "Here."}, "question-answer", '"Query" became the user\'s message, "Response" the assistant\'s'),
    ({"input": "Where?", "output": "Here."}, "question-answer", '"input" became the user\'s message, "output" the assistant\'s'),
    ({" FRAGE ": "Where?", "Antwort": "Here."}, "question-answer", '" FRAGE " became the user\'s message, "Antwort" the assistant\'s'),
]  # fmt: skip


@pytest.mark.parametrize(("row", "form", "said"), ROWS, ids=[" ".join(row) for row, _, _ in ROWS])
def test_each_form_is_told_by_its_columns(row, form, said):
    found = reading(row)
    assert (found.form, found.said()) == (form, said)
    assert convert(row, found, []) == GOOD
    assert {form for _, form, _ in ROWS} == set(FORMS)


def test_an_input_stands_below_its_instruction():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert one(row)[0] == chat(("user", "Add.\n\n1 2"), ("assistant", "3"))


@pytest.mark.parametrize("row", [row for row, _, _ in ROWS], ids=[" ".join(row) for row, _, _ in ROWS])
def test_a_system_column_comes_first_where_it_is_filled(row):
    with_system = row | {"System Prompt": "Be brief."}
    assert '"System Prompt" the system\'s message where there is any' in reading(with_system).said()
    assert one(with_system)[0] == [{"role": "system", "content": "Be brief."}, *GOOD]
    assert convert(row | {"System Prompt": " "}, reading(with_system), []) == GOOD


def test_two_system_messages_are_a_fault():
    row = {"system": "a", "messages": [{"role": "system", "content": "b"}, *GOOD]}
    assert fault(row) == 'it has "system" and a system message: leave out one of them'


# Which form


AMBIGUOUS = [
    ([{"question": "a", "answer": "b", "prompt": "c", "completion": "d"}], {"prompt-completion", "question-answer"}),
    ([{"messages": GOOD}, {"instruction": "a", "output": "b"}], {"messages", "alpaca"}),
    ([{"messages": GOOD}, {"messages": SHAREGPT}], {"messages", "sharegpt"}),
    ([{"messages": GOOD, "question": "a", "answer": "b"}], {"messages", "question-answer"}),
    ([{"prompt": "a", "question": "b", "response": "c"}], {"prompt-completion", "question-answer"}),
]


@pytest.mark.parametrize(("rows", "forms"), AMBIGUOUS, ids=[" or ".join(sorted(forms)) for _, forms in AMBIGUOUS])
def test_between_two_readings_the_user_chooses(rows, forms):
    with pytest.raises(ChatError, match=r"^it can be read as ") as caught:
        reading(*rows)
    for form in forms:
        assert f"form='{form}'" in str(caught.value) and "--form" in str(caught.value)
        assert reading(*rows, form=form).form == form
        assert convert(rows[0] if form != "sharegpt" and form != "alpaca" else rows[1], reading(*rows, form=form), [])


def test_the_chosen_form_takes_the_columns_of_its_own_names():
    row = AMBIGUOUS[0][0][0]
    assert one(row, "question-answer")[0] == chat(("user", "a"), ("assistant", "b"))
    assert one(row, "prompt-completion")[0] == chat(("user", "c"), ("assistant", "d"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "a", "query": "b", "answer": "c"},
            'the columns "question" and "query" can each be the question of the form question-answer: rename or remove all but '
            'one, or choose form=\'question-answer\' (--form on the command line) to take "question", "answer"',
        ),
        (
            {"q": "a", "query": "b", "answer": "c"},
            'the columns "q" and "query" can each be the question of the form question-answer: rename or remove all but one',
        ),
        (
            {"chat": GOOD, "thread": GOOD},
            'the columns "chat" and "thread" can each be the messages of the form messages: rename or remove all but one',
        ),
    ],
)
def test_two_columns_for_one_part_are_named(row, said):
    with pytest.raises(ChatError) as caught:
        reading(row)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "label": 1}, 'no form of chats fits: its columns are "text", "label". Name the columns as'),
        ({}, "no form of chats fits: its rows have no columns"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, 'its columns are "prompt", "chosen", "rejected", which is data of preferences'),
        ({"prompt": "a", "chosen": GOOD, "rejected": GOOD}, "which is data of preferences, and not of chats"),
        (GOOD[0], "so each row is one message: put all messages of a chat into one list"),
        ({"question": "a"}, 'its columns are "question"'),
        ({"messages": None, "id": 1}, 'its columns are "id"'),
        ({str(number): 0 for number in range(25)}, '"19" and 5 more'),
    ],
)  # fmt: skip
def test_columns_of_no_form_are_named_beside_those_of_each(row, said):
    with pytest.raises(ChatError) as caught:
        reading(row)
    assert said in str(caught.value) and "question-answer (question, answer)" in str(caught.value)


def test_a_form_that_does_not_fit_is_refused():
    with pytest.raises(ChatError, match="form='alpaca' does not fit: its columns are \"messages\""):
        reading({"messages": GOOD}, form="alpaca")


def test_a_column_without_any_value_is_none():
    rows = [{"messages": GOOD, "question": None, "answer": None}]
    assert reading(*rows).form == "messages"


# What is changed, and what cannot be used


def said_by(**answer):
    return {"messages": [GOOD[0], {"role": "assistant", "content": "Here."} | answer]}


PARTS = [{"type": "text", "text": "Where?"}, {"type": "text", "text": "Where?"}]


@pytest.mark.parametrize(
    ("row", "wanted", "changed"),
    [
        ({"messages": chat(("developer", "s"), ("human", "a"), ("model", "b"))}, ["system", "user", "assistant"],
         ["developer became system", "human became user", "model became assistant"]),
        ({"messages": chat(("User", "a"), ("bot", "b"))}, ["user", "assistant"], ["User became user", "bot became assistant"]),
        ({"messages": chat(("user", "a"), ("gpt", "b"))}, ["user", "assistant"], ["gpt became assistant"]),
        ({"conversations": [{"from": "user", "value": "a"}, {"from": "bing", "value": "b"}]}, None, None),
        ({"conversations": [{"from": "user", "value": "a"}, {"from": "model", "value": "b"}]}, ["user", "assistant"],
         ["model became assistant"]),
        (said_by(weight=1), ["user", "assistant"], []),
        (said_by(name="Joe", id=None), ["user", "assistant"], ['"name" of a message was left out']),
        (said_by(tool_calls=None, reasoning_content=None, weight=None), ["user", "assistant"], []),
        ({"messages": GOOD, "tools": []}, ["user", "assistant"], []),
    ],
)  # fmt: skip
def test_roles_by_other_names_and_further_keys_are_counted(row, wanted, changed):
    if wanted is None:
        assert fault(row).startswith("message 2 has the unknown role 'bing': use one of system, user, assistant")
    else:
        found, changes = one(row)
        assert [message["role"] for message in found] == wanted and changes == changed
        assert all(message.keys() == {"role", "content"} for message in found)


def test_a_content_in_parts_of_text_is_joined():
    found, changed = one({"messages": [{"role": "user", "content": PARTS}, GOOD[1]]})
    assert found[0]["content"] == "Where?\nWhere?" and changed == ["content in parts of text was joined"]


def test_a_number_becomes_text_and_is_counted():
    assert one({"question": "How many?", "answer": 42}) == (
        chat(("user", "How many?"), ("assistant", "42")), ['number in "answer" became text'],
    )  # fmt: skip
    assert one({"question": 1.5, "answer": "007"})[0] == chat(("user", "1.5"), ("assistant", "007"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (said_by(content=None), 'message 2 (assistant) has "content": null, which is no text'),
        (said_by(content=42), 'message 2 (assistant) has "content": 42, which is no text'),
        (said_by(content=None, tool_calls=[{"id": 1}]), 'message 2 (assistant) has "tool_calls": calls of tools are not learnt'),
        (said_by(weight=0), "message 2 (assistant) has the weight 0: every answer is learnt here in the same way"),
        (said_by(reasoning_content="Hm."), 'message 2 (assistant) has "reasoning_content", which would be lost'),
        (said_by(content=[*PARTS, {"type": "image_url", "image_url": "x"}]), "message 2 (assistant) has a part of the type 'image_url'"),
        (said_by(content=["Here."]), "message 2 (assistant) has a part of the type None"),
        (said_by(content=[]), "message 2 (assistant) is an empty answer"),
        (said_by(content="\ud83d"), "message 2 (assistant) has half a surrogate pair"),
        (said_by(role="tool"), "message 2 has the role 'tool': calls of tools are not learnt here"),
        (said_by(role="narrator"), "message 2 has the unknown role 'narrator'"),
        (said_by(role=["assistant"]), "message 2 has the unknown role ['assistant']"),
        ({"messages": [GOOD[0], "Here."]}, 'message 2 is not {"role": "…", "content": "…"}'),
        ({"conversations": [SHAREGPT[0], {"from": "gpt"}]}, 'message 2 is not {"from": "…", "value": "…"}'),
        ({"messages": GOOD[1:] + GOOD}, "message 1 is an answer without a question"),
        ({"messages": GOOD[:1] + GOOD}, "messages 1 and 2 both have the role 'user'"),
        ({"messages": [*GOOD, {"role": "system", "content": "s"}]}, "message 3 has the role 'system', which may only come first"),
        ({"messages": GOOD, "tools": [{"name": "f"}]}, 'it has "tools": calls of tools are not learnt here'),
        ({"question": "a", "answer": "b", "image": {"bytes": "x"}}, 'it has "image": only text is learnt here'),
        ({"question": "a", "answer": True}, '"answer" is True: write it as a text'),
        ({"question": "a", "answer": ["b", "c"]}, "\"answer\" is ['b', 'c']: write it as a text"),
        ({"question": "a", "answer": float("inf")}, '"answer" is inf: write it as a text'),
        ({"question": " ", "answer": "b"}, '"question" is empty'),
        ({"question": "a", "answer": ""}, '"answer" is empty'),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(row, said):
    assert fault(row).startswith(said)


@pytest.mark.parametrize(
    ("row", "other", "said"),
    [
        ({"question": "a"}, {"question": "a", "answer": "b"}, 'it has no "answer"'),
        (["a", "b"], {"question": "a", "answer": "b"}, 'it is no object: expected one with "question", "answer"'),
        (3, {"messages": GOOD}, 'no messages: expected {"messages": [...]} with at least one message'),
        ({"messages": []}, {"messages": GOOD}, 'no messages: expected {"messages": [...]} with at least one message'),
        ({"id": 1}, {"conversations": SHAREGPT}, '"conversations" is no list with at least one message'),
        ({"prompt": "Hi", "completion": 3}, {"prompt": GOOD[:1], "completion": GOOD[1:]}, None),
    ],
)
def test_a_row_unlike_the_others(row, other, said):
    if said:
        assert fault(row, other) == said
    else:
        assert convert(row, reading(row, other), []) == chat(("user", "Hi"), ("assistant", "3"))
