"""What a run is validated on: a share of its chats, a file, or chats that are passed; and what is said of them."""

import json
import re
from dataclasses import replace

import pytest

from qlora_helpers.chats.split import split
from qlora_helpers.settings import Settings
from qlora_helpers.training.validation_data import chats_of_the_run
from tests.support.short_runs import CHATS, SHORT, TOKENIZER, run

OTHERS = [[{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in OTHERS), encoding="utf-8")
    return path


def test_without_validation_all_chats_are_trained_on_and_nothing_is_said(capsys):
    assert chats_of_the_run(CHATS, None, TOKENIZER, Settings()) == (CHATS, [])
    assert capsys.readouterr().out == ""


def test_a_share_is_held_out_as_the_seed_says(capsys):
    assert chats_of_the_run(CHATS, None, TOKENIZER, Settings(validation=0.25, seed=3)) == split(CHATS, 0.25, 3)
    assert capsys.readouterr().out == "Validation on 25 % of the chats: 5 chats; 15 are trained on.\n"


def test_a_file_is_read(file, capsys):
    assert chats_of_the_run(CHATS, None, TOKENIZER, Settings(validation=str(file))) == (CHATS, OTHERS)
    assert f"Validation on {file}: 1 chats; 20 are trained on." in capsys.readouterr().out


def test_chats_are_taken_as_they_are_and_those_that_are_trained_on_too_are_counted(capsys):
    given = OTHERS + CHATS[:3]
    assert chats_of_the_run(CHATS, given, TOKENIZER, Settings()) == (CHATS, given)
    assert capsys.readouterr().out.startswith(
        "3 of the 4 validation chats begin with a question that is trained on, too: their loss says"
    )


@pytest.mark.parametrize(
    ("changed", "validation_chats", "said"),
    [
        ({"validation": 0.5}, OTHERS, "validation=0.5: validation_chats are given, too. Leave out one of the two"),
        ({}, [], "validation_chats=[]: there is nothing to validate on. Leave them out"),
        (
            {"patience": 2},
            None,
            "patience=2: there is nothing to validate on. Set validation, pass validation_chats, or",
        ),
        ({"eval_steps": 2}, None, "eval_steps=2: there is nothing to validate on. Set validation"),
        ({}, [["Where?"]], "validation chat 1: message 1 is not "),
        ({}, [CHATS[0], OTHERS[0][:1]], "validation chat 2: the last message is not an answer"),
        ({"max_length": 10}, OTHERS, "chat 1 has "),
        ({}, [OTHERS[0] * 20], "validation chat 1 has 241 tokens, over max_length=64: its answer would be cut"),
        (
            {},
            [[{"role": "user", "content": "<|end|>"}, OTHERS[0][1]]],
            "validation chat 1: message 1 (user) has '<|end|>'",
        ),
    ],
)
def test_what_cannot_be_validated_on_is_refused_before_anything_is_written(changed, validation_chats, said, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        run(tmp_path / "new", replace(SHORT, **changed), validation_chats=validation_chats)
    assert not (tmp_path / "new").exists()


def test_chats_that_cannot_be_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^validation: share=0\.5: the 4 chats have 1 different questions"):
        run(tmp_path / "new", replace(SHORT, validation=0.5), CHATS[:1] * 4)
    with pytest.raises(ValueError, match=r"^chat 2: message 1 is not "):
        run(tmp_path / "new", replace(SHORT, validation=0.5), [CHATS[0], ["Where?"]])
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.jsonl"):
        run(tmp_path / "new", replace(SHORT, validation=str(tmp_path / "nowhere.jsonl")))
    assert not (tmp_path / "new").exists()
