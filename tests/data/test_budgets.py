"""Thirty runs within memory budgets: drawn by a seed, and what was measured of them."""

import json

from data.scripts.measure import budgets
from qlora_helpers.units import GIB

MEASURED = json.loads(budgets.TABLE.read_text(encoding="utf-8"))
ROWS, COMPARED = MEASURED["rows"], MEASURED["compared"]


def test_the_runs_that_were_measured_are_those_that_the_seed_draws():
    drawn = {row["label"]: row for row in budgets.draw()}
    assert len(drawn) == budgets.COUNT == len(ROWS)
    for row in ROWS:
        assert {name: row[name] for name in drawn[row["label"]]} == drawn[row["label"]]


def test_no_run_died_of_memory_and_none_took_more_than_its_budget():
    for row in ROWS:
        assert row["outcome"] == "ran" and not row["fell_back"], row["label"]
        assert row["peak_allocated"] < row["budget"] * GIB
        off = row["peak_allocated"] / row["predicted_peak_allocated"] - 1
        assert -0.1 < off < 0.04  # more than predicted by no more than the margin
        if not row["options"]["packing"] and not row["options"]["compile_layers"]:
            assert -0.04 < off < 0.025, row["label"]


def test_what_was_chosen_is_not_much_slower_than_what_else_there_was():
    """As the README says. The slower one waits for the CPU at half of its time, and was measured once."""
    best = {}
    for row in COMPARED:
        at = row["label"], row["compared"]
        best[at] = max(best.get(at, 0), row["pace"])
    paces = sorted(best[label, "chosen"] / best[label, "other"] for label in {label for label, _ in best})
    assert len(paces) == budgets.COMPARED
    assert 0.75 < paces[0] < 1 < paces[1]


def test_runs_side_by_side_are_all_returned_and_an_error_is_one_of_them(monkeypatch, tmp_path):
    monkeypatch.setattr(budgets, "measure", lambda row, more: {"half": 12 / row["number"]})
    found = budgets.in_processes([({"number": number}, None) for number in (1, 0, 3)], str(tmp_path / "log"), 2)
    assert sorted((row["number"], row["outcome"], row.get("half")) for row in found) == [
        (0, "died", None), (1, "ran", 12.0), (3, "ran", 4.0),
    ]  # fmt: skip
