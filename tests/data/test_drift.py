"""The same run under other releases: what a release's folder replaces, who chooses a rate, and what the table says."""

import json

import pytest

from data.scripts.measure import drift


def test_a_release_in_a_folder_precedes_the_installed_one_and_what_breaks_is_its_own_words(tmp_path):
    package = tmp_path / "trl"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('SFTConfig has moved to the moon')", encoding="utf-8")
    assert drift.attempt(tmp_path, 1e-3, 0) == {"outcome": "ImportError: SFTConfig has moved to the moon"}


def made(rate, seed, validation, test, **more):
    found = {"outcome": "ran", "validation": validation, "test": test, "losses": [1.0, 0.5]}
    return (rate, seed), found | {"versions": {}, "settings": {}, "adapters": []} | more


def test_a_rate_is_chosen_on_the_validation_questions_alone():
    runs = dict([made(1e-3, 0, 0.8, 0.1), made(1e-3, 1, 0.9, 0.2), made(2e-3, 0, 0.7, 0.9), made(2e-3, 1, 0.9, 0.9)])
    found = drift.summary(runs)
    assert found["best_rate"] == 1e-3 and found["test"] == [0.1, 0.2]
    assert found["validation"] == {"0.001": 0.85, "0.002": 0.8}


def test_a_run_that_fails_is_what_the_row_says():
    runs = dict([made(1e-3, 0, 0.8, 0.1), ((1e-3, 1), {"outcome": "ValueError: no"})])
    assert drift.summary(runs) == {"outcome": "ValueError: no"}


def test_settings_that_moved_came_or_went_are_named():
    moved = drift.differing({"loss_type": "nll", "old": 1, "same": 2}, {"loss_type": "chunked", "new": None, "same": 2})
    assert moved == {"loss_type": ["nll", "chunked"], "old": [1, None]}


@pytest.fixture(scope="module")
def table():
    return json.loads(drift.TABLE.read_text(encoding="utf-8"))


def test_every_release_has_a_row_and_a_fair_choice(table):
    assert [row["name"] for row in table["rows"]] == drift.NAMES
    assert table["rates"] == list(drift.RATES) and table["seeds"] == drift.SEEDS and table["budget"] == drift.BUDGET
    for row in table["rows"]:
        if row["outcome"] == "ran":
            assert float(max(row["validation"], key=row["validation"].get)) == row["best_rate"]
            assert len(row["test"]) == drift.SEEDS


def test_each_row_ran_under_the_release_that_names_it(table):
    pinned = table["rows"][0]["versions"]
    for row in table["rows"][1:]:
        replaced = dict(release.split() for release in drift.BEFORE_5.get(row["name"], (row["name"],)))
        if row["outcome"] == "ran":
            assert row["versions"] == pinned | {name: replaced[name] for name in replaced if name in pinned}
