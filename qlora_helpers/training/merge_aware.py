"""Training with the weights that a merge into 4 bits will give.

PEFT merges an adapter into a 4-bit layer by rounding the sum of both to 4 bits again, W' = Q(W4 + s·B·A), which takes back
much of a small difference (lesson 6). Here the last steps of a run compute with W' itself, so that A and B learn what is
left of them. Rounding has no useful gradient of its own; gradients pass to A and B as if nothing had been rounded (the
straight-through estimator: Bengio, Léonard and Courville, arXiv 1308.3432). After such a run a merge changes nothing: it
gives the very weights that the run trained with.

W' is what PEFT's merge and bitsandbytes make of each layer, with the layer's own format, block size and double
quantisation; `tests/training/test_merge_aware.py` holds both against each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit
from transformers import TrainerCallback

from qlora_helpers.models.decoded_once import MOST_BYTES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["MergeAware", "first_aware_step", "merged_weight"]


def first_aware_step(share: float, steps: int) -> int:
    """The first of the steps, counted from 1, that trains with the merged weights: the last `share` of them do.

    Returns:
        `steps + 1` if none does.
    """
    return steps - math.ceil(share * steps - 1e-9) + 1  # 0.3 of 10 steps are 3, though 0.3 * 10 may be more


@torch.no_grad()
def merged_weight(layer: Linear4bit, decoded: torch.Tensor | None = None) -> torch.Tensor:
    """The weight that the layer will have once its active adapter is merged, decoded: [out_features, in_features].

    Args:
        decoded: the layer's 4-bit weight, if it has been decoded already.

    Returns:
        In the dtype that the layer computes in.
    """
    base = layer.get_base_layer()
    packed, state = base.weight.data, base.weight.quant_state
    [adapter] = layer.active_adapters
    with torch.autocast(packed.device.type, enabled=False):  # a merge is not in a step, which may compute in 16 bits
        if decoded is None:
            decoded = bnb.functional.dequantize_4bit(packed, state)
        again, state_again = bnb.functional.quantize_4bit(
            decoded + layer.get_delta_weight(adapter),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=packed.dtype,
        )
        return bnb.functional.dequantize_4bit(again, state_again).to(base.compute_dtype)


class _StraightThrough(torch.autograd.Function):
    """x W'ᵀ, with the gradients of x W'ᵀ for x, and of x (W4 + s·B·A)ᵀ for A and B."""

    @staticmethod
    def forward(ctx, x, A, B, of_layer):
        ctx.save_for_backward(x, A, B)
        ctx.of_layer = of_layer
        return torch.nn.functional.linear(x, of_layer.weight())

    @staticmethod
    def backward(ctx, output_gradient):
        x, A, B = ctx.saved_tensors
        scaling = ctx.of_layer.scaling
        gradient = output_gradient.reshape(-1, output_gradient.shape[-1])  # [tokens, out_features]
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in_features]
        for_A = scaling * (gradient @ B.to(gradient.dtype)).T @ rows
        for_B = scaling * gradient.T @ (rows @ A.to(rows.dtype).T)
        for_x = output_gradient @ ctx.of_layer.weight() if ctx.needs_input_grad[0] else None
        return for_x, for_A.to(A.dtype), for_B.to(B.dtype), None


class _Layer:
    """How a layer computes within the block: as it is, or with its merged weight."""

    def __init__(self, layer: Linear4bit, run: MergeAware, keep: bool):
        self.layer, self.run, self.keep = layer, run, keep
        [self.adapter] = layer.active_adapters
        self.scaling = layer.scaling[self.adapter]
        state = layer.get_base_layer().weight.quant_state
        self.decoded = bnb.functional.dequantize_4bit(layer.get_base_layer().weight.data, state) if keep else None
        self.merged: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """The merged weight: kept until the next step in a tiny model, else made anew, also in the backward pass."""
        if self.merged is not None:
            return self.merged
        merged = merged_weight(self.layer, self.decoded)
        if self.keep:
            self.merged = merged
        return merged

    def __call__(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.layer.training and not self.run.now:
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        base = self.layer.get_base_layer()
        A, B = self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight
        output = _StraightThrough.apply(x.to(base.compute_dtype), A, B, self)
        if base.bias is not None:
            output = output + base.bias.to(output.dtype)
        return output.to(x.dtype)


class MergeAware(TrainerCallback):
    """The part of a run that trains with the merged weights, as a callback of its trainer.

    Evaluations within the run are of the merged model from the start on, since that is what will be used.

    Attributes:
        first: the first step, counted from 1, that trains with them.
        now: whether the step at work does.
    """

    def __init__(self, first: int):
        self.first, self.now = first, False
        self._layers: list[_Layer] = []

    @contextmanager
    def in_layers_of(self, model: PeftModel, most_bytes: int = MOST_BYTES) -> Iterator[int]:
        """Within the block, the adapted 4-bit layers of the model compute as the run's step wants it.

        Args:
            most_bytes: if the decoded weights, in float32, would take more, none is kept: each is made anew in every
                forward and every backward pass.

        Yields:
            The number of such layers.

        Raises:
            ValueError: the model has no adapted 4-bit layer.
        """
        found = [module for module in model.modules() if isinstance(module, Linear4bit)]
        if not found:
            raise ValueError(f"model={type(model).__name__}: it has no 4-bit layer with an adapter to merge")
        size = sum(4 * layer.get_base_layer().weight.quant_state.shape.numel() for layer in found)
        self._layers = [_Layer(layer, self, keep=size <= most_bytes) for layer in found]
        try:
            for of_layer in self._layers:
                of_layer.layer.forward = of_layer
            yield len(found)
        finally:
            for of_layer in self._layers:
                vars(of_layer.layer).pop("forward", None)
            self._layers = []

    def _forget(self) -> None:
        for of_layer in self._layers:
            of_layer.merged = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now = state.global_step + 1 >= self.first

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._forget()  # A and B have changed
