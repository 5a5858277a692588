"""The memory of a merge, against what was measured."""

import json
from dataclasses import replace

import pytest

from qlora_helpers.adapters.merge import BASES
from qlora_helpers.memory import find_shape, predict_merge
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN

LLAMA_8B = find_shape("meta-llama/Llama-3.1-8B")


@pytest.fixture(scope="module")
def measured():
    return {r["way"]: r for r in json.loads(data_path("measured", "merging.json").read_text())["rows"]}


@pytest.mark.parametrize("into", BASES)
def test_the_memory_of_a_merge_is_predicted(into, measured):
    plan, row = predict_merge(LLAMA_8B, into), measured[into]
    assert plan.peak_bytes == pytest.approx(max(row["base_peak_bytes"], row["merge_peak_bytes"]), rel=0.01)
    if into != "dequantised":  # there, unused memory had not been released yet when it was measured
        assert plan.base_bytes == pytest.approx(row["base_bytes"], rel=0.002)
    assert plan.merged_bytes == pytest.approx(row["bytes"], rel=0.01)


def test_a_larger_rank_and_fewer_layers_change_the_memory_of_a_merge():
    small, large = (predict_merge(LLAMA_8B, "16bit", replace(GPU_RUN, rank=rank)) for rank in (16, 64))
    assert large.peak_bytes - small.peak_bytes == large.adapter_bytes - small.adapter_bytes == 3 * small.adapter_bytes
    narrow = predict_merge(LLAMA_8B, "16bit", replace(GPU_RUN, target_modules=("q_proj",)))
    assert narrow.peak_bytes - narrow.base_bytes - narrow.adapter_bytes == 8 * 4096 * 4096
    narrow = predict_merge(LLAMA_8B, "4bit", replace(GPU_RUN, target_modules=("q_proj",)))
    weight, difference, merged, on_device, packed, scales = 2, 4, 4, 4, 1 / 2, 4 / 64  # bytes of each of its weights
    held = weight + difference + merged + on_device + packed + 2 * scales
    assert narrow.peak_bytes - narrow.base_bytes - narrow.adapter_bytes == held * 4096 * 4096
