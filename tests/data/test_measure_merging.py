"""The script that measures merges of an 8B model, and its table."""

import json
import shutil

import pytest

from data.scripts.measure import merging as measure_merging
from qlora_helpers.paths import data_path
from tests.support.merged_models import BASE


@pytest.fixture(scope="module")
def measured():
    return {r["way"]: r for r in json.loads(data_path("measured", "merging.json").read_text())["rows"]}


def test_every_way_was_measured_at_full_size(measured):
    assert list(measured) == [*measure_merging.WAYS, "16bit, from file to file"]
    assert measured["16bit, from file to file"]["differing_values"] == 0


def test_what_a_step_is_compared_with_is_measured_first():
    assert measure_merging.steps_of(None) == [*measure_merging.WAYS, "files"]
    assert measure_merging.steps_of(["4bit"]) == ["unmerged", "4bit"]
    assert measure_merging.steps_of(["files"]) == ["unmerged", "16bit", "files"]


def test_the_script_measures_each_way(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_merging, "STEPS", 2)
    monkeypatch.setattr(measure_merging, "TOKENS", 32)
    base, adapter, merged = (tmp_path / name for name in ("tiny-llama", "adapter", "merged"))
    shutil.copytree(BASE, base)
    trained = measure_merging.train_adapter(base, adapter)
    assert trained["trained_parameters"] == 262_144 and len(trained["losses"]) == 2
    rows = {
        way: measure_merging.measure(way, base, adapter, merged, tmp_path / "logits.pt")
        for way in ("unmerged", "16bit", "16bit, then 4bit")
    }
    assert rows["unmerged"]["largest"] == 0 < rows["16bit, then 4bit"]["mean"]
    assert rows["16bit"]["disk_bytes"] == (merged / "model.safetensors").stat().st_size
    assert measure_merging.file_merge(base, adapter, merged)["tensors"] == 39
