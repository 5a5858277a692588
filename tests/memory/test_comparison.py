"""Predicted beside measured, and what stands out."""

import re

import pytest
import torch

from qlora_helpers.memory import predict
from qlora_helpers.memory.comparison import compare
from qlora_helpers.memory.live_run import settings_of, shape_of
from qlora_helpers.memory.measurement import Measurement, MemoryCallback
from qlora_helpers.units import MIB
from tests.memory.made_up import steps


@pytest.fixture
def prediction(trained):
    trainer, _ = trained
    return predict(shape_of(trainer), settings_of(trainer), "t4")


class FakeGPU:
    """A GPU whose figures are set by hand; it records when memory is freed and when its peak is reset."""

    def __init__(self, monkeypatch):
        self.allocated = self.peak = self.reserved = self.used = 0
        self.calls = []
        for name, answer in {
            "memory_allocated": lambda: self.allocated,
            "max_memory_allocated": lambda: self.peak,
            "max_memory_reserved": lambda: self.reserved,
            "mem_get_info": lambda: (1_000 * MIB - self.used, 1_000 * MIB),
            "empty_cache": lambda: self.calls.append("empty"),
            "reset_peak_memory_stats": lambda: self.calls.append("reset"),
            "get_device_name": lambda: "Fake",
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def run_as(self, prediction, off=0.0):
        """A run that takes what was predicted, with a peak that is `off`; the first step has a higher one."""
        measurement = Measurement(on_gpu=True)
        with measurement.phase("load"):
            self.allocated = prediction.loaded_bytes
        callback = MemoryCallback(measurement)
        callback.on_train_begin(None, None, None)
        self.peak = 10 * prediction.peak_allocated_bytes
        callback.on_step_end(None, None, None)
        self.peak = round(prediction.peak_allocated_bytes / (1 + off))
        self.reserved, self.used = prediction.peak_reserved_bytes, prediction.device_bytes
        callback.on_step_end(None, None, None)
        callback.on_train_end(None, None, None)
        return measurement


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch)


def test_the_gpu_s_figures_are_read_at_the_end_of_each_phase(gpu, prediction):
    measurement = gpu.run_as(prediction)
    load, first, steady = measurement.phases.values()
    assert load.allocated_bytes == prediction.loaded_bytes and load.peak_allocated_bytes == 0
    assert first.peak_allocated_bytes == 10 * prediction.peak_allocated_bytes
    assert steady.peak_allocated_bytes == prediction.peak_allocated_bytes
    assert steady.peak_reserved_bytes == prediction.peak_reserved_bytes
    assert steady.device_used_bytes == prediction.device_bytes
    # between the steps nothing is freed: the allocator is left as it is
    assert gpu.calls == ["empty", "reset", "empty", "reset", "reset"]


def difference(table, row):
    """The percentage and the mark in a row."""
    found = re.search(rf"^{row} .*iB +([+-][\d.]+) %(.*)$", table, re.M)
    return float(found[1]), found[2].strip()


@pytest.mark.parametrize(
    ("off", "mark"), [(0.0, ""), (0.098, ""), (0.102, "over 10 %"), (-0.098, ""), (-0.102, "over 10 %")]
)
def test_a_difference_of_more_than_10_per_cent_is_marked(off, mark, gpu, prediction):
    table = compare(prediction, gpu.run_as(prediction, off))
    assert difference(table, "peak, allocated") == (pytest.approx(100 * off, abs=0.051), mark)
    for row in ("after loading", "peak, reserved", "on the card"):
        assert difference(table, row) == (0.0, "")
    assert table.startswith("qlora, 3 x 48 tokens, predicted for a Tesla T4, measured on a Fake\n")


def test_every_part_of_the_prediction_is_listed(gpu, prediction):
    table = compare(prediction, gpu.run_as(prediction))
    listed = [line.split("  ")[1] for line in table.splitlines() if line.startswith("  ")]
    assert [name for name, size in prediction.parts.items() if size] == [n.strip() for n in listed if n.strip()]
    assert re.search(r"^first step .*iB", table, re.M)


def test_on_a_cpu_nothing_stands_beside_the_prediction(trained, prediction):
    table = compare(prediction, trained[1])
    assert "No GPU was measured here" in table and "over 10 %" not in table
    assert re.search(r"^peak, allocated +[\d.]+ MiB +-$", table, re.M)
    assert re.search(r"^steady steps +(- +){4}[\d.]+ [MG]iB$", table, re.M)


def test_a_run_of_one_step_is_not_compared(prediction):
    callback = MemoryCallback(Measurement(on_gpu=False))
    steps(callback, [False])
    with pytest.raises(ValueError, match=r"no 'steady steps' but \['first step'\]: train two steps or more"):
        compare(prediction, callback.measurement)
