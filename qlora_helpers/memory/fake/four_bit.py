"""A 4-bit layer of bitsandbytes without values: PEFT and transformers see the real class, and the ledger sees its memory."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
import torch.nn.functional as F

from qlora_helpers.memory.fake.ledger import Ledger
from qlora_helpers.memory.layers import DEQUANTISED

__all__ = ["Fake4bit"]


class Fake4bit(bnb.nn.Linear4bit):
    """A linear layer in 4 bits whose packed weight has the right number of bytes.

    Args:
        layer: the layer that it stands for.
        dtype: that it computes in.
        double_quant: its scales are quantised, too: they are decoded first.
        block_size: weights that share a scale.
    """

    ledger: Ledger | None = None  # set while a step runs: it notes the decoded weights as a kind of their own

    def __init__(self, layer: bnb.nn.Linear4bit, dtype: torch.dtype, double_quant: bool, block_size: int) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype, self.double_quant, self.block_size = dtype, double_quant, block_size
        packed = torch.empty(-(-self.weights // 2), 1, dtype=torch.uint8, device="meta")
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = double_quant, "nf4"
        self.bias = layer.bias

    @property
    def weights(self) -> int:
        """How many weights it stands for."""
        return self.in_features * self.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As bitsandbytes' own: in the compute dtype, and back to that of the input."""
        return _Product.apply(x.to(self.compute_dtype), self).to(x.dtype)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in 16 or 32 bits; with double quantisation the scales are decoded first."""
        with self.ledger.kind(DEQUANTISED):
            scales = torch.empty(-(-self.weights // self.block_size), device="meta") if self.double_quant else None
            weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
            del scales
        return weight


class _Product(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit on a GPU: decode, multiply; and decode again in the backward pass. Nothing is saved."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.decoded(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        return torch.matmul(gradient, ctx.layer.decoded(gradient.dtype)), None
