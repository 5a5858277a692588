"""Two silent faults of bitsandbytes 0.50 on a CPU, kept away from every 4-bit model that is loaded.

A. With AVX512-BF16, the first forward pass in evaluation repacks every 4-bit weight in place. Training after that
   computes wrong gradients. The repacking is switched off.
B. With AVX512, dequantisation is wrong where the last dimension is no multiple of the block size but of 16. Such
   shapes are refused.

Both are shown in `tests/models/test_cpu_faults.py`.
"""

import bitsandbytes as bnb
import torch

BLOCK_SIZE = 64  # values that share a scale in a 4-bit layer; transformers has no option for another


def make_safe_on_cpu(model: torch.nn.Module) -> None:
    """Switch fault A off in every 4-bit layer, and refuse shapes that meet fault B (see the module's docstring).

    Raises:
        ValueError: a layer's in_features is no multiple of its block size.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            block_size = layer.weight.quant_state.blocksize if layer.weight.quant_state else BLOCK_SIZE
            if layer.in_features % block_size:
                raise ValueError(
                    f"{name} has in_features={layer.in_features}, no multiple of the block size {block_size}: bitsandbytes "
                    "decodes such a layer wrongly on a CPU with AVX512. Use a GPU, or quantization=None"
                )
