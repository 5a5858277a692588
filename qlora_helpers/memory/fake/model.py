"""A model on the meta device, made ready for a run as transformers, PEFT and TRL make it ready on a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from qlora_helpers.memory.fake.four_bit import Fake4bit
from qlora_helpers.memory.fake.layers_alike import kinds_of, representatives, shorten
from qlora_helpers.memory.fake.on_a_gpu import fused_head
from qlora_helpers.memory.gpus import GPU
from qlora_helpers.models.attention import REPEATED_KV
from qlora_helpers.models.decoder_layers import decoder_layers
from qlora_helpers.models.four_bit_rule import replace_layers
from qlora_helpers.models.meta import meta_model
from qlora_helpers.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["Prepared", "attention_of", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train, on the meta device, with only some of its decoder layers.

    Attributes:
        model: with its adapters, if it has any.
        layers: the decoder layers that are left, in order; empty if they could not be told from the rest.
        places: where these are in the whole model.
        template: for each layer of the whole model, the one of `layers` that stands for it.
        routed: how many layers of the whole model have a router.
    """

    model: PreTrainedModel | PeftModel
    layers: list[torch.nn.Module]
    places: list[int]
    template: list[int]
    routed: int


def attention_of(settings: Settings, gpu: GPU) -> str:
    """The name of a run's attention for transformers: the course's own on cards older than 8.0."""
    if settings.attention == "sdpa" and gpu.compute_capability < (8, 0):
        return REPEATED_KV
    return "eager" if settings.attention == "eager" else "sdpa"


def prepare(
    config: dict,
    settings: Settings,
    gpu: GPU,
    skip: Sequence[str] | None = None,
    whole: bool = False,
    long_config: bool = False,
    as_one: bool = False,
) -> Prepared:
    """A model of this config, ready for a run.

    Args:
        config: as in a `config.json`.
        settings: of the run, with a `compute_dtype`.
        gpu: that it runs on; decides the attention.
        skip: modules that stay as they are when the others are quantised; None for transformers' own list.
        whole: keep all layers.
        long_config: keep few layers, in a config that counts all of them (see `layers_alike.shorten`).
        as_one: keep all layers, and do not tell them apart from the rest of the model.
    """
    dtype = getattr(torch, settings.compute_dtype)
    model = meta_model(config, dtype=dtype, attention=attention_of(settings, gpu))
    _keep_some_in_float32(model, dtype)
    if settings.method == "qlora":
        _quantise(model, dtype, settings, skip)
    found = None if as_one else decoder_layers(model)
    places, template, routed = [], [], 0
    if found:
        name, layers = found
        kinds = kinds_of(layers, _checkpointed(settings, len(layers)))
        places = list(range(len(layers))) if whole else representatives(kinds)
        template = [_stands_for(place, kinds, places) for place in range(len(layers))]
        routed = sum(any(p.dim() == 3 for p in layer.parameters()) for layer in layers)
        if len(places) < len(layers):
            shorten(model, name, places, long_config)
    _make_fake(model, dtype, settings)
    for parameter in model.parameters():
        parameter.requires_grad = settings.method == "full"
    model.tie_weights()
    model.config.use_cache = False
    text = model.config.get_text_config()
    if hasattr(text, "output_router_logits"):  # as SFTTrainer does: with the coefficient that the config has
        text.output_router_logits = bool(getattr(text, "router_aux_loss_coef", 0))
    if settings.logits == "tiled":
        fused_head()(model, outputs=("log_probs", "entropy", "is_top1"))
    if settings.upcast_fp32:
        _upcast(model)
    with_adapters = model if settings.method == "full" else _with_adapters(model, settings)
    left = list(model.get_submodule(found[0])) if found else []
    _checkpoint(with_adapters, left, places, settings, len(template))
    return Prepared(with_adapters, left, places, template, routed)


def _checkpointed(settings: Settings, layers: int) -> int:
    """How many of the first layers are checkpointed."""
    if not settings.gradient_checkpointing:
        return 0
    return layers if settings.checkpointed_layers is None else min(settings.checkpointed_layers, layers)


def _stands_for(place: int, kinds: tuple[int, ...], places: list[int]) -> int:
    """Which of the layers that are left stands for the one at this place: itself, or one between of its kind."""
    if place in places:
        return places.index(place)
    return next(i for i, other in enumerate(places) if 0 < other < len(kinds) - 1 and kinds[other] == kinds[place])


def _keep_some_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As `from_pretrained` does for modules that would lose too much in 16 bits."""
    names = {name for name, kept in model._get_dtype_plan(dtype).items() if kept == torch.float32}
    if not names:
        return
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in names))
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.float()


def _quantise(model: PreTrainedModel, dtype: torch.dtype, settings: Settings, skip: Sequence[str] | None) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=settings.double_quant,
        llm_int8_skip_modules=None if skip is None else list(skip),
    )
    replace_layers(model, config, dtype)
    model.is_loaded_in_4bit = True  # for PEFT


def _make_fake(model: PreTrainedModel, dtype: torch.dtype, settings: Settings) -> None:
    """Put layers without values in the places of bitsandbytes' own."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            parent, _, child = name.rpartition(".")
            fake = Fake4bit(module, dtype, settings.double_quant, settings.block_size)
            setattr(model.get_submodule(parent), child, fake)


def _upcast(model: PreTrainedModel) -> None:
    """As PEFT's `prepare_model_for_kbit_training` does."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.loaded_width = parameter.element_size()
            parameter.data = parameter.data.float()


def _with_adapters(model: PreTrainedModel, settings: Settings) -> PeftModel:
    targets = settings.target_modules
    lora = LoraConfig(
        r=settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    # in the dtype of the base; the ledger's tensors get the run's own
    return get_peft_model(model, lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True)


def _checkpoint(model, left: list, places: list[int], settings: Settings, layers: int) -> None:
    if not settings.gradient_checkpointing:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.method != "full":
        model.enable_input_require_grads()
    for layer, place in zip(left, places, strict=True):
        layer.gradient_checkpointing = place < _checkpointed(settings, layers)
