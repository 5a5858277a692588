"""The runs whose memory is measured: what they cover, which are held out, and whether the script measures them."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoConfig
from transformers.training_args import OptimizerNames

from data.scripts.measure import memory as measure_memory
from data.scripts.measure import memory_plan
from qlora_helpers.memory import ModelShape, predict
from qlora_helpers.memory.trained import OPTIMIZERS
from qlora_helpers.paths import data_path
from qlora_helpers.settings import METHODS
from qlora_helpers.units import GIB
from tests.support.main_functions import call

PLAN, FRESH = memory_plan.all_rows(), memory_plan.all_rows(fresh=True)
TABLES = {"memory.json": PLAN, "memory_fresh.json": FRESH}
SETTINGS = [name for name in memory_plan.SETTINGS if name not in memory_plan.OF_FAMILIES]


def measured(name):
    """The rows of a committed table."""
    return json.loads(data_path("measured", name).read_text())["rows"]


def values(rows, name):
    return {row[name] for row in rows}


def predicted(row):
    gpu = "t4" if row.get("t4_kernels") else "h200"
    return predict(ModelShape.from_config(row["config"]), memory_plan.settings_of(row), gpu)


# The plan


def test_every_row_has_a_label_of_its_own():
    labels = [row["label"] for row in PLAN + FRESH]
    assert len(set(labels)) == len(labels)


def test_a_label_tells_rows_apart_by_every_setting():
    row = PLAN[0]
    base = memory_plan.label_of(row | {"t4_kernels": False})
    others = {
        "model": "another", "method": "lora", "compute_dtype": "float16", "adapter_dtype": "float32", "rank": 3,
        "double_quant": False, "dropout": 0.5, "target_modules": ["q_proj"], "batch_size": 3, "max_length": 3,
        "gradient_checkpointing": False, "optimizer": "adamw_torch", "upcast_fp32": True, "attention": "math",
        "t4_kernels": True,
    }  # fmt: skip
    assert {*SETTINGS, "model", "t4_kernels"} - others.keys() == {"block_size"}  # the same in all
    for name, value in others.items():
        assert memory_plan.label_of(row | {name: value}) != base, name
    assert values(PLAN + FRESH, "block_size") == {64}


def test_the_plan_covers_what_people_run():
    assert len(PLAN) >= 40
    families = {row["config"]["model_type"] for row in PLAN}
    assert families == {"llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt_neox", "gptj"}
    assert len(values(PLAN, "model")) >= 15
    assert (min(values(PLAN, "max_length")), max(values(PLAN, "max_length"))) == (256, 16_384)
    assert (min(values(PLAN, "batch_size")), max(values(PLAN, "batch_size"))) == (1, 16)
    assert values(PLAN, "method") == set(METHODS)
    assert values(PLAN, "attention") == {"sdpa", "math", "eager"}
    assert values(PLAN, "compute_dtype") == {"bfloat16", "float16"}
    for switch in ("gradient_checkpointing", "double_quant", "upcast_fp32"):
        assert values(PLAN, switch) == {True, False}
    assert any(row.get("t4_kernels") for row in PLAN)


def test_every_optimizer_that_transformers_knows_is_measured():
    known = {name.value for name in OptimizerNames} & set(OPTIMIZERS)
    assert values(PLAN + FRESH, "optimizer") == known
    assert len(known) == 6


def test_every_method_is_measured_with_and_without_checkpointing_on_both_sides_of_the_split():
    for rows in ([row for row in PLAN if row["held_out"]], [row for row in PLAN if not row["held_out"]], FRESH):
        assert {(row["method"], row["gradient_checkpointing"]) for row in rows} >= {
            (method, checkpointing) for method in METHODS for checkpointing in (True, False)
        }


def test_what_is_held_out_follows_from_the_label_alone():
    share = sum(row["held_out"] for row in PLAN) / len(PLAN)
    assert 1 / 4 < share < 5 / 12
    for row in PLAN:  # 16 % 3 is 1, so a number is divisible by 3 if the sum of its hexadecimal digits is
        digits = hashlib.sha256(row["label"].encode()).hexdigest()
        assert row["held_out"] is (sum(int(digit, 16) for digit in digits) % 3 == 0), row["label"]


def test_the_fresh_rows_have_models_and_settings_that_the_plan_has_not():
    assert len(FRESH) >= 24
    assert all(row["held_out"] and row["alone"] for row in FRESH)
    assert {row["config"]["model_type"] for row in FRESH} == {row["config"]["model_type"] for row in PLAN}
    assert len(values(FRESH, "model") - values(PLAN, "model")) >= 7
    for name in ("max_length", "batch_size", "rank"):
        assert len(values(FRESH, name) - values(PLAN, name)) >= 3, name
    assert values(FRESH, "max_length") & values(PLAN, "max_length") == set()
    full = {(row["config"]["model_type"], row["gradient_checkpointing"]) for row in FRESH if row["method"] == "full"}
    assert full == {(family, kept) for family in ("llama", "gpt_neox", "qwen3") for kept in (True, False)}


def test_no_row_needs_more_than_was_planned_for_it():
    for row in PLAN + FRESH:
        assert predicted(row).device_bytes < row["gib"] * GIB, row["label"]
    assert max(row["gib"] for row in FRESH) < 60


@pytest.mark.parametrize("row", {row["model"]: row for row in PLAN + FRESH}.values(), ids=lambda row: row["model"])
def test_a_model_s_config_is_one_that_transformers_takes(row):
    options = dict(row["config"])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    assert dataclasses.replace(ModelShape.from_config(config), max_position_embeddings=None) == dataclasses.replace(
        ModelShape.from_config(row["config"]), max_position_embeddings=None
    )


# The committed tables


@pytest.mark.parametrize("name", TABLES)
def test_the_table_s_rows_are_the_plan_s(name):
    rows, planned = measured(name), {row["label"]: row for row in TABLES[name]}
    assert [row["label"] for row in rows] == list(planned)
    for row in rows:
        assert row["outcome"] == "ran", row["label"]
        for field in ("held_out", "alone", "model", *SETTINGS):
            assert row[field] == planned[row["label"]][field], (row["label"], field)
        assert row.get("t4_kernels", False) == planned[row["label"]].get("t4_kernels", False)


@pytest.mark.parametrize("name", TABLES)
def test_the_table_s_models_are_those_of_models_json(name):
    planned = {row["label"]: row["config"] for row in TABLES[name]}
    for row in measured(name):
        assert ModelShape.from_config(row["config"]) == ModelShape.from_config(planned[row["label"]]), row["model"]
        for key in row["config"].keys() & planned[row["label"]].keys():
            assert row["config"][key] == planned[row["label"]][key], (row["model"], key)


@pytest.mark.parametrize("name", TABLES)
def test_the_figures_of_a_row_are_in_order(name):
    for row in measured(name):
        assert 0 < row["loaded_bytes"] <= row["peak_allocated_bytes"] <= row["peak_reserved_bytes"], row["label"]
        shape = ModelShape.from_config(row["config"])
        lora = shape.lora_parameters(row["rank"], row["target_modules"])
        trained = shape.parameters if row["method"] == "full" else lora
        assert row["requires_grad_parameters"] == trained, row["label"]
        if row["device_used_bytes"] is not None:
            assert row["device_used_bytes"] > row["peak_reserved_bytes"], row["label"]


@pytest.mark.parametrize("name", TABLES)
def test_the_card_s_memory_is_known_unless_the_driver_left_managed_memory_out(name):
    for row in measured(name):
        unknown = row["device_used_by"] == "nvml" and row["optimizer"].startswith("paged")
        assert (row["device_used_bytes"] is None) is unknown, row["label"]
        assert row["nvml_process_bytes"] > row["peak_reserved_bytes"]
        assert row["device_used_by"] == ("mem_get_info" if row["alone"] else "nvml")


# The script


def test_missing_rows_are_measured_with_tiny_models_on_a_cpu_and_put_in_their_places(tmp_path):
    words, table = "smollm2-360m", tmp_path / "table.json"
    planned = [row for row in FRESH if words in row["label"]]
    assert len(planned) == 4
    there = [
        planned[0] | {"outcome": "ran"},
        planned[1] | {"outcome": "out of memory"},
        planned[3] | {"outcome": "ran"},
    ]
    versions = {name: importlib.metadata.version(name) for name in measure_memory.PACKAGES}
    command = "python -m data.scripts.measure.memory --fresh"
    table.write_text(json.dumps({"versions": versions, "command": command, "rows": there}))
    code, said = call(measure_memory.main, "--dry", "--fresh", "--missing", "--row", words, "--table", str(table))
    assert (code, "2 of 2 rows ran" in said) == (0, True), said
    rows = json.loads(table.read_text())["rows"]
    assert [row["label"] for row in rows] == [row["label"] for row in planned]
    assert (rows[0], rows[3]) == (there[0], there[2])
    for row, plan in zip(rows[1:3], planned[1:3], strict=True):
        assert row.items() >= plan.items() and row["outcome"] == "ran"
        assert len(row["losses"]) == 4 and row["trained_dtypes"] == ["float32"]
    assert list(tmp_path.iterdir()) == [table]


def test_rows_of_other_versions_are_never_mixed_in(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"versions": {"torch": "1"}, "rows": []}))
    with pytest.raises(SystemExit, match=r"table\.json was measured elsewhere.*'torch': '1'.*'torch': '2'"):
        measure_memory.Table(path, {"versions": {"torch": "2"}}, PLAN)
    measure_memory.Table(path, {"versions": {"torch": "1"}}, PLAN).put({"label": PLAN[0]["label"], "outcome": "ran"})
    assert len(json.loads(path.read_text())["rows"]) == 1


def die(row, dry, log, sender, measure):
    """Instead of a row's process."""
    if row["label"] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if row["label"] == "hangs":
        time.sleep(600)
    sender.send({"outcome": "ran"})


