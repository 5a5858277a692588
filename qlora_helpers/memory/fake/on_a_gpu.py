"""CPU kernels and CPU autocast replaced by what a GPU does, for steps on fake tensors.

The libraries run on this machine's CPU build of torch, on tensors without values. Where a CUDA build takes other kernels or
other dtypes, they are put in its place here, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import masking_utils
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from qlora_helpers.memory.fake.autocast import Autocast, autocast_is_on
from qlora_helpers.memory.fake.ledger import Ledger
from qlora_helpers.memory.layers import TILE

__all__ = ["LARGEST_FLASH_HEAD", "fused_head", "on_a_gpu"]

LARGEST_FLASH_HEAD = 256  # elements (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_head_dim_size_flash)

# torch's names for it; transformers takes the first that there is
_GROUPED = ((F, "grouped_mm"), (torch, "_grouped_mm"))
_AUX_LOSS = "load_balancing_loss_func"  # its name in each family of transformers that has one
_NARROW = (torch.float16, torch.bfloat16)
_ONE_AT_A_TIME = RLock()  # what is replaced is torch's for all threads


# ---- Attention


def _with_as_many_heads(q: torch.Tensor, *keys: torch.Tensor) -> Iterator[torch.Tensor]:
    for x in keys:
        groups = q.shape[1] // x.shape[1]
        yield x.repeat_interleave(groups, -3) if groups > 1 else x


def _attention(kernel: str, capability: tuple[int, int]) -> Callable:
    """`scaled_dot_product_attention` in the kernel that torch picks on a GPU.

    Args:
        kernel: "sdpa" (FlashAttention where it can be used, else the memory-efficient one) or "math".
        capability: the GPU's compute capability.
    """

    def pick(q, k, v, mask, may_share: bool) -> str:
        shared = k.shape[1] != q.shape[1]
        if kernel == "math":
            return "math"
        heads_suit = q.shape[-1] == k.shape[-1] == v.shape[-1] <= LARGEST_FLASH_HEAD and (may_share or not shared)
        if mask is None and capability >= (8, 0) and q.dtype in _NARROW and heads_suit:
            return "flash"
        return "math" if shared else "efficient"  # the memory-efficient kernel takes no shared key heads

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if autocast_is_on():
            q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
        picked = pick(q, k, v, attn_mask, enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # made a bias of the queries' dtype
            attn_mask = torch.empty(attn_mask.shape, dtype=q.dtype, device="meta")
        if picked == "flash":
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        if picked == "efficient":
            if attn_mask is not None:
                attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )[0]
        with torch.autocast("cpu", enabled=False):
            if enable_gqa:
                k, v = _with_as_many_heads(q, k, v)
            return torch.ops.aten._scaled_dot_product_attention_math(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale
            )[0]

    return attention


def _dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, training)[0] if training and p else x  # masks of one byte


# ---- Experts


class _GroupedProduct(torch.autograd.Function):
    """torch's product of tokens with the expert that each was sent to: its rules for fake tensors know bfloat16 alone."""

    @staticmethod
    def forward(ctx, tokens, weights):
        ctx.save_for_backward(tokens if ctx.needs_input_grad[1] else None, weights)
        return torch.empty(tokens.shape[0], weights.shape[2], dtype=tokens.dtype, device="meta")

    @staticmethod
    def backward(ctx, gradient):
        tokens, weights = ctx.saved_tensors
        of_tokens = torch.empty(gradient.shape[0], weights.shape[1], dtype=gradient.dtype, device="meta")
        return of_tokens if ctx.needs_input_grad[0] else None, None if tokens is None else torch.empty_like(weights)


def _one_hot(ledger: Ledger) -> Callable:
    """Which expert each token was sent to; the ledger learns among how many."""
    plain = F.one_hot

    def one_hot(*args, **kwargs):
        return ledger.values.choices(plain(*args, **kwargs))

    return one_hot


