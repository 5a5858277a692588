"""Merge an adapter into its base, in the three ways in common use.

A QLoRA adapter is trained on top of the *dequantised* 4-bit weights. It can be added to three bases:

- "4bit": each weight is dequantised, the difference added, and the sum rounded to 4 bits again (PEFT's merge_and_unload);
- "dequantised": the 4-bit weights are dequantised once, and the sum is kept in 16 bits: exactly what the run trained;
- "16bit": the original weights, which the run never saw; the sum differs by the quantisation error.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.hardware import Hardware
from qlora_helpers.models.loading import SHIPPED_MODEL, load_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["BASES", "load_base", "merge", "merge_into"]

BASES = ("4bit", "dequantised", "16bit")

# PEFT warns at each layer that rounding may change generations; `adapters.drift` measures how much.
_ROUNDING = "Merge lora module to 4-bit linear"


def load_base(into: str, name: str = SHIPPED_MODEL, hardware: Hardware | None = None) -> PreTrainedModel:
    """Load one of the three bases; see the module's docstring.

    Raises:
        ValueError: `into` is not one of them.
    """
    validation.one_of("into", into, BASES)
    model = load_model(name, quantization=None if into == "16bit" else "nf4", hardware=hardware)
    return model.dequantize() if into == "dequantised" else model


def merge(
    adapter: str | Path, into: str, name: str = SHIPPED_MODEL, hardware: Hardware | None = None
) -> PreTrainedModel:
    """Load a base, add an adapter to its weights, and return the plain model.

    Args:
        adapter: its folder.
        into: "4bit", "dequantised" or "16bit".
        name: of the base, as `load_model` takes it.

    Raises:
        ValueError: `into` is not one of the three; or the adapter belongs to another base (`adapters.files.WrongBase`).
    """
    return merge_into(load_adapter(load_base(into, name, hardware), adapter))


def merge_into(model: PeftModel) -> PreTrainedModel:
    """Add the active adapter of a PEFT model to the base weights, and return the plain model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ROUNDING)
        return model.merge_and_unload().eval()
