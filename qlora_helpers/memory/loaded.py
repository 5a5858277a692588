"""Bytes of the model after loading, before adapters are attached."""

from __future__ import annotations

from dataclasses import replace

from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.tape import FLOAT32, rounded
from qlora_helpers.settings import DTYPES, Settings

__all__ = ["loaded_bytes", "weights_by_part"]

NESTED_BLOCK = 256  # constants per second-level block, bitsandbytes


def weights_by_part(shape: ModelShape, settings: Settings) -> dict[str, int]:
    """Bytes of the model's weights when training begins, by part.

    "16-bit weights" are all weights that are not in 4 bits, even if the run has made them float32.
    """
    width = FLOAT32 if settings.upcast_fp32 and settings.method != "full" else DTYPES[settings.compute_dtype]
    rest = (shape.embedding_parameters + shape.small_parameters) * width + shape.buffer_bytes
    if settings.method != "qlora":
        linears = shape.linear_parameters * width
        return {"4-bit weights": 0, "quantisation constants": 0, "16-bit weights": linears + rest}
    constants = sum(_constant_bytes(linear.weights, settings) for linear in shape.linears)
    return {
        "4-bit weights": shape.linear_parameters // 2,
        "quantisation constants": shape.num_hidden_layers * constants,
        "16-bit weights": rest,
    }


def _constant_bytes(weights: int, settings: Settings) -> int:
    """What bitsandbytes keeps besides the 4-bit weights of one layer: scales and codebooks."""
    blocks = -(-weights // settings.block_size)
    codebook = rounded(16 * FLOAT32)
    if not settings.double_quant:
        return rounded(blocks * FLOAT32) + codebook
    nested = -(-blocks // NESTED_BLOCK)
    of_second_level = sum(map(rounded, (nested * FLOAT32, 256 * FLOAT32, FLOAT32)))  # scales, codebook, offset
    return rounded(blocks) + of_second_level + codebook


def loaded_bytes(shape: ModelShape, settings: Settings, method: str | None = None) -> int:
    """Bytes of the model right after loading.

    Args:
        method: load the model for this method instead of that of the settings.
    """
    return sum(weights_by_part(shape, replace(settings, method=method or settings.method, upcast_fp32=False)).values())
