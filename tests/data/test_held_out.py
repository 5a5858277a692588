"""The chats that a run is chosen by are neither trained on nor reported on."""

import json

import pytest

from data.scripts.measure import held_out
from qlora_helpers import evaluation
from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_the_three_sets_share_no_person_and_no_question(tokenizer):
    sets = held_out.training_validation_test(tokenizer, 64)
    assert [len(chats) for chats in sets] == [4300, 500, 500]
    for key in (held_out.person, lambda chat: chat[0]["content"]):
        assert len({key(chat) for chats in sets for chat in chats}) == 5300
    assert all(held_out.person(chat) in chat[0]["content"] for chats in sets for chat in chats)


def test_the_sets_are_the_shipped_files_in_their_order(tokenizer):
    train, validation, test = held_out.training_validation_test(tokenizer, 64)
    for part, chats in (("train", train + validation), ("test", test)):
        with open(held_out.data_path("chats", f"{part}.jsonl"), encoding="utf-8") as lines:
            assert [json.loads(line)["messages"] for line in lines] == chats


def test_a_person_in_two_sets_is_refused(tokenizer, monkeypatch):
    chats = held_out.read_chats(held_out.data_path("chats", "train.jsonl"), tokenizer, 64)
    monkeypatch.setattr(held_out, "read_chats", lambda *_: [*chats[:-1], chats[0]])
    with pytest.raises(ValueError, match=f"training and validation chats are both about {held_out.person(chats[0])}"):
        held_out.training_validation_test(tokenizer, 64)


def test_the_score_is_that_of_the_chats_given(tokenizer):
    model = load_model(quantization="nf4", hardware=detect("cpu"))
    _, validation, test = held_out.training_validation_test(tokenizer, 64)
    scores = [held_out.score(model, tokenizer, chats[:20]) for chats in (validation, test)]
    assert scores[0]["loss"] != scores[1]["loss"]
    assert scores[1] == {
        "exact_match": evaluation.exact_match(model, tokenizer, test[:20]),
        "loss": pytest.approx(evaluation.loss(model, tokenizer, test[:20]), abs=1e-5),
    }
