"""The shape and the settings of a run that is ready to start, read from its model and its trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from qlora_helpers.memory import AnyShape, ModelShape, find_shape
from qlora_helpers.models.attention import REPEATED_KV
from qlora_helpers.models.decoder_layers import decoder_layers
from qlora_helpers.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments
    from trl import SFTTrainer

__all__ = ["NOT_PREDICTED", "SPEED", "settings_of", "shape_of"]

# what `Settings` of this course's trainer say of a run's speed
SPEED = ("checkpointed_layers", "packing", "compile_layers", "liger_layers", "expandable_segments", "merge_aware")
# settings of TrainingArguments and SFTConfig that change the step in ways the predictor does not know
NOT_PREDICTED = ("use_liger_kernel", "packing", "padding_free", "torch_compile", "deepspeed", "fsdp")


def _model_of(trainer_or_model):
    return getattr(trainer_or_model, "model", None) if hasattr(trainer_or_model, "args") else trainer_or_model


def shape_of(trainer_or_model: SFTTrainer | PreTrainedModel | PeftModel) -> ModelShape | AnyShape:
    """The shape of a live model, with or without adapters, or of a trainer's.

    Raises:
        ValueError: neither the predictor nor transformers' table of models knows its architecture.
    """
    model = _model_of(trainer_or_model)
    return find_shape((model.get_base_model() if isinstance(model, PeftModel) else model).config)


def settings_of(
    trainer_or_model: SFTTrainer | PreTrainedModel | PeftModel,
    args: TrainingArguments | None = None,
    max_length: int | None = None,
) -> Settings:
    """The settings that the predictor needs, read from a run that is ready to start.

    Args:
        trainer_or_model: a trainer, which has its own arguments; or a model with its adapters attached.
        args: the `TrainingArguments` or `SFTConfig`; needed with a model, by default those of the trainer.
        max_length: tokens in a full sequence; by default the arguments' `max_length`.

    Raises:
        ValueError: something about the run is missing, or the predictor does not know this kind of run; the message says
            what.
    """
    model = _model_of(trainer_or_model)
    args = args or getattr(trainer_or_model, "args", None)
    if args is None:
        raise ValueError("args is missing: a model does not know its batch size; pass the TrainingArguments")
    max_length = max_length or getattr(args, "max_length", None)
    if not max_length:
        raise ValueError(f"max_length is missing, and {type(args).__name__} has no max_length: pass max_length")
    if (of_course := getattr(trainer_or_model, "at_work", None)) is not None:
        max_length = max_length or of_course.max_length
    for name in NOT_PREDICTED:
        if value := getattr(args, name, None):
            raise ValueError(f"{name} is {value!r}: such a run is not predicted")
    shape, base = shape_of(model), model.get_base_model() if isinstance(model, PeftModel) else model
    four_bit = _four_bit_of(base, shape)
    lora = _lora_of(model, shape) if isinstance(model, PeftModel) else {}
    if four_bit and not lora:
        raise ValueError("model has 4-bit layers and no adapters: there is nothing to train; attach them first")
    method = "qlora" if four_bit else "lora" if lora else "full"
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad] if method == "full" else []
    if frozen:
        raise ValueError(f"model has frozen parameters such as {frozen[0]} and no adapters: this is not predicted")

    loaded_in = _name(base.get_input_embeddings().weight.dtype)
    without_autocast = four_bit.pop("compute_dtype", loaded_in)
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else without_autocast
    upcast = loaded_in == "float32" and compute != "float32"
    if upcast and method == "full":
        raise ValueError(
            f"model was loaded in float32 and computes in {compute}, all of it trained: this is not predicted"
        )
    # prepare_model_for_kbit_training switches it on only in the model
    checkpointing = bool(args.gradient_checkpointing or base.is_gradient_checkpointing)
    offloading = bool(getattr(args, "activation_offloading", False))
    gpus = getattr(args, "world_size", 1)  # processes, each on a GPU
    batch = {"batch_size": args.per_device_train_batch_size * gpus, "accumulation": args.gradient_accumulation_steps}
    more = {"checkpointed_layers": _checkpointed_layers(base)} if checkpointing and not offloading else {}
    if of_course is not None:  # of this course's trainer, whose own batch may be a whole step
        names = (*batch, *SPEED)
        batch = {name: getattr(of_course, name) for name in names}
        checkpointing, offloading, more = of_course.gradient_checkpointing, of_course.activation_offloading, {}
    return Settings(
        method=method,
        compute_dtype=compute,
        max_length=max_length,
        gradient_checkpointing=checkpointing,
        activation_offloading=offloading,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        upcast_fp32=upcast,
        num_gpus=gpus,
        attention=_attention_of(base.config, shape),
        **batch,
        **more,
        **four_bit,
        **lora,
    )


def _checkpointed_layers(base: PreTrainedModel) -> int | None:
    """How many of the first decoder layers are checkpointed; None if all of them are, or if they have no switches.

    The trainer switches all of them on when it starts, so that before only a callback knows about it.

    Raises:
        ValueError: those that are checkpointed are not the first ones.
    """
    found = decoder_layers(base)
    switches = [getattr(layer, "gradient_checkpointing", None) for layer in found[1]] if found else []
    if not switches or None in switches or all(switches) or not any(switches):
        return None
    first = switches.index(False)
    if any(switches[first:]):
        raise ValueError(
            f"model checkpoints layers after layer {first}, which is not: this is not predicted; the first ones are"
        )
    return first


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _the_only(values, what: str):
    """The one value that all layers agree on."""
    values = set(values)
    if len(values) != 1:
        raise ValueError(
            f"{what} differs between layers: {sorted(values)}. Only one value for all of them is predicted"
        )
    return values.pop()


def _four_bit_of(base, shape: ModelShape | AnyShape) -> dict:
    """`double_quant`, `block_size` and `compute_dtype` of the 4-bit layers; empty where there are none."""
    if any(isinstance(module, bnb.nn.Linear8bitLt) for module in base.modules()):
        raise ValueError("model has 8-bit layers: this is not predicted; 4 or 16 bits are")
    layers = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not layers:
        return {}
    expected = shape.four_bit_layers
    if len(layers) != expected:
        raise ValueError(
            f"model has {len(layers)} layers in 4 bits, not the {expected} of its decoder: this is not predicted"
        )
    return {
        "double_quant": _the_only((layer.weight.quant_state.nested for layer in layers), "double_quant"),
        "block_size": _the_only((layer.weight.quant_state.blocksize for layer in layers), "block_size"),
        "compute_dtype": _the_only((_name(layer.compute_dtype) for layer in layers), "compute_dtype"),
    }


def _lora_of(model, shape: ModelShape | AnyShape) -> dict:
    """`rank`, `dropout`, `target_modules` and `adapter_dtype` of the adapters."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (".lora_A." in name or ".lora_B." in name)
    ]
    if not layers or others:
        found = others[0] if others else type(model).__name__
        raise ValueError(f"model trains something other than plain LoRA: {found}. This is not predicted")
    adapter = _the_only((name for _, layer in layers for name in layer.r), "the adapter's name")
    known, adapted = shape.linear_names(), {name.rpartition(".")[2] for name, _ in layers}
    # PEFT gives the fused matrices of experts a higher rank by itself
    ranks = [layer.r[adapter] for _, layer in layers if not isinstance(layer, ParamWrapper)]
    rank = _the_only(ranks, "rank")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # PEFT has its own idea of all layers where there are experts, so that their number tells rather than their names
    named = tuple(name for name in known if name in adapted)
    possible = ("all-linear", named) if named else ("all-linear",)
    targets = next((names for names in possible if shape.lora_parameters(rank, names) == trained), None)
    if targets is None:
        raise ValueError(
            "model has adapters in some decoder layers only, or outside the decoder: this is not predicted"
        )
    return {
        "rank": rank,
        "dropout": _the_only((getattr(layer.lora_dropout[adapter], "p", 0.0) for _, layer in layers), "dropout"),
        "target_modules": targets,
        "adapter_dtype": _the_only((_name(layer.lora_A[adapter].weight.dtype) for _, layer in layers), "adapter_dtype"),
    }


def _attention_of(config, shape: ModelShape | AnyShape) -> str:
    """The predictor's name for the attention that a model uses on this machine."""
    used = config._attn_implementation
    if used == "eager":
        return "eager"
    if "flash" in used and shape.eager_only:
        raise ValueError(f"attention is {used!r} in {shape.model_type}: this is not predicted; eager is")
    if used == REPEATED_KV or "flash" in used:
        return "sdpa"
    if used != "sdpa":
        raise ValueError(f"attention is {used!r}: this is not predicted; sdpa, eager and FlashAttention are")
    shared = shape.num_attention_heads != shape.num_key_value_heads
    if shared and torch.cuda.is_available():
        # only FlashAttention and cuDNN support shared key heads (qlora_helpers.models.attention)
        switched_on = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled()
        if not switched_on or torch.cuda.get_device_capability() < (8, 0):
            return "math"
    return "sdpa"
