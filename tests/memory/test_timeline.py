"""Timelines of a step: from the allocator's history, from counted storages, and their methods."""

import pytest
import torch
from transformers import PrinterCallback

from qlora_helpers.chats import read_chats
from qlora_helpers.hardware import detect
from qlora_helpers.memory.phases import IN_A_STEP
from qlora_helpers.memory.timeline import (
    BETWEEN,
    AllocatorHistory,
    PhaseTracker,
    StorageHistory,
    Timeline,
    from_history,
    record_step,
)
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.trainer import build_trainer

LINE = Timeline(
    (0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
    (10, 30, 20, 90, 40, 15),
    (("forward", 0), ("backward", 2), ("optimizer step", 5)),
)


def test_a_timeline_knows_its_peak_and_its_phases():
    assert (LINE.peak, LINE.peak_phase) == (90, "backward")
    assert [LINE.phase_at(point) for point in (0, 1, 2, 4, 5)] == [
        "forward",
        "forward",
        "backward",
        "backward",
        IN_A_STEP[3],
    ]
    assert LINE.spans() == [("forward", 0, 2), ("backward", 2, 5), ("optimizer step", 5, 5)]
    assert [LINE.most_in(name) for name in ("forward", "backward", "optimizer step", "loss")] == [30, 90, 15, 0]


def test_thinning_keeps_marks_and_extremes():
    count = 10_000
    levels = [1_000 + (point * 7_919) % 500 for point in range(count)]
    levels[1_234], levels[7_000] = 9_999, 1
    full = Timeline(
        tuple(point / 1_000 for point in range(count)), tuple(levels), (("forward", 0), ("backward", 6_999))
    )
    thin = full.thinned(50)
    assert len(thin.levels) <= 4 * 50 + 2
    assert (thin.peak, thin.peak_phase, min(thin.levels)) == (9_999, "forward", 1)
    assert thin.seconds[-1] == full.seconds[-1] and list(thin.seconds) == sorted(thin.seconds)
    assert [thin.seconds[first] for _, first in thin.marks] == [0.0, 6.999]
    with pytest.raises(ValueError, match="bins is 0"):
        full.thinned(0)


def test_a_timeline_survives_json_but_for_the_last_digits():
    line = Timeline((0.0, 0.0000014, 2.5), (4_096, 1_048_576 + 500, 2_048), (("load", 0), ("forward", 1)))
    back = Timeline.from_json(line.to_json())
    assert back.seconds == (0.0, 0.000001, 2.5) and back.marks == line.marks
    assert all(abs(a - b) <= 512 for a, b in zip(back.levels, line.levels, strict=True))


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (((0.0,), (1, 2), (("load", 0),)), "levels 2"),
        (((0.0,), (1,), (("load", 1),)), "marks"),
        (((), (), ()), "points"),
    ],
)
def test_a_timeline_that_makes_no_sense_is_refused(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        Timeline(*arguments)


def test_the_allocator_s_history_becomes_a_timeline():
    def entry(action, size, microseconds):
        return {"action": action, "size": size, "time_us": 1_000_000 + microseconds}

    history = [
        entry("alloc", 1_000, 0),
        entry("segment_alloc", 2_097_152, 5),  # not a tensor
        entry("alloc", 512, 10),
        # here the run was halted for 100 microseconds, while the entries were counted
        entry("alloc", 2_048, 120),
        entry("free_requested", 1_000, 130),
        entry("free_completed", 1_000, 131),
    ]
    line = from_history(history, [("forward", 1, 0.0), ("backward", 3, 100.0)], start=10_000)
    assert line.levels == (11_024, 11_536, 13_584, 12_560)  # in blocks of 512
    assert line.seconds == pytest.approx((0.0, 10e-6, 20e-6, 30e-6), abs=1e-9)
    assert line.marks == ((BETWEEN, 0), ("forward", 1), ("backward", 2))


def test_the_pauses_of_all_marks_are_taken_out_of_the_time():
    history = [{"action": "alloc", "size": 512, "time_us": moment} for moment in (1_000, 1_110, 1_320, 1_330, 1_730)]
    marks = [("forward", 0, 50.0), ("loss", 1, 100.0), ("backward", 2, 200.0), ("optimizer step", 4, 400.0)]
    line = from_history(history, marks, start=0)
    assert line.seconds == pytest.approx((0.0, 10e-6, 20e-6, 30e-6, 30e-6), abs=1e-9)
    assert line.marks == (("forward", 0), ("loss", 1), ("backward", 2), ("optimizer step", 4))


def test_the_allocator_is_recorded_from_the_beginning_to_the_end(monkeypatch):
    entries = [{"action": "alloc", "size": 512, "time_us": 0}] * 3  # of an earlier recording
    recorded, held = [], iter((4_096, 4_096, 5_120))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: recorded.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"device_traces": [list(entries)]})
    history = AllocatorHistory()
    history.begin()
    history.mark("forward")
    entries.append({"action": "alloc", "size": 1_024, "time_us": 10})
    history.mark("backward")
    entries.append({"action": "free_requested", "size": 1_024, "time_us": 10_000_000})
    line = history.end()
    assert line.levels == (5_120, 4_096) and line.marks == (("forward", 0), ("backward", 1))
    assert history.held == [4_096, 5_120]
    assert [options.get("enabled", "on") for options in recorded] == ["on", None]


