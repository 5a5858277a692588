"""The script that compares torch's allocator with its simulation, where there is no GPU: the simulator plays the GPU."""

import json
import re
from itertools import count

import pytest

from data.scripts.measure import allocator as measure
from qlora_helpers.memory import allocator
from qlora_helpers.memory.allocator import CachingAllocator
from qlora_helpers.paths import data_path
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
            assert found["agreement"]["real"] == found["agreement"]["ascending"]
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


# The table


@pytest.fixture(scope="module")
def table():
    return json.loads(data_path("measured", "allocator.json").read_text(encoding="utf-8"))


def total(rows, way, figure):
    """The share of the events of all traces after which a figure agrees."""
    known = [row for row in rows if row["agreement"][way][figure] is not None]
    return sum(row["agreement"][way][figure] * row["events"] for row in known) / sum(row["events"] for row in known)


def test_the_table_has_every_planned_trace(table):
    planned = [
        (settings, name, len(trace)) for settings in measure.SETTINGS for name, trace, _ in measure.plan(settings)
    ]
    random = [row for row in table["rows"] if "streams" not in row]
    assert [(row["settings"], row["trace"], row["events"]) for row in random] == planned
    histories = [row for row in table["rows"] if "streams" in row]
    assert [row["settings"] for row in histories] == list(measure.SETTINGS)
    assert all(row["history_is_complete"] and row["streams"] == 1 for row in histories)
    assert sum(row["failed"] for row in random) > 50  # the rule for a full card was at work, too


def test_with_the_real_addresses_the_simulator_is_never_wrong(table):
    for row in table["rows"]:
        real = row["agreement"]["real"]
        assert {real["reserved"], real["failed"]} == {1} and real["allocated"] in (None, 1), row["trace"]
        assert real["first_difference"] is row["differing_events"] is None
        assert real["largest_difference_bytes"] == real["peak_difference_bytes"] == 0


def test_new_segments_lie_below_the_earlier_ones(table):
    rows = [row for row in table["rows"] if row["settings"] != "expandable_segments"]
    assert sum(row["ascending"] for row in rows) < 0.02 * sum(row["segments"] for row in rows)
    assert total(rows, "descending", "reserved") > 0.95 > 0.85 > total(rows, "ascending", "reserved")


def test_the_allocator_says_what_was_measured(table):
    rows, said = table["rows"], " ".join(allocator.__doc__.split())
    descending = [row["agreement"]["descending"] for row in rows]
    worst = max(abs(found["peak_difference_bytes"]) for found in descending)
    share = max(
        abs(row["agreement"]["descending"]["peak_difference_bytes"]) / row["peak_reserved_bytes"] for row in rows
    )
    assert f"in {len(rows)} traces with {sum(row['events'] for row in rows):,} events" in said
    assert (
        f"each below the last, reserved memory agrees after {total(rows, 'descending', 'reserved'):.0%}".replace(
            "%", " %"
        )
        in said
    )
    assert f"it would agree after {total(rows, 'ascending', 'reserved'):.0%}".replace("%", " %") in said
    assert f"the peak is {worst // MIB} MiB off at most, or {share:.2%}".replace("%", " %") in said
    assert re.search(rf"on an {table['gpu'].split()[-1]} with torch {table['torch'][:4]} ", said)
    assert all(row["agreement"]["real"]["reserved"] == 1 for row in rows)
