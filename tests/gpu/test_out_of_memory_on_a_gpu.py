"""A real out-of-memory error under a cap, and a timeline from the allocator's own history."""

import gc

import pytest
import torch
from transformers import PrinterCallback

from qlora_helpers.chats import read_chats
from qlora_helpers.hardware import detect
from qlora_helpers.memory.out_of_memory import read_message
from qlora_helpers.memory.phases import IN_A_STEP
from qlora_helpers.memory.timeline import record_step
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.trainer import build_trainer
from qlora_helpers.units import GIB, MIB


def test_every_number_of_a_real_message_is_read():
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit, before = torch.cuda.memory_reserved() + GIB, torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            kept = [torch.empty(GIB // 4, dtype=torch.int8, device="cuda") for _ in range(5)]
            print(len(kept))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"\n{caught.value}")
    message = read_message(str(caught.value))
    assert message.asked_bytes == 256 * MIB
    assert message.allowed_bytes == pytest.approx(limit, rel=0.005)
    assert message.total_bytes == pytest.approx(total, rel=0.005)
    assert message.allocated_bytes == pytest.approx(before + GIB, rel=0.01)
    assert message.missing_bytes > 0


def test_a_timeline_from_the_history_has_the_peak_that_torch_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_GEAR", "ampere")
    chats = read_chats(data_path("chats", "train.jsonl"))[:64]
    trainer = build_trainer(load_model(), load_tokenizer(), chats, tmp_path, Settings(steps=2), detect())
    trainer.remove_callback(PrinterCallback)
    line = record_step(trainer)
    assert {name for name, _ in line.marks} >= set(IN_A_STEP)
    # a block may be larger than the request if the rest is too small to split off
    assert line.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.03)
