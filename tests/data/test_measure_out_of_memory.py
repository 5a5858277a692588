"""The runs that die on purpose: the plan, the script that measures it, and the committed table."""

import json
from dataclasses import replace

import pytest

from data.scripts.measure import out_of_memory as measure_oom
from data.scripts.measure.memory_plan import settings_of
from qlora_helpers.memory import ModelShape, cures, find_gpu, predict
from qlora_helpers.memory.out_of_memory import PLACES, read_message
from qlora_helpers.memory.phases import IN_A_STEP
from qlora_helpers.memory.timeline import Timeline
from qlora_helpers.memory.trained import PAGE_POOL
from qlora_helpers.paths import data_path
from qlora_helpers.units import GIB
from tests.support.main_functions import call

PLAN = measure_oom.all_rows()
RUNS = [row for row in PLAN if row["what"] == "run" and row["cap_bytes"]]
H200 = find_gpu("h200")


def capped(row):
    """The H200 with just enough memory for torch to hold the row's cap."""
    return replace(H200, usable_bytes=row["cap_bytes"] + H200.context_bytes)


def predicted(row):
    return predict(ModelShape.from_config(row["config"]), settings_of(row), H200)


# The plan


def test_every_row_has_a_label_of_its_own_and_every_place_a_death():
    assert len({row["label"] for row in PLAN}) == len(PLAN)
    died = {row["place_expected"] for row in PLAN if row.get("role") == "death"}
    assert died == set(PLACES) - {"saving"}  # which needs no GPU memory: measured with torch capped at what it holds
    for row in PLAN:
        if row.get("role") == "death":
            caps = {
                cure["cap_bytes"] for cure in PLAN if (cure.get("group"), cure.get("role")) == (row["group"], "cure")
            }
            assert caps <= {row["cap_bytes"]} and (caps or row["group"] == "load in 4 bits"), row["label"]


@pytest.mark.parametrize("row", [row for row in RUNS if row["role"] == "death"], ids=lambda row: row["label"])
def test_a_death_is_predicted_in_its_place(row):
    found, cap = predicted(row), row["cap_bytes"]
    assert found.peak_allocated_bytes > cap
    phases = found.phases
    if row["place_expected"] == "load":
        assert found.loaded_bytes > cap
    else:
        assert found.loaded_bytes < cap
    if row["place_expected"] == "backward":
        assert 1.05 * max(phases["loss"], phases["loss backward"]) < cap < phases["last layer backward"]
    if row["place_expected"] == "optimizer step":
        # in the first step there are no states until the optimizer runs
        assert max(phases["loss"], phases["first layer backward"]) - found.parts["optimizer (GPU)"] * 2 / 3 < cap


@pytest.mark.parametrize("row", [row for row in RUNS if row["role"] == "cure"], ids=lambda row: row["label"])
def test_a_cure_is_predicted_to_fit_under_the_cap(row):
    assert predicted(row).peak_reserved_bytes < row["cap_bytes"]


@pytest.mark.parametrize(
    "group", ["load", "forward", "eager attention", "float32 copies", "backward, batch", "optimizer"]
)
def test_the_cure_that_is_measured_is_the_cheapest_that_the_predictor_names(group):
    death, cure = (
        next(row for row in RUNS if (row["group"], row["role"]) == (group, role)) for role in ("death", "cure")
    )
    cheapest = cures(ModelShape.from_config(death["config"]), settings_of(death), capped(death))[0]
    assert cheapest.settings == settings_of(cure)


# The script


