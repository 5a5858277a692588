"""The third plan of measured runs: what it covers, which half is held out, and what its two tables hold."""

import copy
import hashlib
import importlib.metadata
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.scripts.measure import memory as measure_memory
from data.scripts.measure import memory_families, memory_plan
from qlora_helpers.paths import data_path
from qlora_helpers.settings import METHODS
from tests.support.main_functions import call

PLAN = memory_families.family_rows()
BY_LABEL = {row["label"]: row for row in PLAN}
TABLES = {"memory_families.json": False, "memory_families_held_out.json": True}  # whether its rows are held out
DESCRIBED = sorted({*memory_plan.SETTINGS, "held_out", "source"})


def measured(name):
    return json.loads(data_path("measured", name).read_text(encoding="utf-8"))["rows"]


MEASURED = [row for name in TABLES for row in measured(name)]


def values(name, rows=PLAN):
    return {row[name] for row in rows}


def some(**settings):
    """How many rows have these settings."""
    return sum(all(row.get(name) == value for name, value in settings.items()) for row in PLAN)


def configuration(config):
    options = copy.deepcopy(config)  # transformers writes into nested dictionaries
    return AutoConfig.for_model(options.pop("model_type"), **options)


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(configuration(config)).parameters())


# The plan


def test_every_row_has_a_label_of_its_own():
    others = memory_plan.all_rows() + memory_plan.all_rows(fresh=True)
    labels = [row["label"] for row in PLAN + others]
    assert len(set(labels)) == len(labels)


def test_a_label_tells_rows_apart_by_every_setting_that_the_other_plans_lack():
    base = memory_families.family_label(PLAN[0])
    others = {"accumulation": 7, "checkpointed_layers": 3, "logits": "whole", "eval_batch_size": 5, "rank": 3}
    assert set(memory_plan.OF_FAMILIES) <= others.keys()
    for name, value in others.items():
        assert memory_families.family_label(PLAN[0] | {name: value}) != base, name


def test_the_families_are_new():
    old = {row["config"]["model_type"] for row in memory_plan.all_rows()}
    new = {row["config"]["model_type"] for row in PLAN}
    assert len(new) == 25 and not new & old
    for held_out in (True, False):
        rows = [row for row in PLAN if row["held_out"] is held_out]
        assert len(rows) >= 20 and len({row["config"]["model_type"] for row in rows}) >= 12


def test_the_settings_are_mixed():
    assert values("method") == set(METHODS)
    assert values("gradient_checkpointing") == values("upcast_fp32") == values("double_quant") == {True, False}
    assert values("attention") == {"sdpa", "eager"}
    assert len(values("optimizer")) == 5
    assert (min(values("max_length")), max(values("max_length"))) == (512, 4_096)
    assert (min(values("batch_size")), max(values("batch_size"))) == (1, 6)
    assert (min(values("rank")), max(values("rank"))) == (8, 128)
    assert values("dropout") == {0, 0.05, 0.1}
    assert (some(upcast_fp32=True), some(t4_kernels=True), some(logits="whole")) == (2, 2, 4)
    assert sum(row["eval_batch_size"] is not None for row in PLAN) == 3
    assert sum(row["accumulation"] > 1 for row in PLAN) == 3
    partly = [row for row in PLAN if row["checkpointed_layers"] is not None]
    assert len(partly) == 5 and all(row["gradient_checkpointing"] for row in partly)
    assert values("held_out", partly) == {True, False}


def test_what_is_held_out_follows_from_the_label_alone():
    for row in PLAN:  # a hexadecimal number is even if its last digit is
        digits = hashlib.sha256(row["label"].encode()).hexdigest()
        assert row["held_out"] is (int(digits[-1], 16) % 2 == 0), row["label"]
    assert 2 / 5 < sum(row["held_out"] for row in PLAN) / len(PLAN) < 3 / 5


@pytest.mark.parametrize("model", memory_families.MODELS)
def test_a_model_is_used_and_says_where_its_configuration_is_from(model):
    _, source = memory_families.MODELS[model]
    assert model in values("model")
    repository, path, commit = (part.strip() for part in source.split(",")[:3])
    assert repository.removeprefix("github.com/").count("/") == 1 and path.endswith((".json", ".py", ".md")) and commit


PARAMETERS = {  # in billions, as their makers give them
    "gemma-3-270m": 0.268, "smollm3-3b": 3.08, "olmo-2-7b": 7.3, "granite-3.2-2b": 2.53, "granite-3.2-8b": 8.17,
    "glm-4-9b": 9.4, "starcoder2-3b": 3.03, "starcoder2-7b": 7.17, "command-r7b": 8.03, "qwen3-30b-a3b": 30.5,
    "olmoe-1b-7b": 6.92, "gpt-oss-20b": 20.9, "granite-3.1-3b-a800m": 3.3, "exaone-4.0-1.2b": 1.28,
    "lfm2-1.2b": 1.17, "bamba-9b": 9.78, "deepseek-v2-lite": 15.7, "stablelm-2-1.6b": 1.64, "stablelm-2-12b": 12.1,
    "falcon-7b": 6.92, "phi-2": 2.78, "minitron-4b": 4.19, "gpt2-xl": 1.56, "opt-1.3b": 1.32, "bloom-560m": 0.559,
}  # fmt: skip


