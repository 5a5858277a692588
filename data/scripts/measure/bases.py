"""The shipped model with its weights in each of the formats that are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["IN_4_BITS", "load"]

IN_4_BITS = ("NF4", "NF4 + double quant", "FP4")  # bases that bitsandbytes has


def load(base: str) -> PreTrainedModel:
    """The shipped model with its linear weights in a format: by bitsandbytes if it has it, else rounded to it.

    Args:
        base: one of `IN_4_BITS`, "INT4", "INT4 symmetric" or "16 bit".
    """
    from qlora_helpers import quantize
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_model
    from qlora_helpers.models.weights import quantize_dequantize

    hardware = detect("cpu")
    if base in IN_4_BITS:
        return load_model(quantization=base[:3].lower(), double_quant=base.endswith("double quant"), hardware=hardware)
    model = load_model(quantization=None, hardware=hardware)
    if base != "16 bit":
        quantize_dequantize(model, {"INT4": quantize.INT4, "INT4 symmetric": quantize.INT4_SYMMETRIC}[base])
    return model
