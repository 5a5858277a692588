"""The script that compares plain runs with merge-aware ones: its plan, its choice of a rate, one short run of each, and its table."""

import functools
import json
import statistics

import pytest
from scipy import stats

from data.scripts.measure import held_out
from data.scripts.measure import merge_aware as script
from data.scripts.measure.runs_at_rates import Job
from qlora_helpers.statistics import difference


def test_plain_and_merge_aware_runs_are_tried_at_the_same_rates_and_seeds():
    for steps, rates in script.RATES.items():
        plain, aware = (
            {(job.rate, job.seed) for job in script.JOBS if job.kind == script.name(steps, share)}
            for share in script.SHARES
        )
        assert plain == aware == {(rate, seed) for rate in rates for seed in range(5)}
    for job in script.JOBS:
        share = script.settings_of(job).merge_aware
        assert script.name(script.settings_of(job).steps, share or 0.0) == job.kind


def test_each_way_has_its_own_rate():
    def run(rate, **found):
        ways = {way: {"exact_match": value} for way, value in found.items()}
        return {"kind": "k", "learning_rate": rate, "seed": 0, "validation": ways, "test": {}}

    runs = [run(1e-3, beside=0.9, merged=0.5), run(2e-3, beside=0.8, merged=0.7)]
    assert [script.rate_of(runs, "k", way) for way in ("beside", "merged")] == [1e-3, 2e-3]


@pytest.mark.everything
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_script_scores_each_way_to_use_a_run(share, monkeypatch):
    whole = held_out.training_validation_test
    monkeypatch.setattr(
        held_out,
        "training_validation_test",
        lambda *args: [chats[: 40 - 10 * n] for n, chats in enumerate(whole(*args))],
    )
    kind = script.name(6, share)
    monkeypatch.setattr(script, "KINDS", {kind: (6, share, 1)})
    monkeypatch.setattr(script, "COMPARED", 10)
    found = script.measure(Job(kind, 2e-3, 0))
    ways = script.WAYS if not share else (script.AS_TRAINED, script.BESIDE, script.INTO_4_BITS)
    for part in ("validation", "test", "recall", "drift", "same_answers"):
        assert list(found[part]) == list(ways)
    trained, merged, beside = (found["test"][way] for way in (script.AS_TRAINED, script.INTO_4_BITS, script.BESIDE))
    assert found["drift"][script.AS_TRAINED]["largest"] == 0
    if share:
        assert found["drift"][script.INTO_4_BITS]["largest"] == 0 and found["same_answers"][script.INTO_4_BITS] == 1
        assert trained == merged != beside
    else:
        assert found["drift"][script.INTO_4_BITS]["largest"] > 0
        assert trained == beside != merged


# ---- The table, on which lesson 6 and the README lean


@functools.cache
def runs():
    return json.loads(script.TABLE.read_text(encoding="utf-8"))["runs"]


def at(kind, rate, way):
    found = sorted(
        (run for run in runs() if (run["kind"], run["learning_rate"]) == (kind, rate)), key=lambda run: run["seed"]
    )
    return [run["test"][way]["exact_match"] for run in found]


def chosen(kind, way=script.INTO_4_BITS):
    """Each seed's exact match on the test questions, at the rate that validation has chosen for this way."""
    return at(kind, script.rate_of(runs(), kind, way), way)


def test_the_table_has_all_runs_and_each_way_to_use_them():
    found = [(run["kind"], run["learning_rate"], run["seed"]) for run in runs()]
    assert found == [(job.kind, job.rate, job.seed) for job in script.JOBS] and len(found) == len(set(found)) == 147
    for kind, (steps, share, seeds) in script.KINDS.items():
        mine = [run for run in runs() if run["kind"] == kind]
        assert {run["seed"] for run in mine} == set(range(seeds)) and seeds == (3 if share in script.MORE_SHARES else 5)
        assert len({run["learning_rate"] for run in mine}) == len(script.RATES[steps]) == 3
        ways = script.WAYS if not share else (script.AS_TRAINED, script.BESIDE, script.INTO_4_BITS)
        for run in mine:
            for part in ("validation", "test", "recall", "drift", "same_answers"):
                assert tuple(run[part]) == ways


def test_a_rate_is_chosen_by_validation_alone():
    hidden = [{**run, "test": None} for run in runs()]
    elsewhere = 0
    for kind, (steps, share, _) in script.KINDS.items():
        for way in script.WAYS if not share else (script.AS_TRAINED, script.BESIDE, script.INTO_4_BITS):
            rate = script.rate_of(hidden, kind, way)
            elsewhere += rate != max(script.RATES[steps], key=lambda tried: sum(at(kind, tried, way)))
    assert elsewhere > 0  # the test questions would have chosen otherwise


def test_a_merge_aware_run_merged_into_4_bits_is_the_model_that_was_trained_in_every_run():
    for run in runs():
        if "plain" in run["kind"]:
            assert 0.5 < run["same_answers"][script.INTO_4_BITS] < 1
            continue
        assert run["same_answers"][script.INTO_4_BITS] == 1 and run["drift"][script.INTO_4_BITS]["largest"] == 0
        assert run["test"][script.INTO_4_BITS] == run["test"][script.AS_TRAINED]
        assert run["same_answers"][script.BESIDE] < 1


def test_one_of_the_gains_would_hold_with_wider_intervals():
    """Those of 99 %: of the 16 comparisons of lesson 6, some come out as differences by chance."""
    aware, gains = chosen("300 steps, last 30 %"), {}
    for way in (script.INTO_4_BITS, script.ROUNDED_AGAIN):
        gains[way] = difference(aware, chosen("300 steps, plain", way))
        assert not gains[way].is_noise and gains[way].mean > 0
    wider = {way: found.standard_error * stats.t.ppf(0.995, found.count - 1) for way, found in gains.items()}
    assert gains[script.INTO_4_BITS].mean > wider[script.INTO_4_BITS]
    assert gains[script.ROUNDED_AGAIN].mean < wider[script.ROUNDED_AGAIN]


def test_at_twice_the_rate_the_plain_merge_loses_nothing_that_is_seen():
    lost = {
        rate: difference(*(at("200 steps, plain", rate, way) for way in (script.INTO_4_BITS, script.AS_TRAINED)))
        for rate in (1e-3, 2e-3)
    }
    assert not lost[1e-3].is_noise and lost[1e-3].mean < -0.2
    assert lost[2e-3].is_noise and lost[2e-3].mean > 0


def test_a_run_that_is_merge_aware_from_the_start_takes_more_than_twice_as_long():
    plain, from_the_start = (
        statistics.fmean(run["seconds_per_step"] for run in runs() if run["kind"] == kind)
        for kind in ("200 steps, plain", "200 steps, last 100 %")
    )
    assert 2 < from_the_start / plain < 3


def test_the_figure_of_lesson_6_shows_what_its_alt_text_says():
    merged = {}
    for steps, rates in script.RATES.items():
        for rate in rates:
            for kind in ("plain", "last 30 %"):
                unmerged = at(f"{steps} steps, plain", rate, script.AS_TRAINED)
                found = difference(at(f"{steps} steps, {kind}", rate, script.INTO_4_BITS), unmerged)
                merged[steps, rate, kind] = 100 * found.mean
    assert round(merged.pop((200, 1e-3, "plain"))) == -23 and round(merged.pop((200, 1e-3, "last 30 %"))) == -5
    assert -7 < min(merged.values()) < -6 and 1 < max(merged.values()) < 2