@pytest.mark.parametrize("model", PARAMETERS)
def test_a_model_has_as_many_parameters_as_it_is_known_for(model):
    assert parameters(memory_families.MODELS[model][0]) / 1e9 == pytest.approx(PARAMETERS[model], rel=0.01)


def test_a_tiny_model_has_a_layer_of_each_kind():
    for row in PLAN:
        small = measure_memory.tiny(row["config"])
        for name in ("layer_types", "no_rope_layers"):
            assert set(small.get(name, ())) == set(row["config"].get(name, ()))
        config = configuration(small).get_text_config()
        assert config.vocab_size == 512 and config.num_hidden_layers == 2, row["model"]


# The tables


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_rows_of_its_half(name):
    rows = measured(name)
    assert [row["label"] for row in rows] == [row["label"] for row in PLAN if row["held_out"] is TABLES[name]]
    for row in rows:
        planned = BY_LABEL[row["label"]]
        assert row["outcome"] == "ran", row["label"]
        assert {key: row[key] for key in planned} == planned
        assert set(DESCRIBED) <= planned.keys()


def test_the_figures_of_a_row_are_in_order():
    for row in MEASURED:
        assert 0 < row["loaded_bytes"] <= row["peak_allocated_bytes"] <= row["peak_reserved_bytes"], row["label"]
        assert row["trainer_bytes"] <= row["allocated_at_start_bytes"] <= row["reserved_at_start_bytes"]
        assert row["peak_reserved_bytes"] < row["device_used_bytes"], row["label"]
        assert len(row["losses"]) - len(row["skipped_steps"]) == 4 and all(map(math.isfinite, row["losses"]))
        evaluated = row["eval_batch_size"] is not None
        assert evaluated is (row["evaluation_peak_bytes"] is not None) is (row.get("evaluation_loss") is not None)


def test_the_allocator_s_figures_agree_with_the_peaks():
    for row in MEASURED:
        first, last = row["allocator"]["first_steps"], row["allocator"]["last_steps"]
        assert first["allocated_bytes"]["all"] == row["first_steps_peak_bytes"]
        assert last["allocated_bytes"]["all"] == row["peak_allocated_bytes"]
        assert max(part["reserved_bytes"]["all"] for part in (first, last)) == row["peak_reserved_bytes"]
        assert last["num_alloc_retries"] == last["num_ooms"] == 0
        start, end = (
            sum(int(size) * count for pool in row[f"segments_at_{when}"].values() for size, count in pool.items())
            for when in ("start", "end")
        )
        assert start == row["reserved_at_start_bytes"]
        assert end <= row["peak_reserved_bytes"]


def test_full_fine_tuning_trains_every_parameter():
    full = [row for row in MEASURED if row["method"] == "full"]
    assert len(full) == 8
    for row in full:
        assert row["requires_grad_parameters"] == parameters(row["config"]), row["label"]


# The script


def test_rows_go_to_the_table_of_their_half_and_held_out_figures_are_not_shown(tmp_path):
    words = ["olmo-2-7b lora bf16 r16 1x1536", "ernie-4.5-0.3b", "phi-2 qlora"]  # some layers, whole logits, evaluation
    chosen = [row for row in PLAN if any(part in row["label"] for part in words)]
    assert sorted(row["held_out"] for row in chosen) == [False, False, True, True]
    table = tmp_path / "memory_families.json"
    code, said = call(measure_memory.main, "--dry", "--families", "--row", *words, "--table", str(table))
    assert (code, "4 of 4 rows ran" in said) == (0, True), said
    assert said.count("its figures are held out") == 2
    for name, held_out in TABLES.items():
        content = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        assert content["versions"]["trl"] == importlib.metadata.version("trl")
        assert [row["label"] for row in content["rows"]] == [r["label"] for r in chosen if r["held_out"] is held_out]
        for row in content["rows"]:
            assert row["outcome"] == "ran" and len(row["losses"]) == 4
            assert ("evaluation_loss" in row) is (row["eval_batch_size"] is not None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TABLES)


def test_only_the_first_layers_are_checkpointed(tmp_path):
    row = next(row for row in PLAN if row["label"].startswith("phi-2 qlora"))
    for count in (0, 1, 2):
        model = measure_memory.build_model(row, dry=True)
        trainer = measure_memory.build_trainer(model, row, True, str(tmp_path))
        watcher = measure_memory.watch(trainer, False, count)
        trainer.add_callback(watcher)
        trainer.train()
        layers = measure_memory.decoder_layers(trainer.model)
        assert [layer.gradient_checkpointing for layer in layers] == [place < count for place in range(2)]
        assert watcher.checkpointed == count
        with pytest.raises(RuntimeError, match=f"{count} layers were checkpointed, not 3"):
            measure_memory.family_figures(trainer, row, watcher, 3, False)


def test_whole_logits_are_those_of_all_tokens_and_tiled_ones_are_not(tmp_path):
    row = next(row for row in PLAN if row["label"].startswith("ernie-4.5-0.3b lora"))
    shapes = {}
    for logits in ("whole", "tiled"):
        model = measure_memory.build_model(row, dry=True)
        trainer = measure_memory.build_trainer(model, row | {"logits": logits}, True, str(tmp_path))
        shapes[logits] = set()
        model.lm_head.register_forward_hook(lambda _, __, out, seen=shapes[logits]: seen.add(tuple(out.shape)))
        trainer.train()
    assert shapes == {"whole": {(row["batch_size"], 64, 512)}, "tiled": set()}
