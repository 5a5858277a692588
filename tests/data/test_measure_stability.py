"""The table of provoked faults is what its script measures."""

import json
from dataclasses import replace

import pytest

from data.scripts.measure import stability as measure_stability
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.spikes import find_spikes

MEASURED = json.loads(data_path("measured", "stability.json").read_text())


def numbered(losses):
    return list(enumerate(losses, start=1))


# The measured table


def test_the_table_has_the_rows_of_its_script():
    assert [row["name"] for row in MEASURED["rows"]] == list(measure_stability.ROWS)
    for row in MEASURED["rows"]:
        settings, _ = measure_stability.ROWS[row["name"]]
        assert Settings(**row["settings"]) == settings
        wanted = 3 if row["name"] in measure_stability.CLEAR else 5
        scores = ("loss", "exact_match", "ends", "empty", "highest", "spikes")
        assert {len(row[key]) for key in scores} == {wanted}
        assert len(row["losses"]) == len(row["gradient_norms"]) == settings.steps
        assert len(find_spikes(numbered(row["losses"]))) == row["spikes"][0]
        assert max(row["losses"]) == row["highest"][0]


@pytest.mark.parametrize("name", ["cut at 16 tokens", "collator, pad = end"])
def test_a_row_measured_again_begins_as_in_the_table(name, tmp_path):
    stored = next(row for row in MEASURED["rows"] if row["name"] == name)
    settings, recipe = measure_stability.ROWS[name]
    short = replace(settings, steps=settings.warmup_steps)  # which the number of steps does not change
    _, losses, norms = recipe(short, measure_stability.CHATS, tmp_path)
    assert [loss for _, loss in losses[:3]] == pytest.approx(stored["losses"][:3], rel=0.02)
    assert [norm for _, norm in norms[:3]] == pytest.approx(stored["gradient_norms"][:3], rel=0.02)
