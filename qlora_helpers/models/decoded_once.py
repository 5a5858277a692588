"""4-bit layers that decode their weights once for a whole run, on a CPU and where the model is tiny.

A 4-bit layer decodes its weights whenever it is used: in the forward and again in the backward pass of each step. The
weights are frozen, so the values are the same each time. With the shipped model on a CPU, decoding took about a tenth of
a step. Here, the values are kept instead of decoded anew.

What is computed does not change, not even in the last bit. On a CPU, bitsandbytes' own layer decodes into float32 and
calls torch's linear function; this one calls the same function with the same values. `tests/models/test_decoded_once.py`
holds both against each other. bitsandbytes' kernels for other devices multiply in another way, so nothing is kept there.

The price is what 4 bits are there to save. In float32 the decoded weights take eight times as many bytes as the packed
ones, which stay: 9 MiB for the shipped model, 25 GiB for one of 7B. So they are kept up to `MOST_BYTES` only, and only
within the `with` block. Larger models decode anew, as the course describes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import bitsandbytes as bnb
import torch

__all__ = ["MOST_BYTES", "decoded_once"]

MOST_BYTES = 2**26  # of decoded weights


@contextmanager
def decoded_once(model: torch.nn.Module, most_bytes: int = MOST_BYTES) -> Iterator[int]:
    """Within the block, 4-bit layers that compute in float32 on a CPU use weights that were decoded when it began.

    The packed weights stay in the model; nothing is added to what is saved. They must not be changed within the block.

    Args:
        most_bytes: if the decoded weights would take more, the layers stay as they are.

    Yields:
        The bytes of the weights that are kept decoded; 0 if the layers stay as they are.
    """
    layers = [layer for layer in model.modules() if _decodes_to_float32_on_a_cpu(layer)]
    size = sum(4 * layer.weight.quant_state.shape.numel() for layer in layers)
    if size > most_bytes:
        layers, size = [], 0
    try:
        for layer in layers:
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            layer.forward = partial(_linear, layer, weight)
        yield size
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _decodes_to_float32_on_a_cpu(layer: torch.nn.Module) -> bool:
    if type(layer) is not bnb.nn.Linear4bit or layer.weight.device.type != "cpu":
        return False
    if "forward" in vars(layer):  # a hook's, which may do more
        return False
    state = layer.weight.quant_state
    # a repacked layer is fault A of `qlora_helpers.models.cpu_faults`; its weights cannot be decoded
    repacked = state is None or getattr(state, "packing_format_for_cpu", False)
    return not repacked and state.dtype == layer.compute_dtype == torch.float32


def _linear(layer: bnb.nn.Linear4bit, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The layer's output: [..., in_features] to [..., out_features]. `weight` is decoded: [out_features, in_features]."""
    if x.dtype != weight.dtype:  # such as under autocast: the layer knows what to convert
        return type(layer).forward(layer, x)
    return torch.nn.functional.linear(x, weight, layer.bias)
