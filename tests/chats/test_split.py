"""Chats are held out whole questions at a time, the same ones on every machine, or a reason is given why not."""

import random
import re

import pytest

from qlora_helpers.chats.split import shared_questions, split


def chat(question, answer="Here.", system=None):
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


DIFFERENT = [chat(f"Where is {number}?") for number in range(100)]


@pytest.mark.parametrize(("share", "held_out"), [(0.1, 10), (0.25, 25), (0.994, 99), (0.001, 1), (0.999, 99)])
def test_a_share_of_the_chats_is_held_out_at_least_one_and_never_all(share, held_out):
    training, validation = split(DIFFERENT, share)
    assert len(validation) == held_out
    assert [one for one in DIFFERENT if one in training] == training  # in the order that they had
    assert sorted(map(str, training + validation)) == sorted(map(str, DIFFERENT))


def test_the_split_is_the_same_on_every_machine_in_any_order_and_another_with_another_seed():
    held_out = split(DIFFERENT, 0.05)[1]
    assert [DIFFERENT.index(one) for one in held_out] == [48, 70, 71, 88, 92]
    shuffled = random.Random(0).sample(DIFFERENT, len(DIFFERENT))
    assert sorted(map(str, split(shuffled, 0.05)[1])) == sorted(map(str, held_out))
    assert split(DIFFERENT, 0.05, seed=1)[1] != held_out


def test_chats_with_the_same_question_stay_on_one_side():
    same = [
        [chat("Where?"), chat("Where?"), chat(" WHERE? ", "There."), chat("Where?") + chat("And now?")],
        [chat("Who?", answer) for answer in "abcd"],
        [chat("Where?", system="Be brief."), chat("where?", system="Be  brief.")],
    ]
    chats = [one for group in same for one in group]
    for seed in range(20):
        training, validation = split(chats, 0.5, seed)
        assert validation and training
        assert shared_questions(training, validation) == 0
        for group in same:
            assert all(one in training for one in group) or all(one in validation for one in group)


def test_a_question_that_comes_too_often_is_left_to_train_on():
    often = [chat("Hi", str(number)) for number in range(90)]
    training, validation = split(often + DIFFERENT[:10], 0.1)
    assert training == often and validation == DIFFERENT[:10]


def test_if_every_question_comes_too_often_the_rarest_is_held_out():
    training, validation = split([chat("a")] * 3 + [chat("b")] * 2 + [chat("c")] * 3, 0.01)
    assert validation == [chat("b")] * 2 and len(training) == 6


@pytest.mark.parametrize(
    ("chats", "share", "said"),
    [
        (
            DIFFERENT[:1] * 5,
            0.2,
            "share=0.2: the 5 chats have 1 different questions, and chats with the same question stay",
        ),
        ([], 0.2, "share=0.2: the 0 chats have 0 different questions"),
        (DIFFERENT, 0, "share=0: must be a number, more than 0 and less than 1"),
        (DIFFERENT, 1.0, "share=1.0: must be a number, more than 0 and less than 1"),
        (DIFFERENT, "a.csv", "share='a.csv': must be a number"),
        ([DIFFERENT[0], ["Where?"]], 0.5, "chat 2: message 1 is not "),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(chats, share, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        split(chats, share)


def test_shared_questions_are_counted_by_held_out_chat():
    assert shared_questions(DIFFERENT[:3], [DIFFERENT[0], chat("where  is 2?", "Else."), chat("Who?")]) == 2
    assert shared_questions([], DIFFERENT) == 0
