"""Bytes of the model after loading, before adapters are attached."""

from __future__ import annotations

from dataclasses import replace

from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.tape import FLOAT32, rounded
from qlora_helpers.settings import DTYPES, Settings

__all__ = ["constant_sizes", "loaded_bytes", "weights_by_part"]

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
    """What bitsandbytes keeps besides the 4-bit weights of one layer, each tensor rounded as torch allocates it."""
    return sum(map(rounded, constant_sizes(weights, settings.double_quant, settings.block_size)))


def constant_sizes(weights: int, double_quant: bool, block_size: int = 64) -> tuple[int, ...]:
    """Bytes of each tensor that bitsandbytes keeps besides the 4-bit weights of one layer: scales and codebooks.

    Args:
        weights: how many the layer has.
        double_quant: whether the scales are stored in 8 bits.
        block_size: weights that share a scale.
    """
    blocks = -(-weights // block_size)
    codebook = 16 * FLOAT32
    if not double_quant:
        return (blocks * FLOAT32, codebook)
    nested = -(-blocks // NESTED_BLOCK)
    return (blocks, nested * FLOAT32, 256 * FLOAT32, FLOAT32, codebook)  # with the second level's codebook and offset


def loaded_bytes(shape: ModelShape, settings: Settings, method: str | None = None) -> int:
    """Bytes of the model right after loading.

    Args:
        method: load the model for this method instead of that of the settings.
    """
    return sum(weights_by_part(shape, replace(settings, method=method or settings.method, upcast_fp32=False)).values())
