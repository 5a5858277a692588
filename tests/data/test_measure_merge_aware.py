"""The script that compares plain runs with merge-aware ones: its plan, its choice of a rate, and one short run of each."""

import pytest

from data.scripts.measure import held_out
from data.scripts.measure import merge_aware as script
from data.scripts.measure.runs_at_rates import Job


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