PLACE_OF = {
    "timeline: checkpointing": None, "optimizer: death": "optimizer step", "merging: cure": None,
    "evaluation: cure, best words": None, "saving": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def dry_rows(tmp_path_factory):
    """A row of each kind, measured by the script with tiny models on a CPU."""
    table = tmp_path_factory.mktemp("dry") / "table.json"
    code, said = call(measure_oom.main, "--dry", "--row", *PLACE_OF, "--table", str(table))
    assert (code, f"{len(PLACE_OF)} of {len(PLACE_OF)} rows went as planned" in said) == (0, True), said
    return json.loads(table.read_text())["rows"]


@pytest.mark.parametrize(("words", "place"), PLACE_OF.items())
def test_rows_are_measured_with_a_tiny_model_on_a_cpu(words, place, dry_rows):
    (row,) = (row for row in dry_rows if words in row["label"])
    assert row["outcome"] == ("out of memory" if place else "ran")
    if place:
        assert row["place"] == row["place_by_traceback"] == place
        assert "This message is faked" in row["message"]
        read_message(row["message"])
    if row["what"] == "timeline":
        line = Timeline.from_json(row["timeline"])
        assert {name for name, _ in line.marks} >= set(IN_A_STEP)
        assert line.peak == pytest.approx(row["timeline_peak_bytes"], abs=1024)


def test_an_unplanned_outcome_is_named():
    ran, died = {"outcome": "ran"}, {"outcome": "out of memory", "place": "backward", "place_expected": "forward"}
    assert measure_oom.unexpected(ran | {"role": "cure"}) == ""
    assert measure_oom.unexpected(ran | {"role": "death"}) == "planned: death"
    assert measure_oom.unexpected(died | {"role": "death"}) == "planned to die in: forward"
    assert measure_oom.unexpected(died | {"role": "cure"}) == "planned: cure"
    assert measure_oom.unexpected({"outcome": "ValueError: x"}) == "planned: to run"
    assert measure_oom.unexpected(died | {"role": "trial"}) == measure_oom.unexpected(ran | {"role": "trial"}) == ""


# The committed table

TABLE = json.loads(data_path("measured", "oom.json").read_text())
ROWS = {row["label"]: row for row in TABLE["rows"]}
DEATHS = [row for row in TABLE["rows"] if row["outcome"] == "out of memory"]


def test_the_table_has_the_rows_of_the_plan_and_all_went_as_planned():
    assert list(ROWS) == [row["label"] for row in PLAN]
    for row in PLAN:
        found = ROWS[row["label"]]
        assert measure_oom.unexpected(found) == "", row["label"]
        same = row.keys() - {"cap_bytes"} if row["what"] == "saving" else row.keys()  # its cap is what torch held
        assert {key: found[key] for key in same} == {key: row[key] for key in same}
    assert data_path("measured", "oom.json").stat().st_size < 200_000


@pytest.mark.parametrize("row", DEATHS, ids=lambda row: row["label"])
def test_every_real_message_is_read_and_its_numbers_agree(row):
    message = read_message(row["message"])
    assert message.allowed_bytes == pytest.approx(row["cap_bytes"], rel=0.005)
    assert message.missing_bytes > 0 and message.reserved_bytes <= message.allowed_bytes
    assert message.reserved_bytes == pytest.approx(row["reserved_at_death_bytes"], abs=0.02 * GIB)
    assert message.process_bytes > message.reserved_bytes
    assert row["place"] == row["place_by_traceback"] and row["allocator_retries"] >= 1


@pytest.mark.parametrize(
    "row", [row for row in TABLE["rows"] if row["what"] in ("run", "timeline") and row["outcome"] == "ran"],
    ids=lambda row: row["label"],
)  # fmt: skip
def test_what_was_measured_is_predicted(row):
    found = predicted(row)
    assert found.loaded_bytes == pytest.approx(row["loaded_bytes"], rel=0.005)
    assert found.peak_allocated_bytes == pytest.approx(row["peak_allocated_bytes"], rel=0.015)
    if "paged_bytes" in row:
        assert found.parts["optimizer (paged)"] == row["paged_bytes"]
    if row["cap_bytes"]:
        assert row["peak_reserved_bytes"] <= row["cap_bytes"]


@pytest.mark.parametrize(
    "row", [row for row in TABLE["rows"] if row["what"] == "timeline"], ids=lambda row: row["label"]
)
def test_a_recorded_timeline_has_the_peak_that_torch_counted_and_the_predicted_phases(row):
    line, phases = Timeline.from_json(row["timeline"]), predicted(row).phases
    assert line.peak == pytest.approx(row["peak_allocated_bytes"], rel=0.001)
    assert line.peak_phase == row["peak_phase"] == ("optimizer step" if row["rank"] == 256 else "backward")
    seen = {
        "loss": max(line.most_in("forward"), line.most_in("loss")),
        "optimizer step": line.most_in("optimizer step"),
        "backward": line.most_in("backward"),
    }
    said = phases | {"backward": max(size for name, size in phases.items() if "backward" in name)}
    assert seen == pytest.approx({name: said[name] for name in seen}, rel=0.015)
    load = Timeline.from_json(row["load_timeline"])
    assert row["loaded_bytes"] <= load.peak <= row["loaded_bytes"] + 0.2 * GIB


def test_managed_memory_comes_in_pieces_of_128_mib():
    paged = [row for row in TABLE["rows"] if row.get("paged_bytes")]
    assert len(paged) >= 15
    for row in paged:
        alone = f"paging: rank {row['rank']}, adamw_8bit" if row["group"] == "paging" else "optimizer: price"
        more = row["outside"]["after step 4"] - ROWS[alone]["outside"]["after step 4"]
        assert more == pytest.approx(-(-row["paged_bytes"] // PAGE_POOL) * PAGE_POOL, abs=2**25), row["label"]
