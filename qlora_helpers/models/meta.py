"""A model that has all its layers but takes no memory: to count parameters, and to try out a LoraConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qlora_helpers import validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["meta_model"]


def meta_model(config: dict[str, Any], dtype: torch.dtype | None = None, attention: str = "sdpa") -> PreTrainedModel:
    """The transformers model of a config on torch's "meta" device, where tensors have a shape and no values.

    A model that takes images, too, is built with all its parts.

    Args:
        config: as in a `config.json`; `model_type` is required. `qlora_helpers.memory.known_config` has those of
            well-known models.
        dtype: of its weights; by default float32.
        attention: transformers' name of its attention; "eager" where a model has no other.

    Raises:
        ValueError: transformers has no language model of this type.
    """
    from transformers import (  # only here: they take seconds to import
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
    )

    options = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **options)
    kind = type(made)
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if kind in mapping:
            found = mapping[kind]
            break
    else:
        cure = "transformers has no language model of this type; give the config.json of one"
        raise validation.refuse("model_type", config["model_type"], cure)
    found = found[0] if isinstance(found, tuple) else found
    if attention != "eager" and not getattr(found, "_supports_sdpa", False):
        attention = "eager"
    with torch.device("meta"):
        return found._from_config(made, dtype=dtype or torch.float32, attn_implementation=attention)
