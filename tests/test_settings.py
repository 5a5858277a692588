"""The settings of a run: a bad value is refused with its name, itself and what is allowed; a good one is kept."""

import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from qlora_helpers.settings import GPU_RUN, MEMORY_SETTINGS, PREDICTOR_ONLY, Settings

WHOLE, SWITCH = "must be a whole number, 1 or more", "must be True or False"
REFUSED = [
    ("method", "dora", "choose one of qlora, lora, full"),
    ("steps", 0, WHOLE),
    ("steps", True, WHOLE),
    ("batch_size", 1.5, WHOLE),
    ("accumulation", "2", WHOLE),
    ("max_length", None, WHOLE),
    ("learning_rate", 0, "must be a number, more than 0"),
    ("learning_rate", math.nan, "must be a number, more than 0"),
    ("learning_rate", math.inf, "must be a number, more than 0"),
    ("learning_rate", "1e-4", "must be a number, more than 0"),
    ("warmup_steps", -1, "must be a number, 0 or more"),
    ("schedule", "polynomial", "choose one of linear, cosine, constant"),
    ("max_grad_norm", 0, "must be a number, more than 0, or None for no clipping"),
    ("rank", -1, WHOLE),
    ("alpha", 0, "must be a number, more than 0"),
    ("dropout", 1.0, "must be a number, 0 or more and less than 1"),
    ("target_modules", 5, 'must be "all-linear", or a list of names such as'),
    ("target_modules", [5], 'must be "all-linear", or a list of names such as'),
    ("target_modules", "q_proj", 'must be "all-linear", or a list of names such as'),
    ("target_modules", (), 'must be "all-linear", or a list of names such as'),
    ("alpha", 10**400, "must be a number, more than 0"),
    ("gradient_checkpointing", 3, SWITCH),
    ("optimizer", ["x"], "name one that transformers' optim takes, or None"),
    ("optimizer", "", "name one that transformers' optim takes, or None"),
    ("compute_dtype", "fp8", "choose one of float32, float16, bfloat16, or None for the GPU's default"),
    ("double_quant", "yes", SWITCH),
    ("save_steps", 0, f"{WHOLE}, or None for no checkpoints"),
    ("save_minutes", -1, "must be a number, 0 or more, or None for no checkpoints"),
    ("keep_checkpoints", 1, "must be a whole number, 2 or more; with fewer, a kill can leave none"),
    ("log_steps", 0, f"{WHOLE}, or None for twenty times per run"),
    ("seed", -1, "must be a whole number, 0 or more"),
    ("seed", 0.5, "must be a whole number, 0 or more"),
    ("adapter_dtype", None, "choose one of float32, float16, bfloat16"),
    ("block_size", 100, "must be one of 32, 64, 128"),
    ("attention", "flash", "choose one of sdpa, math, eager"),
    ("upcast_fp32", 1, SWITCH),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_bad_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as caught:
        Settings(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: {allowed}")


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
