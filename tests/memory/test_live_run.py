"""The settings of a live run, read from its model and its trainer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from qlora_helpers.memory import AnyShape, predict
from qlora_helpers.memory.live_run import SPEED, settings_of, shape_of
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.training.layer_options import layers_of
from qlora_helpers.training.trainer import build_trainer
from tests.memory.fake.models import GEMMA3, QWEN3_MOE
from tests.support.short_runs import CHATS, CPU, TOKENIZER, trainer_of


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


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "checkpointed_layers": 2},
        {"gradient_checkpointing": True, "activation_offloading": True},
        {"packing": True, "max_length": 128, "accumulation": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_makes_a_run_fast_is_seen(options, tmp_path):
    asked = replace(Settings(rank=4, steps=1), **options)
    found = settings_of(trainer_of(tmp_path, settings=asked))
    for name in ("batch_size", "accumulation", "max_length", "gradient_checkpointing", *SPEED, "activation_offloading"):
        assert getattr(found, name) == getattr(asked, name), name


def test_layers_that_another_trainer_checkpoints_are_counted(tmp_path):
    trainer = trainer_of(tmp_path, settings=Settings(rank=4, steps=1, gradient_checkpointing=True))
    model, arguments = trainer.model, trainer.args
    model.gradient_checkpointing_enable()  # as the trainer does when it starts
    assert settings_of(model, arguments, 64).checkpointed_layers is None
    layers = layers_of(model)
    layers[3].gradient_checkpointing = False
    assert settings_of(model, arguments, 64).checkpointed_layers == 3
    layers[1].gradient_checkpointing = False
    with pytest.raises(ValueError, match="model checkpoints layers after layer 1, which is not"):
        settings_of(model, arguments, 64)


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


def test_several_processes_are_several_gpus(tmp_path):
    run = settings_of(plain(), arguments(tmp_path, bf16=True, world_size=2, per_device_train_batch_size=3))
    assert (run.num_gpus, run.batch_size, run.batch_per_gpu) == (2, 6, 3)


@pytest.mark.parametrize(
    "config", [GEMMA3, QWEN3_MOE, QWEN3_MOE | {"mlp_only_layers": []}], ids=["gemma3_text", "qwen3_moe", "experts only"]
)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_a_run_of_a_family_that_the_libraries_are_asked_about(config, targets, tmp_path):
    options = {key: value for key, value in config.items() if key != "model_type"}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **options), dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets))
    shape, run = shape_of(model), settings_of(model, arguments(tmp_path, bf16=True))
    assert isinstance(shape, AnyShape) and shape.model_type == config["model_type"]
    assert shape.parameters == base.num_parameters() - sum(p.numel() for p in base.parameters() if p.requires_grad)
    assert (run.method, run.rank) == ("lora", 4)
    assert run.target_modules == (targets if isinstance(targets, str) else tuple(targets))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert shape.lora_parameters(4, run.target_modules) == trained
    found = predict(shape, run)
    assert found.trainable_parameters == trained and found.road == "libraries"


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
