"""The weights of a loaded model: which of them QLoRA quantises, their bytes, and two ways to change them in place."""

from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState

from qlora_helpers.quantize import Codebook, dequantize, quantize

__all__ = ["bytes_by_part", "constant_bytes", "linear_layers", "quantize_dequantize", "shuffle_linear_weights"]


def linear_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The linear layers of the decoder, by name: all that QLoRA quantises, so not the output head."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head") and "lora_" not in name:
            yield name, module


def bytes_by_part(model: torch.nn.Module) -> dict[str, int]:
    """The bytes of a loaded model, by what they are for; parameters shared by two modules count once."""
    parts = dict.fromkeys(
        ("4-bit weights", "quantisation constants", "linear weights", "embeddings", "output head", "norms", "adapters"),
        0,
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            part = "adapters"
        elif isinstance(parameter, bnb.nn.Params4bit):
            part = "4-bit weights"
            parts["quantisation constants"] += constant_bytes(parameter.quant_state)
        elif "embed" in name:
            part = "embeddings"
        elif "lm_head" in name:
            part = "output head"
        elif "norm" in name:
            part = "norms"
        else:
            part = "linear weights"
        parts[part] += parameter.nbytes
    return {part: count for part, count in parts.items() if count}


def constant_bytes(state: QuantState) -> int:
    """Bytes of the scales, second-level scales, codebooks and offset of one bitsandbytes weight."""
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


@torch.no_grad()
def quantize_dequantize(
    model: torch.nn.Module, codebook: Codebook, block_size: int = 64, double_quant: bool = False
) -> None:
    """Round every linear weight of an unquantised model to a format and back, in place.

    This shows what a format costs in quality, even one that bitsandbytes lacks (INT4, INT3). It saves no memory.
    """
    for _, layer in linear_layers(model):
        weight = layer.weight.detach().cpu()
        layer.weight.copy_(dequantize(quantize(weight, codebook, block_size, double_quant)))


@torch.no_grad()
def shuffle_linear_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Permute the values within every linear weight, in place: same distribution, no knowledge, as a control."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in linear_layers(model):
        order = torch.randperm(layer.weight.numel(), generator=generator).to(layer.weight.device)
        layer.weight.copy_(layer.weight.flatten()[order].view_as(layer.weight))