def test_a_row_that_dies_or_hangs_is_recorded_and_the_others_run(monkeypatch):
    monkeypatch.setattr(measure_memory, "child", die)
    monkeypatch.setattr(measure_memory, "TIMEOUT", 3)
    rows = [{"label": label, "alone": False, "gib": 50} for label in ("hangs", "dies", "too big", "runs")]
    outcomes = {row["label"]: row["outcome"] for row, _ in measure_memory.in_turn(rows, workers=3, dry=True)}
    assert outcomes == {
        "hangs": "not finished after 3 seconds",
        "dies": "the process ended with -9 and left nothing",
        "too big": "ran",
        "runs": "ran",
    }


def test_rows_run_together_only_while_their_memory_is_there(monkeypatch):
    running, most = [], []

    class Row:
        def __init__(self, row, dry, folder, measure):
            self.row, self.log = row, Path(folder, row["label"])
            self.log.touch()
            self.looks = 0
            running.append(row)
            most.append([one["label"] for one in running])

        def outcome(self):
            self.looks += 1
            if self.looks < 3:
                return None
            running.remove(self.row)
            return {"outcome": "ran"}

    monkeypatch.setattr(measure_memory, "Running", Row)
    plan = [("a", True, 70), ("b", True, 10), ("c", False, 70), ("d", False, 60), ("e", False, 20), ("f", False, 20)]
    rows = [{"label": label, "alone": alone, "gib": gib} for label, alone, gib in plan]
    assert len(list(measure_memory.in_turn(rows, workers=3, dry=True))) == 6
    # a and b run alone; d does not fit with c, but e and f do
    assert most[:5] == [["a"], ["b"], ["c"], ["c", "e"], ["c", "e", "f"]]
    assert most[5] == ["d"]


def test_the_rows_are_listed_and_an_unknown_one_is_refused():
    code, said = call(measure_memory.main, "--list", "--row", "llama-3.1-70b")
    assert code == 0 and "1 rows, 0 of them held out" in said and "67 GiB" in said
    code, said = call(measure_memory.main, "--row", "gpt-5")
    assert code == 2 and "no row matches --row gpt-5" in said
