"""The measured suggestions are those that are made today, and they teach something."""

from collections import defaultdict

from data.scripts.measure import suggestions
from qlora_helpers.json_files import read_json


def test_what_was_measured_is_what_is_suggested_and_it_teaches_what_the_base_knows():
    runs = defaultdict(list)
    for run in read_json(suggestions.TABLE)["runs"]:
        runs[run["label"], run["rows"]].append(run)
    plan = suggestions.plan()
    assert [(label, rows) for label, rows, _ in plan] == list(runs)
    for label, rows, settings in plan:
        for run in runs[label, rows]:
            chosen = {name: getattr(settings, name) for name in suggestions.RECORDED}
            assert {name: run[name] for name in chosen} == chosen, f"{label}, {rows} rows: measure again"
    least = {60: 0.5, 400: 0.75, 4_800: 0.9}
    for rows, bound in least.items():
        assert all(run["exact_match"] > bound for run in runs["suggested", rows])
