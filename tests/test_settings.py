"""The settings of a run: a bad value is refused with its name, itself and what is allowed; a good one is kept."""

import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from qlora_helpers.settings import GPU_RUN, MEMORY_SETTINGS, OF_SEVERAL_GPUS, PREDICTOR_ONLY, Settings
from tests import ROOT

WHOLE, SWITCH = "must be a whole number, 1 or more", "must be True or False"
WARM_UP = (
    "must be a whole number, 0 to 300, or None for 15 (all steps of a shorter run). It counts steps, and is no share of them: "
    "the run has 300"
)
SHARE = "must be a share of the chats, more than 0 and less than 1, or the path of a chat file, or None"
TARGETS = 'must be "all-linear", or a list of names such as'
BUDGET = 'must be "auto", a number of bytes, or a text such as "16GiB", or None to leave the settings as they are'
MERGE_AWARE = "must be a share of the steps, more than 0 and at most 1, or None for no such steps"
REFUSED = [
    ("method", "dora", "choose one of qlora, lora, full"),
    ("steps", 0, WHOLE),
    ("steps", True, WHOLE),
    ("steps", 2.0, WHOLE),
    ("steps", np.bool_(True), WHOLE),
    ("epochs", 0, "must be a number, more than 0, or None for a run of steps"),
    ("epochs", True, "must be a number, more than 0, or None for a run of steps"),
    ("epochs", math.inf, "must be a number, more than 0, or None for a run of steps"),
    ("batch_size", 1.5, WHOLE),
    ("accumulation", "2", WHOLE),
    ("max_length", None, WHOLE),
    ("learning_rate", 0, "must be a number, more than 0"),
    ("learning_rate", math.nan, "must be a number, more than 0"),
    ("learning_rate", math.inf, "must be a number, more than 0"),
    ("learning_rate", "1e-4", "must be a number, more than 0"),
    ("warmup_steps", -1, WARM_UP),
    ("warmup_steps", 0.5, WARM_UP),
    ("warmup_steps", 15.0, WARM_UP),
    ("warmup_steps", 301, WARM_UP),
    ("schedule", "polynomial", "choose one of linear, cosine, constant"),
    ("max_grad_norm", 0, "must be a number, more than 0, or None for no clipping"),
    ("rank", -1, WHOLE),
    ("rank", True, WHOLE),
    ("alpha", 0, "must be a number, more than 0"),
    ("dropout", 1.0, "must be a number, 0 or more and less than 1"),
    ("target_modules", 5, TARGETS),
    ("target_modules", [5], TARGETS),
    ("target_modules", "q_proj", TARGETS),
    ("target_modules", (), TARGETS),
    ("target_modules", np.array([1, 2]), TARGETS),
    ("target_modules", ["q_proj", ""], TARGETS),
    ("alpha", 10**400, "must be a number, more than 0"),
    *(("merge_aware", value, MERGE_AWARE) for value in (0, -0.1, 1.5, True, "all", math.nan)),
    ("gradient_checkpointing", 3, SWITCH),
    ("gradient_checkpointing", "no", SWITCH),
    ("optimizer", ["x"], "name one that transformers' optim takes, or None"),
    ("optimizer", "", "name one that transformers' optim takes, or None"),
    ("compute_dtype", "fp8", "choose one of float32, float16, bfloat16, or None for the GPU's default"),
    ("double_quant", "yes", SWITCH),
    ("save_steps", 0, f"{WHOLE}, or None for no checkpoints"),
    ("save_steps", math.nan, f"{WHOLE}, or None for no checkpoints"),
    ("save_steps", 2.0, f"{WHOLE}, or None for no checkpoints"),
    ("save_minutes", math.nan, "must be a number, 0 or more, or None for no checkpoints"),
    ("save_minutes", -1, "must be a number, 0 or more, or None for no checkpoints"),
    ("keep_checkpoints", 1, "must be a whole number, 2 or more; with fewer, a kill can leave none"),
    ("log_steps", 0, f"{WHOLE}, or None for twenty times per run"),
    ("validation", 0, SHARE),
    ("validation", 1, SHARE),
    ("validation", 1.5, SHARE),
    ("validation", True, SHARE),
    ("validation", "", SHARE),
    ("validation", [0.1], SHARE),
    ("validation", b"chats.jsonl", SHARE),
    ("eval_steps", 0, f"{WHOLE}, or None for a usual number"),
    ("eval_steps", 0.5, f"{WHOLE}, or None for a usual number"),
    ("patience", 0, f"{WHOLE}, or None to make all steps"),
    ("seed", -1, "must be a whole number, 0 to 4294967295"),
    ("seed", 0.5, "must be a whole number, 0 to 4294967295"),
    ("seed", 2**32, "must be a whole number, 0 to 4294967295"),
    ("adapter_dtype", None, "choose one of float32, float16, bfloat16"),
    ("block_size", 100, "must be one of 32, 64, 128"),
    ("attention", "flash", "choose one of sdpa, math, eager"),
    ("upcast_fp32", 1, SWITCH),
    ("checkpointed_layers", -1, "must be a whole number, 0 or more, or None for all"),
    ("checkpointed_layers", 2, "needs gradient_checkpointing=True; None leaves it open"),
    ("activation_offloading", 1, SWITCH),
    ("activation_offloading", True, "needs gradient_checkpointing=True and checkpointed_layers=None"),
    ("packing", "yes", SWITCH),
    ("compile_layers", None, SWITCH),
    ("liger_layers", 2, SWITCH),
    ("expandable_segments", "on", SWITCH),
    *(("memory_budget", value, BUDGET) for value in (0, -1, "lots", "0GiB", "-3GiB", True, 1.5, "16", "")),
    ("logits", "fused", "choose one of tiled, whole"),
    ("eval_batch_size", 0, f"{WHOLE}, or None for no evaluation"),
    ("num_gpus", 0, WHOLE),
    ("num_gpus", 2.0, WHOLE),
    ("num_gpus", 3, "must divide batch_size=16, so that each GPU gets as many sequences; batch_size=18 would do"),
    ("num_gpus", 32, "must divide batch_size=16, so that each GPU gets as many sequences; batch_size=32 would do"),
    ("sharding", "zero3", "choose one of fsdp, or None for a whole copy on each GPU"),
    ("sharding", True, "choose one of fsdp, or None for a whole copy on each GPU"),
    ("cpu_offload", 1, SWITCH),
    ("cpu_offload", True, "needs sharding='fsdp', whose shards it moves"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_bad_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as caught:
        Settings(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: {allowed}")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("auto", "auto"),
        (" AUTO ", "auto"),
        ("16GiB", 16 * 2**30),
        ("16 gb", 16 * 10**9),
        ("1.5GiB", 1.5 * 2**30),
        (7, 7),
    ],
)
def test_a_memory_budget_is_auto_or_bytes(given, kept):
    assert Settings(memory_budget=given).memory_budget == kept


def test_a_memory_budget_that_no_number_holds_is_refused():
    with pytest.raises(ValueError, match="memory_budget="):
        Settings(memory_budget="9" * 400 + "GiB")


def test_every_setting_is_checked():
    assert {name for name, _, _ in REFUSED} == {field.name for field in fields(Settings)}


def test_every_setting_is_described_once():
    for name in (field.name for field in fields(Settings)):
        assert Settings.__doc__.count(f"\n        {name}: ") == 1, name


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_setting_is_checked_whether_or_not_the_method_uses_it(method):
    with pytest.raises(ValueError, match="rank="):
        Settings(method=method, rank="x")


def test_numbers_of_numpy_are_numbers():
    settings = Settings(
        batch_size=np.int64(2), rank=np.int32(8), dropout=np.float32(0.5), learning_rate=np.float64(1e-3)
    )
    assert settings == Settings(batch_size=2, rank=8, dropout=0.5)
    assert json.loads(json.dumps(asdict(settings)))["dropout"] == 0.5


def test_values_of_numpy_are_kept_as_plain_ones():
    """A record in JSON, a message and a comparison then show what a user would type."""
    given = {
        "method": np.str_("lora"), "rank": np.int64(2), "learning_rate": np.float64(1e-3), "double_quant": np.bool_(True),
        "warmup_steps": np.int32(3), "target_modules": np.array(["q_proj", "v_proj"]), "optimizer": np.str_("sgd"),
    }  # fmt: skip
    kept = asdict(Settings(**given))
    assert kept == asdict(Settings()) | given | {"target_modules": ("q_proj", "v_proj")}
    assert {type(kept[name]) for name in given} == {str, int, float, bool, tuple}
    assert {type(name) for name in kept["target_modules"]} == {str}


@pytest.mark.parametrize(("steps", "warm_up"), [(300, 15), (15, 15), (14, 14), (1, 1)])
def test_the_default_warm_up_is_no_longer_than_the_run(steps, warm_up):
    assert Settings(steps=steps).warmup_steps == warm_up


def test_a_warm_up_that_was_chosen_is_never_changed():
    assert Settings(steps=20, warmup_steps=20).warmup_steps == 20
    with pytest.raises(ValueError, match=r"^warmup_steps=21: must be a whole number, 0 to 20, or None"):
        Settings(steps=20, warmup_steps=21)
    with pytest.raises(ValueError, match=r"^warmup_steps=15: must be a whole number, 0 to 5, or None"):
        replace(Settings(), steps=5)  # a copy has every value, and cannot know that this one was a default
    assert replace(Settings(), steps=5, warmup_steps=None).warmup_steps == 5


@pytest.mark.parametrize(
    ("other", "value"),
    [
        ("method", "lora"),
        ("method", "full"),
        ("dropout", 0.05),
        ("compile_layers", True),
        ("memory_budget", "auto"),
        ("sharding", "fsdp"),
    ],
)
def test_merge_aware_steps_are_refused_beside_what_they_cannot_have(other, value):
    with pytest.raises(ValueError, match=rf"^merge_aware=0\.3: needs {other}="):
        Settings(merge_aware=0.3, **{other: value})
    assert Settings(**{other: value}).merge_aware is None


# Epochs


def test_a_run_has_300_steps_if_neither_steps_nor_epochs_are_given():
    assert Settings().steps == Settings(steps=None).steps == 300
    assert Settings().epochs is None


def test_a_run_has_one_length():
    with pytest.raises(ValueError, match=r"^steps=10 and epochs=2: a run has one length\. Give one"):
        Settings(steps=10, epochs=2)
    with pytest.raises(ValueError, match=r"^steps=300 and epochs=2: a run has one length"):
        replace(Settings(), epochs=2)
    assert replace(Settings(), steps=None, warmup_steps=None, epochs=2) == Settings(epochs=2)


def test_epochs_become_steps_once_the_chats_are_counted():
    settings = Settings(epochs=2, batch_size=4, accumulation=2)
    assert settings.steps is settings.warmup_steps is None
    assert settings.for_rows(80) == Settings(steps=20, batch_size=4, accumulation=2)
    assert settings.for_rows(8) == Settings(steps=2, batch_size=4, accumulation=2, warmup_steps=2)
    assert settings.for_rows(8).for_rows(80) == settings.for_rows(8)
    assert Settings().for_rows(5) == Settings()


def test_a_warm_up_of_a_run_of_epochs_is_checked_against_its_steps():
    settings = Settings(epochs=1, batch_size=1, warmup_steps=10)
    assert settings.for_rows(10).warmup_steps == 10
    with pytest.raises(ValueError, match=r"^warmup_steps=10: must be a whole number, 0 to 9, or None .* the run has 9"):
        settings.for_rows(9)
    with pytest.raises(ValueError, match=r"^warmup_steps=-1: must be a whole number, 0 or more, or None for 15"):
        Settings(epochs=1, warmup_steps=-1)


@pytest.mark.parametrize("rows", [0, 2.0, None])
def test_a_bad_number_of_rows_is_named(rows):
    for count in (Settings().for_rows, Settings().evaluation_interval, Settings().steps_per_epoch):
        with pytest.raises(ValueError, match=f"^rows={rows}: must be a whole number, 1 or more"):
            count(rows)


@pytest.mark.parametrize(
    ("steps", "rows", "every"),
    [(300, 10_000, 30), (300, 160, 10), (301, 10_000, 31), (6, 10_000, 1), (5, 16, 1), (1, 1, 1)],
)
def test_evaluations_come_once_per_epoch_or_ten_times_a_run(steps, rows, every):
    assert Settings(steps=steps).evaluation_interval(rows) == every
    assert Settings(steps=steps, eval_steps=7).evaluation_interval(rows) == 7


def test_a_path_is_kept_as_a_text(tmp_path):
    assert Settings(validation=tmp_path / "a.csv").validation == str(tmp_path / "a.csv")
    assert Settings(validation=np.float64(0.5)).validation == 0.5
    assert type(Settings(validation=np.float64(0.5)).validation) is float


def test_targets_are_kept_so_that_equal_settings_are_equal():
    assert Settings(target_modules=["q_proj", "v_proj"]) == Settings(target_modules=("q_proj", "v_proj"))
    assert Settings(target_modules={"v_proj", "q_proj"}).target_modules == ("q_proj", "v_proj")
    assert Settings(target_modules=(name for name in ["q_proj", "v_proj"])).target_modules == ("q_proj", "v_proj")
    assert len({Settings(target_modules=["q_proj"]), Settings(target_modules=("q_proj",))}) == 1


def test_a_run_on_a_gpu_differs_from_the_course_s_only_in_these():
    assert replace(Settings(), batch_size=1, max_length=2_048, dropout=0.05, gradient_checkpointing=True) == GPU_RUN


def test_the_lists_of_settings_name_settings():
    names = {field.name for field in fields(Settings)}
    assert set(MEMORY_SETTINGS) <= names and set(PREDICTOR_ONLY) <= set(MEMORY_SETTINGS)
    assert set(OF_SEVERAL_GPUS) <= set(MEMORY_SETTINGS)


def test_the_sequences_of_a_pass_are_shared_out_among_the_gpus():
    assert Settings(batch_size=16).batch_per_gpu == 16
    assert Settings(batch_size=16, num_gpus=4).batch_per_gpu == 4
    assert Settings(num_gpus=np.int64(2), sharding=np.str_("fsdp"), cpu_offload=np.bool_(True)) == Settings(
        num_gpus=2, sharding="fsdp", cpu_offload=True
    )
    assert Settings(sharding="fsdp").num_gpus == 1  # nothing is split then


def test_lesson_7_and_the_settings_say_the_same_of_alpha():
    said = (
        "Where this course compares ranks, alpha is twice the rank unless it says otherwise, so that the factor alpha / rank "
        "stays the same. With a fixed alpha this factor falls as the rank grows, so that at one learning rate the step of an "
        "adapter changes with its rank."
    )
    lesson = (ROOT / "notebooks" / "source" / "07_does_it_cost_quality.py").read_text(encoding="utf-8")
    for text in (lesson.replace("`", "").replace("\n# ", " "), Settings.__doc__):
        assert " ".join(text.split()).count(said) == 1
