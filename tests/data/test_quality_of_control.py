"""The same run on a base with shuffled weights: the knowledge is in the base, not in the adapter."""

import json

import pytest

from data.scripts.measure import tiny_llama as measure
from qlora_helpers.paths import data_path


@pytest.mark.everything
def test_a_shuffled_base_cannot_be_taught_to_answer():
    rate = json.loads(data_path("tiny-llama", "scores.json").read_text())["commonest_answer_rate"]
    assert measure.fine_tuned("shuffled")["after"] <= rate + 0.04
