"""Attention that a T4 computes without a sequence x sequence matrix.

With grouped-query attention, several query heads share a key and a value head. Where no mask is needed, transformers
leaves the sharing to torch (`scaled_dot_product_attention(..., enable_gqa=True)`). FlashAttention supports that, but
needs compute capability 8.0; torch's memory-efficient kernel does not support it. So a T4 is left with the math kernel,
which stores a sequence x sequence matrix for every head (huggingface/transformers #48633).

The function here repeats keys and values for the query heads that share them, so that the memory-efficient kernel can
be used. This costs a copy of keys and values, linear in the sequence length. The result is the same.
"""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["REPEATED_KV", "repeated_kv_attention"]

REPEATED_KV = "sdpa_repeated_kv"  # its name, for transformers' `attn_implementation`


def repeated_kv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention with one key and one value head for each query head.

    Args:
        module: the attention layer; `num_key_value_groups` query heads share a key head.
        query: batch x heads x tokens x head size.
        key, value: batch x key heads x tokens x head size.
        attention_mask: as transformers makes it for its own "sdpa"; None where the mask is purely causal.

    Returns:
        batch x tokens x heads x head size, and None in place of the attention weights.
    """
    shared_by = getattr(module, "num_key_value_groups", 1)
    # without that attribute, transformers' function takes the heads as they are
    as_many_heads = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(
        as_many_heads, query, repeat_kv(key, shared_by), repeat_kv(value, shared_by), attention_mask, **options
    )


AttentionInterface.register(REPEATED_KV, repeated_kv_attention)
AttentionMaskInterface.register(REPEATED_KV, sdpa_mask)
