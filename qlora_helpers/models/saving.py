"""Save a whole model so that plain transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

from qlora_helpers.library_messages import without_short_bars
from qlora_helpers.safe_folders import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["save_model"]


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a whole model with its tokenizer as safetensors, which plain transformers loads.

    Args:
        folder: appears complete or not at all; an existing one is kept.
        dtype: of the saved weights; by default unchanged. A 4-bit model keeps its 4-bit weights.
        overwrite: replace an existing folder. It stays until the new one is complete.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        ValueError: adapters are still attached, so only they would be saved; or `dtype` is given for a 4-bit model.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "model has adapters attached: merge them first, or save them with qlora_helpers.adapters.files.save_adapter"
        )
    quantised = getattr(model, "is_quantized", False)
    if dtype is not None and quantised:
        raise ValueError(f"dtype={dtype}: the model is 4-bit. Dequantise it first, or leave dtype out")
    size = sum(parameter.nbytes for parameter in model.parameters())
    _forget_decoding(model)
    with whole_folder(folder, overwrite) as part, without_short_bars(size):
        if dtype is None:
            model.save_pretrained(part)
        else:
            model.save_pretrained(
                part, state_dict={name: value.to(dtype) for name, value in model.state_dict().items()}
            )
            # transformers records the dtype of the model in memory, and would load the files in that one
            config = json.loads((part / "config.json").read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(part)
    return Path(folder)


def _forget_decoding(model: PreTrainedModel) -> None:
    """Take from a model what transformers did to its files when they were packed in 4 bits.

    transformers reverses each step of loading when it saves. Unpacking has no reverse, so a model that was loaded from such
    files could not be saved, be it in 4 bits or dequantised.
    """
    conversions = getattr(model, "_weight_conversions", None)
    for conversion in conversions or ():
        if operations := getattr(conversion, "operations", None):
            conversion.operations = [step for step in operations if not isinstance(step, Bnb4bitDeserialize)]
            if not conversion.operations:
                model._weight_conversions = [other for other in model._weight_conversions if other is not conversion]
