"""What can be wrong with one chat is named."""

import pytest

from qlora_helpers.chats import fault_in, split_question
from tests.support.chats import GOOD, chat


@pytest.mark.parametrize(
    "messages",
    [
        GOOD,
        GOOD + GOOD,
        chat(("system", "Be brief."), ("user", "Where?"), ("assistant", "Here.")),
    ],
    ids=["one turn", "two turns", "with a system message"],
)
def test_a_good_chat_has_no_fault(messages):
    assert fault_in({"messages": messages}) is None


@pytest.mark.parametrize("row", [None, 3, "text", [GOOD], {}, {"messages": []}, {"messages": "hello"}, {"text": "a"}])
def test_a_row_without_messages(row):
    assert fault_in(row) == 'no messages: expected {"messages": [...]} with at least one message'


@pytest.mark.parametrize(
    "message", ["hello", None, {}, {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": []}]
)
def test_a_message_without_text(message):
    assert fault_in({"messages": [GOOD[0], message]}) == 'message 2 is not {"role": "…", "content": "…"}'


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (
            chat(("user", "Where?"), ("bot", "Here.")),
            "message 2 has the unknown role 'bot': use one of system, user, assistant",
        ),
        ([{"content": "Where?"}], "message 1 has the unknown role None: use one of system, user, assistant"),
        (
            chat(("user", "Where?"), ("system", "Be brief."), ("assistant", "Here.")),
            "message 2 has the role 'system', which may only come first",
        ),
        (
            chat(("user", "Where?"), ("user", "When?"), ("assistant", "Here.")),
            "messages 1 and 2 both have the role 'user'",
        ),
        ([*GOOD, GOOD[1]], "messages 2 and 3 both have the role 'assistant'"),
        (chat(("user", " \n"), ("assistant", "Here.")), "message 1 (user) is an empty message"),
        (chat(("system", ""), *[tuple(m.values()) for m in GOOD]), "message 1 (system) is an empty message"),
        (chat(("user", "Where?"), ("assistant", "")), "message 2 (assistant) is an empty answer"),
        (chat(("assistant", "Here.")), "message 1 is an answer without a question"),
        (chat(("system", "Be brief."), ("assistant", "Here.")), "message 2 is an answer without a question"),
        (GOOD[:1], "the last message is not an answer: there is nothing to learn from this chat"),
        (GOOD + GOOD[:1], "the last message is not an answer: there is nothing to learn from this chat"),
    ],
)
def test_a_fault_in_the_messages_is_named(messages, fault):
    assert fault_in({"messages": messages}) == fault


def test_the_question_is_all_before_the_last_answer():
    assert split_question(GOOD) == (GOOD[:1], "Here.")
    assert split_question(GOOD + GOOD) == (GOOD + GOOD[:1], "Here.")
