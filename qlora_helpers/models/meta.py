"""A model that has all its layers but takes no memory: to count parameters, and to try out a LoraConfig."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["meta_model"]


def meta_model(
    config: dict[str, Any] | PretrainedConfig, dtype: torch.dtype | None = None, attention: str | None = None
) -> PreTrainedModel:
    """The transformers model of a config on torch's "meta" device, where tensors have a shape and no values.

    It is the causal language model of the config; of a config that has none, as those of some models for pictures and text,
    the model that takes both.

    Args:
        config: as in a `config.json`; `model_type` is required. `qlora_helpers.memory.known_config` has those of
            well-known models. Or a config of transformers. A `quantization_config` in it is passed over.
        dtype: of the parameters; by default what the config says, and float32 if it says nothing.
        attention: transformers' name for it; by default what transformers takes. "eager" where a model has no other.

    Raises:
        KeyError, ValueError: no `model_type`, or one that transformers does not know or has no such model for.
    """
    from transformers import (  # only here: it takes seconds
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if isinstance(config, dict):
        options = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        config = AutoConfig.for_model(config["model_type"], **deepcopy(options))  # it writes into nested ones
    is_of_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    options = {"dtype": config.dtype if dtype is None else dtype}
    if attention is not None:
        mapping = MODEL_FOR_CAUSAL_LM_MAPPING if is_of_text else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        has_sdpa = getattr(mapping.get(type(config), None), "_supports_sdpa", False)
        options["attn_implementation"] = attention if has_sdpa else "eager"
    auto = AutoModelForCausalLM if is_of_text else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False, **options)
