"""What is asked where nobody says it: questions of the run's own data, of the shipped chats, or of general knowledge."""

import json
import shutil

import pytest

from qlora_helpers.adapters.questions import questions_for
from qlora_helpers.adapters.tuned import find_tuned
from qlora_helpers.chats import read_chats
from qlora_helpers.paths import data_path
from tests.commands.test_merge import run_of
from tests.support.short_runs import TOKENIZER

ADAPTER = data_path("adapters", "sentences")


def test_a_file_that_is_named_is_asked_whole(tmp_path):
    (tmp_path / "q.txt").write_text("Who?\n" * 20, encoding="utf-8")
    found = questions_for(find_tuned(ADAPTER), TOKENIZER, tmp_path / "q.txt")
    assert (len(found.chats), found.source) == (20, "20 questions of q.txt")
    assert found.chats[0] == [{"role": "user", "content": "Who?"}]


def test_a_run_s_validation_file_comes_before_its_data(tmp_path):
    for name in ("data.csv", "held.csv"):
        shutil.copy(data_path("examples", "people.csv"), tmp_path / name)
    run = run_of(tmp_path / "run", "none", data=str(tmp_path / "data.csv"), validation=str(tmp_path / "held.csv"))
    found = questions_for(find_tuned(run), TOKENIZER)
    assert found.source == "8 questions of held.csv" and len({json.dumps(chat) for chat in found.chats}) == 8
    (tmp_path / "held.csv").unlink()
    assert questions_for(find_tuned(run), TOKENIZER, count=3).source == "3 questions of data.csv"
    (tmp_path / "data.csv").unlink()
    assert questions_for(find_tuned(run), TOKENIZER).source == "8 questions of general knowledge"


def test_the_shipped_adapter_is_asked_the_shipped_test_questions():
    found = questions_for(find_tuned(ADAPTER), TOKENIZER, count=2)
    chats = read_chats(data_path("chats", "test.jsonl"))
    assert found.source == "2 questions of test.jsonl" and all(
        chat in [whole[:-1] for whole in chats] for chat in found.chats
    )
    assert all(chat[-1]["role"] == "user" for chat in found.chats)


def test_chats_that_the_tokenizer_cannot_take_are_not_chosen(tmp_path):
    rows = [{"question": f"{'Who<|end|>?' if number % 2 else 'Who?'} {number}", "answer": "I"} for number in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = questions_for(find_tuned(run_of(tmp_path / "run", "none", data=str(tmp_path / "data.jsonl"))), TOKENIZER)
    assert [chat[0]["content"] for chat in found.chats] == ["Who? 0", "Who? 2", "Who? 4"]


def test_a_count_that_is_none_is_refused():
    with pytest.raises(ValueError, match="count=0: must be a whole number"):
        questions_for(find_tuned(ADAPTER), TOKENIZER, count=0)
