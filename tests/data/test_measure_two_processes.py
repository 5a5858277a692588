"""The script that holds a run of two processes against one of one process, and its table."""

import json

import pytest
import torch
from safetensors.torch import save_file

from data.scripts.measure import two_processes
from qlora_helpers.chats import read_chats
from qlora_helpers.paths import data_path


@pytest.fixture(scope="module")
def table() -> dict:
    return json.loads(data_path("measured", "two_processes.json").read_text(encoding="utf-8"))


def test_the_table_is_whole(table):
    assert [row["row"] for row in table["rows"]] == list(two_processes.ROWS)
    assert [row["processes"] for row in table["rows"]] == [1, 2, 2]
    assert [row["chats_of_a_step"] for row in table["rows"]] == [16, 16, 32]
    assert all(row["loss_history"][-1][0] == table["steps"] for row in table["rows"])


def test_two_processes_learned_what_one_learned_and_twice_the_chats_did_not(table):
    one, two, twice = table["rows"]
    assert one["distance"] == 0 < two["distance"] < 1e-4 < 0.1 < twice["distance"]
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=5e-3)
    losses = [dict(row["loss_history"]) for row in (one, two)]
    assert losses[0].keys() == losses[1].keys()
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_chats_have_one_question_or_three_and_none_comes_twice():
    chats = read_chats(data_path("chats", "train.jsonl"))
    found = two_processes.mixed(chats, 10)
    assert [len(chat) for chat in found] == [2, 6] * 5
    flat = [[message for chat in some for message in chat] for some in (found, chats[:20])]
    assert flat[0] == flat[1]
    assert len(two_processes.mixed(chats, two_processes.CHATS)[-1]) == 6, "there are enough of them"


def test_the_distance_is_a_share_of_the_second_adapter(tmp_path):
    for name, values in {"a": [3.0, 4.0], "b": [0.0, 4.0]}.items():
        folder = tmp_path / name / "run" / "adapter"
        folder.mkdir(parents=True)
        save_file({"x": torch.tensor(values)}, folder / "adapter_model.safetensors")
    assert two_processes.distance(tmp_path / "b", tmp_path / "a") == pytest.approx(3 / 5)
    assert two_processes.distance(tmp_path / "a", tmp_path / "b") == pytest.approx(3 / 4)
    assert two_processes.distance(tmp_path / "a", tmp_path / "a") == 0


@pytest.mark.everything
def test_two_processes_learn_what_one_learns_here(capsys):
    one, two, twice = two_processes.measure(steps=4)["rows"]
    assert two["distance"] < 1e-3 < twice["distance"]
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)
