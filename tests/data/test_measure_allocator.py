"""The script that compares torch's allocator with its simulation, where there is no GPU: the simulator plays the GPU."""

from itertools import count

import pytest

from data.scripts.measure import allocator as measure
from qlora_helpers.memory.allocator import CachingAllocator
from qlora_helpers.units import GIB, MIB


class Recorder:
    """Addresses as they are given to an allocator that plays the GPU."""

    def __init__(self, source):
        self.source, self.given = source, []

    def __next__(self):
        self.given.append(next(self.source))
        return self.given[-1]


def compare(trace, settings="default", limit=None, source=None, **changed):
    where = Recorder(source or count(2**40, 2**36))
    gpu = CachingAllocator(limit=limit, addresses=where, **(measure.SETTINGS[settings][1] | changed))
    real = measure.perform(trace, measure.Simulated(gpu))
    return measure.row(settings, "a trace", trace, real, where.given, limit)


@pytest.mark.parametrize("settings", measure.SETTINGS)
def test_every_planned_trace_agrees_with_a_gpu_that_keeps_the_rules(settings):
    names = []
    for name, trace, limit in measure.plan(settings):
        names.append(name)
        if name.endswith("0"):
            found = compare(trace[:1_500], settings, limit)
            assert found["agreement"]["real"] | {"largest_difference_bytes": 0} == found["agreement"]["ascending"]
            assert found["agreement"]["real"]["reserved"] == found["agreement"]["real"]["allocated"] == 1
            assert found["differing_events"] is None and found["ascending"] == found["segments"]
    assert len(set(names)) == len(names)


def test_traces_are_mixed_and_bounded():
    for trace in (measure.mixed_trace(0), measure.training_trace(0)):
        sizes, freed, live, most = [], set(), 0, 0
        for event in trace:
            if event < 0:
                assert ~event not in freed and ~event < len(sizes)
                freed.add(~event)
                live -= sizes[~event]
            else:
                sizes.append(event)
                live += event
                most = max(most, live)
        assert min(sizes) < 100_000 and 100 * MIB < max(sizes) < 400 * MIB
        assert GIB < most < 1.2 * measure.LIVE
    assert measure.mixed_trace(1) == measure.mixed_trace(1) != measure.mixed_trace(2)
    assert measure.EMPTY in measure.mixed_trace(1, empties=True)
    limited = compare(measure.mixed_trace(300, most=2 * measure.LIMIT), limit=measure.LIMIT)
    assert limited["failed"] > 10


def test_another_rule_and_other_addresses_show():
    trace = measure.mixed_trace(5)
    wrong = compare(trace, large_segment_size=40 * MIB)
    assert wrong["agreement"]["ascending"]["reserved"] < 0.5 and wrong["differing_events"]
    assert abs(wrong["agreement"]["ascending"]["largest_difference_bytes"]) >= 20 * MIB
    down = compare(trace, source=count(2**46, -(2**38)))["agreement"]
    assert down["real"]["reserved"] == down["descending"]["reserved"] == 1
    assert down["ascending"]["first_difference"] is not None


def test_the_transformer_trains():
    measure.train(lengths=(4, 5), width=64, layers=1, device="cpu")


def entry(action, addr, size):
    return {"action": action, "addr": addr, "size": size, "stream": 0}


def test_a_history_of_torch_becomes_a_trace():
    entries = [
        entry("segment_alloc", 10, 20 * MIB),
        entry("alloc", 10, 9 * MIB),
        entry("alloc", 10 + 9 * MIB, 9 * MIB),
        entry("free_requested", 10, 9 * MIB),
        entry("free_completed", 10, 9 * MIB),
        entry("alloc", 10, 4 * MIB),
        entry("segment_alloc", 5, 10 * MIB),
        {"action": "oom", "device_free": 0, "size": 10 * MIB, "stream": 0},
        entry("alloc", 5, 10 * MIB),
        entry("segment_free", 99, 0),
    ]
    trace, real = measure.from_history(entries)
    assert trace == [9 * MIB, 9 * MIB, ~0, 4 * MIB, 10 * MIB]
    assert [held[1] // MIB for held in real] == [20, 20, 20, 20, 30]
    found = measure.row("default", "history", trace, real, [10, 5], None)["agreement"]["real"]
    assert (found["reserved"], found["allocated"], found["first_difference"]) == (1, None, None)
    assert found["peak_difference_bytes"] == 0