def test_storages_are_counted_until_they_are_freed():
    held = torch.zeros(1_000)
    history = StorageHistory(lambda: [held, held[:10]])
    history.begin()
    history.mark("forward")
    made = torch.ones(500)
    view = made[:100] + 0
    del made
    history.mark("backward")
    view.mul_(2)
    del view
    last = torch.ones(250)
    line = history.end()
    assert line.levels == (4_000, 6_000, 6_400, 4_400, 4_000, 5_000)
    assert [line.most_in(name) for name in ("forward", "backward")] == [6_400, 5_000]
    del last


class Phases(PhaseTracker):
    def __init__(self):
        self.seen = []
        super().__init__(self.seen.append)


def trainer(tmp_path, **settings):
    chats = read_chats(data_path("chats", "train.jsonl"))[:64]
    cpu = detect("cpu")
    options = {"steps": 2, "batch_size": 4} | settings
    made = build_trainer(load_model(hardware=cpu), load_tokenizer(), chats, tmp_path, Settings(**options), cpu)
    made.remove_callback(PrinterCallback)
    return made


def test_a_tracker_sees_the_phases_of_each_pass_in_order(tmp_path):
    made, phases = trainer(tmp_path, accumulation=2), Phases()
    phases.attach(made)
    made.train()
    once = ["forward", "loss", "backward"]
    assert phases.seen[: 2 * len(once) + 1] == [*once, *once, "optimizer step"]
    assert phases.seen.count("optimizer step") == 2
    phases.seen.clear()
    with pytest.raises(ValueError, match="in the middle"), phases.hold("evaluation"):
        phases.enter("forward")
        raise ValueError("in the middle")
    assert phases.phase == "evaluation" and phases.seen == ["evaluation"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return {
        kept: record_step(trainer(tmp_path_factory.mktemp("run"), gradient_checkpointing=not kept))
        for kept in (False, True)
    }


def test_a_real_step_is_recorded_on_a_cpu(recorded):
    for line in recorded.values():
        assert [name for name, _ in line.marks] == [BETWEEN, *IN_A_STEP]
        assert all(level > 0 for level in line.levels)
        # the model, its adapters and the optimizer states are there before and after
        assert line.levels[-1] == pytest.approx(line.levels[0], rel=0.02)


def test_checkpointing_lowers_the_forward_pass_and_makes_the_backward_pass_longer(recorded):
    checkpointed, kept = recorded[False], recorded[True]
    assert checkpointed.most_in("forward") < 0.8 * kept.most_in("forward")
    operations = {
        name: {phase: last - first for phase, first, last in line.spans()}
        for name, line in (("checkpointed", checkpointed), ("kept", kept))
    }
    assert operations["checkpointed"]["backward"] > 1.2 * operations["kept"]["backward"]


def test_a_step_that_will_not_come_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step is 3; the trainer's max_steps is 2"):
        record_step(trainer(tmp_path), 3)
