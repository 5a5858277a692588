"""The GPUs that are known by name."""

import json

import pytest

from qlora_helpers.memory import find_gpu, gpus, known_gpus
from qlora_helpers.units import GIB


@pytest.mark.parametrize("gpu", known_gpus().values(), ids=lambda gpu: gpu.name)
def test_a_gpu_is_found_by_the_name_that_torch_gives_it(gpu):
    assert find_gpu(gpu.name) == gpu


def test_known_gpus_have_less_usable_memory_than_their_name_says():
    wanted = {"t4", "p100", "v100", "l4", "a10", "3060", "3090", "4090", "5090", "a100-40", "a100-80", "h100", "h200"}
    table = json.loads(gpus.TABLE.read_text())
    assert wanted <= set(known_gpus())
    for key, gpu in known_gpus().items():
        assert 0.9 * table[key]["nominal_gib"] < gpu.usable_bytes / GIB < table[key]["nominal_gib"]
    assert find_gpu("A100 80GB") == find_gpu("a100-80") != find_gpu("a100-40")
