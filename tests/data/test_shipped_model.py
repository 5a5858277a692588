"""The shipped model's scores, measured again from the shipped files and compared with its card."""

import json

import pytest

from data.scripts.measure import tiny_llama as measure
from qlora_helpers import evaluation
from qlora_helpers.chats import read_chats
from qlora_helpers.paths import data_path

SCORES = json.loads(data_path("tiny-llama", "scores.json").read_text())


@pytest.fixture(scope="module")
def recall():
    return measure.recall_by_format()


def test_recall_is_what_the_card_says(recall):
    assert {name: [*rows] for name, rows in recall.items()} == {
        name: [*rows] for name, rows in SCORES["recall"].items()
    }
    for name, by_block in recall.items():
        for block_size, score in by_block.items():
            # another processor may decide a few near ties differently
            assert score == pytest.approx(SCORES["recall"][name][block_size], abs=0.003), (name, block_size)


def test_the_formats_differ_in_the_order_of_their_errors(recall):
    full = recall["16 bit"]["-"]
    assert full >= 0.98
    for block_size in ("64", "256"):
        nf4, int4, symmetric, fp4, int3 = (
            recall[name][block_size] for name in ("NF4", "INT4", "INT4 symmetric", "FP4", "INT3")
        )
        assert full - nf4 <= 0.05
        assert nf4 > int4 > symmetric
        assert nf4 > fp4
        assert int3 < fp4 - 0.2
    assert recall["INT4 symmetric"]["64"] > recall["FP4"]["64"]


def test_weights_are_as_normal_as_the_card_says():
    normality = measure.normality()
    assert normality.keys() == SCORES["normality"].keys() and len(normality) == 28
    for name, row in normality.items():
        assert row["qq"] == pytest.approx(SCORES["normality"][name]["qq"], abs=1e-3), name
        assert row["kurtosis"] == pytest.approx(SCORES["normality"][name]["kurtosis"], abs=0.01), name
        assert row["qq"] > 0.99


def test_guessing_gets_nowhere():
    train, test = (read_chats(data_path("chats", f"{part}.jsonl")) for part in ("train", "test"))
    assert evaluation.commonest_answer_rate(train, test) == SCORES["commonest_answer_rate"] < 0.06


def test_the_card_shows_the_measured_tables():
    card = data_path("tiny-llama", "README.md").read_text()
    tables = measure.card_tables(SCORES)
    assert len(tables) >= 2
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table}\n<!-- end of {name} -->" in card, (
            "run: python -m data.scripts.measure.tiny_llama --card-only"
        )
