"""A model that has all its layers but takes no memory: to count parameters, and to try out a LoraConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["meta_model"]


def meta_model(config: dict[str, Any]) -> PreTrainedModel:
    """The transformers model of a config on torch's "meta" device, where tensors have a shape and no values.

    Args:
        config: as in a `config.json`; `model_type` is required. `qlora_helpers.memory.known_config` has those of
            well-known models.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # only here: it takes seconds to import

    options = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **options), trust_remote_code=False
        )