def _grouped_product(tokens, weights, *, offs=None, bias=None, out_dtype=None):
    return _GroupedProduct.apply(tokens, weights)


# ---- TRL's output head


class _Pick(torch.autograd.Function):
    """`hidden_states[mask]` with every token scored: on a GPU a copy, and zeros to write its gradient into."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.shape = hidden.shape
        return torch.empty(hidden.shape[0] * hidden.shape[1], hidden.shape[2], dtype=hidden.dtype, device="meta")

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(ctx.shape, dtype=gradient.dtype, device="meta")


def fused_head() -> Callable:
    """TRL's `add_fused_lm_head`; on a GPU a Triton kernel folds its tiles, which takes nothing besides the tile.

    Raises:
        RuntimeError: the installed TRL treats the scored tokens in a way that is not known here.
    """
    source = inspect.getsource(trl_utils.add_fused_lm_head)
    picks = "hidden_states[mask] if compact else hidden_states.reshape(-1, hidden_states.size(-1))"
    if picks not in source:
        raise RuntimeError(
            "the installed TRL has another fused output head: how much memory it takes is not known here"
        )
    space = dict(vars(trl_utils), _pick=_Pick.apply)
    exec(source.replace(picks, "_pick(hidden_states)"), space)
    return space["add_fused_lm_head"]


def _empty(ledger: Ledger) -> Callable:
    """`torch.empty` for the tiles of logits, which the ledger notes as a kind of their own."""

    def empty(*args, **kwargs):
        with ledger.kind(TILE):
            return torch.empty(*args, **kwargs)

    return empty


class _Torch:
    """The torch module with another `empty`."""

    def __init__(self, empty: Callable) -> None:
        self.empty = empty

    def __getattr__(self, name: str):
        return getattr(torch, name)


def _aux_loss_of_all(plain: Callable, layers: int) -> Callable:
    """The load-balancing loss, given the routers of all layers although only some of them run."""

    def loss(gate_logits, *args, **kwargs):
        if layers and isinstance(gate_logits, tuple) and gate_logits:
            gate_logits = tuple(gate_logits[i * len(gate_logits) // layers] for i in range(layers))
        return plain(gate_logits, *args, **kwargs)

    return loss


# ---- All of it


@contextmanager
def on_a_gpu(
    ledger: Ledger, kernel: str, capability: tuple[int, int], family: ModuleType, routed_layers: int
) -> Iterator[None]:
    """What runs within takes the memory that it would on a GPU.

    Args:
        ledger: of the run.
        kernel: of attention: "sdpa", "math" or "eager" (which is Python and needs no replacement).
        capability: the GPU's compute capability.
        family: the module of transformers that the model is from.
        routed_layers: how many layers with a router the whole model has, for the load-balancing loss.
    """
    changes: list[tuple[object, str, object]] = [
        (F, "scaled_dot_product_attention", _attention(kernel, capability)),
        (F, "dropout", _dropout),
        (F, "one_hot", _one_hot(ledger)),
        *((place, name, _grouped_product) for place, name in _GROUPED if hasattr(place, name)),
        (chunked_logprob, "_forward_tile", lambda *args, **kwargs: None),
        (chunked_logprob, "_backward_tile", lambda *args, **kwargs: None),
        (chunked_logprob, "_addmm_fp32", lambda *args: None),
        (chunked_logprob, "torch", _Torch(_empty(ledger))),
    ]
    if plain := getattr(family, _AUX_LOSS, None):
        changes.append((family, _AUX_LOSS, _aux_loss_of_all(plain, routed_layers)))
    changes += Autocast().changes()
    # every token of a full batch counts
    ignores = masking_utils._ignore_causal_mask_sdpa
    changes.append((masking_utils, "_ignore_causal_mask_sdpa", lambda mask, *args, **kw: ignores(None, *args, **kw)))
    with _ONE_AT_A_TIME, ExitStack() as stack:
        for place, name, new in changes:
            stack.enter_context(mock.patch.object(place, name, new))
        yield
