"""Two silent faults of bitsandbytes 0.50 on a CPU, from which every loaded 4-bit model is protected.

A. With AVX512-BF16, the first forward pass in evaluation mode repacks every 4-bit weight in place. Training after
   that computes wrong gradients. The repacking is switched off.
B. With AVX512, dequantisation is wrong where the last dimension is a multiple of 16, but not of the block size. Such
   shapes are refused.

Both are demonstrated in `tests/models/test_cpu_faults.py`.
"""

import bitsandbytes as bnb
import torch

__all__ = ["make_safe_on_cpu"]

BLOCK_SIZE = 64  # values that share a scale in a 4-bit layer; transformers has no option for any other


def make_safe_on_cpu(model: torch.nn.Module) -> None:
    """Switch off fault A in every 4-bit layer, and refuse shapes that fault B affects (see the module's docstring).

    Raises:
        ValueError: a layer's in_features is not a multiple of its block size.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            block_size = layer.weight.quant_state.blocksize if layer.weight.quant_state else BLOCK_SIZE
            if layer.in_features % block_size:
                raise ValueError(
                    f"{name} has in_features={layer.in_features}, not a multiple of the block size {block_size}: "
                    "bitsandbytes decodes such a layer wrongly on a CPU with AVX512. Use a GPU, or quantization=None"
                )
