"""The script that measures where a step's time goes on a CPU, and its table."""

import json

import pytest

from data.scripts.measure import cpu_profile
from qlora_helpers.paths import data_path
from qlora_helpers.training.step_profile import GROUPS, with_shares


def test_a_way_is_run_and_profiled_in_a_process():
    profile = cpu_profile.in_a_process("this course", steps=18, profiled=2)["parts"]
    assert profile["groups"].keys() == GROUPS.keys()
    assert profile["groups"]["matrix products"]["calls"] > 100
    assert profile["groups"]["decoding 4-bit weights"]["seconds"] == 0  # it was done before the first step
    shares = with_shares(profile, 1.0)
    assert sum(group["share"] for group in shares["groups"].values()) == pytest.approx(1)


def test_the_table_is_whole():
    table = json.loads(data_path("measured", "cpu_profile.json").read_text(encoding="utf-8"))
    assert [row["way"] for row in table["rows"]] == list(cpu_profile.WAYS) and table["bit_identical"]
    assert table["rows"][0]["of_plain"] == 1 > table["rows"][-1]["of_plain"]
    for profile in table["profiles"].values():
        assert sum(group["share"] for group in profile["groups"].values()) == pytest.approx(1)
