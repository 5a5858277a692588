"""Chats are made to fit without losing any of an answer, and what was lost is counted and said."""

import copy

import pytest

from qlora_helpers.chats import ChatError, count_tokens, lengths_of, tokenized
from qlora_helpers.chats.lengths import fit_to_length
from tests.chats.made_up import CHATML, IM, tokenizer_with

TOKENIZER = tokenizer_with(CHATML, IM)
WORDS = [f"word{number}" for number in range(200)]


def chat(question, reply="Sixteen values.", *others):
    roles = ("user", "assistant") * 4
    return [{"role": role, "content": text} for role, text in zip(roles, (question, reply, *others), strict=False)]


SHORT, LONG = chat("What is NF4?"), chat(" ".join(WORDS))
LIMIT = 60


def test_chats_that_fit_stay_as_they_are():
    for too_long in ("stop", "drop", "cut-question"):
        kept, what = fit_to_length([SHORT, SHORT], TOKENIZER, LIMIT, too_long)
        assert kept == [SHORT, SHORT] and not what.cut and not what.dropped
        assert what.said == f"All 2 chats fit into 60 tokens: the longest has {count_tokens(SHORT, TOKENIZER)}."


def test_stop_names_every_chat_that_is_too_long():
    with pytest.raises(ChatError) as caught:
        fit_to_length([SHORT, LONG, SHORT, LONG], TOKENIZER, LIMIT)
    cure = "over max_length=60: the answer would be cut. Raise max_length or shorten the chat"
    tokens = count_tokens(LONG, TOKENIZER)
    assert str(caught.value).splitlines() == [f"chat {number}: {tokens} tokens, {cure}" for number in (2, 4)]
    with pytest.raises(ChatError, match=r"\n… and 5 more$"):
        fit_to_length([LONG] * 25, TOKENIZER, LIMIT)


def test_drop_leaves_them_out_and_counts_them():
    kept, what = fit_to_length([LONG, SHORT, LONG], TOKENIZER, LIMIT, "drop")
    assert kept == [SHORT] and list(what.dropped) == [1, 3]
    tokens = count_tokens(LONG, TOKENIZER)
    assert what.said == (
        f"Of 3 chats 2 had more than 60 tokens: 2 left out (the first is chat 1: {tokens:,} tokens, too long)."
    )


def test_cut_question_takes_the_middle_out_of_the_question_and_keeps_the_answer():
    before = copy.deepcopy([SHORT, LONG])
    kept, what = fit_to_length([SHORT, LONG], TOKENIZER, LIMIT, "cut-question")
    assert before == [SHORT, LONG] and kept[0] == SHORT and not what.dropped
    question, reply = kept[1]
    assert reply == LONG[1]
    first, last = question["content"].split(" … ")
    assert WORDS[: len(first.split())] == first.split() and WORDS[-len(last.split()) :] == last.split()
    assert what.cut == {2: (count_tokens(LONG, TOKENIZER), count_tokens(kept[1], TOKENIZER))}
    assert LIMIT - 8 <= what.cut[2][1] <= LIMIT  # and not much more is lost than needed
    (row,) = tokenized(kept[1:], TOKENIZER)
    spoken = [id for id, marked in zip(row["input_ids"], row["assistant_masks"], strict=True) if marked]
    assert TOKENIZER.decode(spoken) == "Sixteen values.<|im_end|>"
    assert "in 1 the middle of the longest question was cut out" in what.said and "the first is chat 2" in what.said


@pytest.mark.parametrize("limit", range(20, 120, 7))
def test_whatever_the_limit_no_chat_is_longer(limit):
    chats = [LONG, chat("x" * 900), chat("热泵的工作原理" * 40), chat("a " * 500), chat("a\n\n\nb " * 90)]
    kept, what = fit_to_length([*chats, SHORT], TOKENIZER, limit, "cut-question")
    assert len(kept) == 6 - len(what.dropped) and max(lengths_of(kept, TOKENIZER)) <= limit
    assert all(message["content"].strip() for chat in kept for message in chat)


def test_the_longest_question_of_several_is_cut():
    several = chat("What is NF4?", "Values.", " ".join(WORDS), "Many.")
    (kept,), what = fit_to_length([several], TOKENIZER, LIMIT, "cut-question")
    assert kept[:2] == several[:2] and kept[3] == several[3] and " … " in kept[2]["content"] and list(what.cut) == [1]


def test_a_chat_whose_answer_alone_does_not_fit_is_left_out_and_counted():
    answer_too_long = chat("What is NF4?", " ".join(WORDS))
    kept, what = fit_to_length([SHORT, answer_too_long, LONG], TOKENIZER, LIMIT, "cut-question")
    assert len(kept) == 2 and list(what.dropped) == [2] and list(what.cut) == [3]
    tokens = count_tokens(answer_too_long, TOKENIZER)
    assert what.said.endswith(
        f"; 1 left out (the first is chat 2: {tokens:,} tokens, too long even with two words of its longest question)."
    )


def test_if_no_chat_is_left_that_is_an_error():
    with pytest.raises(
        ChatError, match=r"no chat is left\. Of 1 chats 1 had more than 60 tokens: 1 left out .* Raise max_length"
    ):
        fit_to_length([LONG], TOKENIZER, LIMIT, "drop")
    assert fit_to_length([], TOKENIZER, LIMIT)[0] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_length": 0}, "max_length=0: must be a whole number, 1 or more"),
        ({"max_length": 9, "too_long": "cut"}, "too_long='cut': choose one of stop, drop, cut-question"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        fit_to_length([SHORT], TOKENIZER, **arguments)
