"""A run's memory is recorded by phase, its settings are read from the live run, and a wrong prediction is marked."""

import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from qlora_helpers.memory import predict
from qlora_helpers.memory.comparison import compare
from qlora_helpers.memory.live_run import settings_of, shape_of
from qlora_helpers.memory.measurement import Measurement, MemoryCallback
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.training.trainer import build_trainer
from qlora_helpers.units import MIB
from tests.support.short_runs import CHATS, CPU, TOKENIZER, trainer_of

TWO_STEPS = Settings(steps=2, batch_size=3, rank=4, dropout=0.1, max_length=48)


# What is recorded


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of the shipped model on this CPU, its trainer and what was measured."""
    measurement = Measurement()
    with measurement.phase("load"):
        model = load_model(hardware=CPU)
    trainer = build_trainer(model, TOKENIZER, CHATS, tmp_path_factory.mktemp("measured"), TWO_STEPS, CPU)
    trainer.add_callback(MemoryCallback(measurement))
    trainer.train()
    return trainer, measurement


def test_a_run_is_recorded_phase_by_phase(trained):
    _, measurement = trained
    assert list(measurement.phases) == ["load", "first step", "steady steps"]
    assert measurement.running is None


def test_on_a_cpu_there_is_main_memory_and_nothing_else(trained):
    for phase in trained[1].phases.values():
        assert phase.resident_bytes > 100 * MIB  # torch alone takes that
        others = {value for name, value in vars(phase).items() if name != "resident_bytes"}
        assert others == {None}


def test_the_main_memory_of_a_phase_is_its_peak_not_its_end():
    measurement = Measurement(on_gpu=False)
    with measurement.phase("before"):
        pass
    with measurement.phase("much"):
        much = np.ones(40 * MIB)  # 320 MiB, returned to the system at once
        time.sleep(0.1)
        del much
    with measurement.phase("after"):
        pass
    before, much, after = (phase.resident_bytes for phase in measurement.phases.values())
    assert much > before + 300 * MIB > after


def looking():
    """How many threads sample main memory, half a second after they should have ended."""
    time.sleep(0.5)
    return sum("_watch" in thread.name for thread in threading.enumerate())


def test_the_thread_that_looks_ends_with_its_phase_and_with_a_run_that_fails():
    measurement = Measurement(on_gpu=False)
    with pytest.raises(ZeroDivisionError), measurement.phase("failing"):
        assert looking() == 1
        _ = 1 / 0
    assert looking() == 0
    assert measurement.phases == {} and measurement.running is None
    callback = MemoryCallback(Measurement(on_gpu=False))
    callback.on_train_begin(None, None, None)  # and then training fails
    assert looking() == 1
    del callback
    assert looking() == 0


def test_one_phase_at_a_time():
    measurement = Measurement(on_gpu=False)
    with (
        measurement.phase("load"),
        pytest.raises(RuntimeError, match="'more' cannot begin while 'load' is being measured"),
        measurement.phase("more"),
    ):
        pass


def steps(callback, skipped=()):
    """Call a callback as a trainer does, with one step for each flag."""
    callback.on_train_begin(None, None, None)
    for flag in skipped:
        callback.on_step_end(None, None, None, optimizer=SimpleNamespace(step_was_skipped=flag))
    callback.on_train_end(None, None, None)


@pytest.mark.parametrize(
    ("skipped", "phases"),
    [
        ([False, False, False], ["first step", "steady steps"]),
        ([True, True, False, True, False], ["first step", "steady steps"]),
        ([True, False], ["first step"]),
        ([True, True], []),
    ],
)
def test_the_first_step_lasts_until_the_weights_change(skipped, phases):
    callback = MemoryCallback(Measurement(on_gpu=False))
    steps(callback, skipped)
    assert list(callback.measurement.phases) == phases and callback.measurement.running is None


def test_training_again_replaces_what_a_failed_or_finished_run_has_left():
    callback = MemoryCallback(Measurement(on_gpu=False))
    callback.on_train_begin(None, None, None)  # and then it fails
    for _ in range(2):
        steps(callback, [False, False])
        assert list(callback.measurement.phases) == ["first step", "steady steps"]


# The settings, read from the live run


def test_the_settings_are_those_of_the_run(trained):
    trainer, _ = trained
    assert settings_of(trainer) == replace(
        GPU_RUN,
        method="qlora",
        compute_dtype="float32",
        adapter_dtype="float32",
        double_quant=True,
        block_size=64,
        rank=4,
        dropout=0.1,
        target_modules="all-linear",
        batch_size=3,
        max_length=48,
        gradient_checkpointing=False,
        optimizer="adamw_torch",
        upcast_fp32=False,
        attention="sdpa",
    )


def test_the_shape_is_that_of_the_model(trained):
    trainer, _ = trained
    shape, run = shape_of(trainer), settings_of(trainer)
    assert (shape.model_type, shape.num_hidden_layers, shape.hidden_size) == ("llama", 4, 256)
    trained_parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert predict(shape, run).trainable_parameters == trained_parameters
    assert shape_of(trainer.model) == shape_of(trainer.model.get_base_model()) == shape


def test_other_settings_are_seen_too(tmp_path):
    settings = Settings(
        target_modules=("v_proj", "q_proj"), gradient_checkpointing=True, optimizer="adamw_8bit", method="lora"
    )
    trainer = trainer_of(tmp_path, None, settings)
    run = settings_of(trainer, max_length=32)
    assert (run.method, run.target_modules, run.max_length) == ("lora", ("q_proj", "v_proj"), 32)
    assert run.gradient_checkpointing and run.optimizer == "adamw_8bit"
    trainer.model.get_base_model().config._attn_implementation = "eager"
    assert settings_of(trainer).attention == "eager"


def test_single_quantisation_is_seen(tmp_path):
    model = load_model(double_quant=False, hardware=CPU)
    assert not settings_of(build_trainer(model, TOKENIZER, CHATS, tmp_path, Settings(), CPU)).double_quant


def arguments(tmp_path, **options):
    """Arguments of a run on a GPU: TrainingArguments would refuse bf16 on this machine."""
    made = vars(TrainingArguments(str(tmp_path), use_cpu=True, optim="adamw_torch"))
    return SimpleNamespace(**made | {"max_length": 64} | options)


def plain(dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(data_path("tiny-llama"), dtype=dtype)


def test_16_bits_and_what_was_made_float32(tmp_path):
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    run = settings_of(get_peft_model(plain(), lora), arguments(tmp_path, bf16=True))
    assert (run.method, run.compute_dtype, run.upcast_fp32) == ("lora", "bfloat16", False)
    assert run.adapter_dtype == "float32"  # as PEFT makes them
    run = settings_of(get_peft_model(plain(torch.float32), lora), arguments(tmp_path, fp16=True))
    assert (run.compute_dtype, run.upcast_fp32) == ("float16", True)


def test_full_fine_tuning(tmp_path):
    run = settings_of(plain(), arguments(tmp_path, bf16=True, optim="adamw_torch_fused"))
    assert (run.method, run.compute_dtype, run.optimizer) == ("full", "bfloat16", "adamw_torch_fused")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "something other than plain LoRA: .*magnitude"),
        ({"modules_to_save": ["lm_head"]}, "something other than plain LoRA: .*lm_head"),
        ({"layers_to_transform": [0, 1]}, "in some decoder layers only"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank differs between layers: \[2, 8\]"),
    ],
)
def test_adapters_that_are_not_predicted_are_refused(lora, message, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **lora)
    with pytest.raises(ValueError, match=message):
        settings_of(get_peft_model(plain(), config), arguments(tmp_path))


def test_runs_that_cannot_be_told_or_are_not_predicted_are_refused(tmp_path):
    model = plain(torch.float32)
    with pytest.raises(ValueError, match="args is missing"):
        settings_of(model)
    with pytest.raises(ValueError, match="max_length is missing, and TrainingArguments has no max_length"):
        settings_of(model, TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="loaded in float32 and computes in bfloat16, all of it trained"):
        settings_of(model, arguments(tmp_path, bf16=True))
    with pytest.raises(ValueError, match="optimizer='adafactor': choose one of"):
        predict(shape_of(model), settings_of(model, arguments(tmp_path, optim="adafactor")))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention is 'flex_attention'"):
        settings_of(model, arguments(tmp_path))
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen parameters such as model\.embed_tokens\.weight"):
        settings_of(model, arguments(tmp_path))
    with pytest.raises(ValueError, match="4-bit layers and no adapters"):
        settings_of(load_model(hardware=CPU), arguments(tmp_path))


@pytest.mark.parametrize(
    ("capability", "flash", "attention"), [((7, 5), True, "math"), ((9, 0), False, "math"), ((9, 0), True, "sdpa")]
)
def test_shared_key_heads_without_flash_attention_are_left_with_the_math_kernel(
    capability, flash, attention, tmp_path, monkeypatch
):
    model, args = plain(), arguments(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for kernel in ("flash", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"{kernel}_sdp_enabled", lambda: flash)
    assert settings_of(model, args).attention == attention


# Side by side


@pytest.fixture
def prediction(trained):
    trainer, _ = trained
    return predict(shape_of(trainer), settings_of(trainer), "t4")


class FakeGPU:
    """A GPU whose figures are set by hand; it records when memory is freed and when its peak is reset."""

    def __init__(self, monkeypatch):
        self.allocated = self.peak = self.reserved = self.used = 0
        self.calls = []
        for name, answer in {
            "memory_allocated": lambda: self.allocated,
            "max_memory_allocated": lambda: self.peak,
            "max_memory_reserved": lambda: self.reserved,
            "mem_get_info": lambda: (1_000 * MIB - self.used, 1_000 * MIB),
            "empty_cache": lambda: self.calls.append("empty"),
            "reset_peak_memory_stats": lambda: self.calls.append("reset"),
            "get_device_name": lambda: "Fake",
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def run_as(self, prediction, off=0.0):
        """A run that takes what was predicted, with a peak that is `off`; the first step has a higher one."""
        measurement = Measurement(on_gpu=True)
        with measurement.phase("load"):
            self.allocated = prediction.loaded_bytes
        callback = MemoryCallback(measurement)
        callback.on_train_begin(None, None, None)
        self.peak = 10 * prediction.peak_allocated_bytes
        callback.on_step_end(None, None, None)
        self.peak = round(prediction.peak_allocated_bytes / (1 + off))
        self.reserved, self.used = prediction.peak_reserved_bytes, prediction.device_bytes
        callback.on_step_end(None, None, None)
        callback.on_train_end(None, None, None)
        return measurement


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch)


def test_the_gpu_s_figures_are_read_at_the_end_of_each_phase(gpu, prediction):
    measurement = gpu.run_as(prediction)
    load, first, steady = measurement.phases.values()
    assert load.allocated_bytes == prediction.loaded_bytes and load.peak_allocated_bytes == 0
    assert first.peak_allocated_bytes == 10 * prediction.peak_allocated_bytes
    assert steady.peak_allocated_bytes == prediction.peak_allocated_bytes
    assert steady.peak_reserved_bytes == prediction.peak_reserved_bytes
    assert steady.device_used_bytes == prediction.device_bytes
    # between the steps nothing is freed: the allocator is left as it is
    assert gpu.calls == ["empty", "reset", "empty", "reset", "reset"]


def difference(table, row):
    """The percentage and the mark in a row."""
    found = re.search(rf"^{row} .*iB +([+-][\d.]+) %(.*)$", table, re.M)
    return float(found[1]), found[2].strip()


@pytest.mark.parametrize(
    ("off", "mark"), [(0.0, ""), (0.098, ""), (0.102, "over 10 %"), (-0.098, ""), (-0.102, "over 10 %")]
)
def test_a_difference_of_more_than_10_per_cent_is_marked(off, mark, gpu, prediction):
    table = compare(prediction, gpu.run_as(prediction, off))
    assert difference(table, "peak, allocated") == (pytest.approx(100 * off, abs=0.051), mark)
    for row in ("after loading", "peak, reserved", "on the card"):
        assert difference(table, row) == (0.0, "")
    assert table.startswith("qlora, 3 x 48 tokens, predicted for a Tesla T4, measured on a Fake\n")


def test_every_part_of_the_prediction_is_listed(gpu, prediction):
    table = compare(prediction, gpu.run_as(prediction))
    listed = [line.split("  ")[1] for line in table.splitlines() if line.startswith("  ")]
    assert [name for name, size in prediction.parts.items() if size] == [n.strip() for n in listed if n.strip()]
    assert re.search(r"^first step .*iB", table, re.M)


def test_on_a_cpu_nothing_stands_beside_the_prediction(trained, prediction):
    table = compare(prediction, trained[1])
    assert "No GPU was measured here" in table and "over 10 %" not in table
    assert re.search(r"^peak, allocated +[\d.]+ MiB +-$", table, re.M)
    assert re.search(r"^steady steps +(- +){4}[\d.]+ [MG]iB$", table, re.M)


def test_a_run_of_one_step_is_not_compared(prediction):
    callback = MemoryCallback(Measurement(on_gpu=False))
    steps(callback, [False])
    with pytest.raises(ValueError, match=r"no 'steady steps' but \['first step'\]: train two steps or more"):
        compare(prediction, callback.measurement)
