"""CUDA's autocast for tensors without values: torch has none for the "meta" device.

It is on where torch's CPU autocast is on, in its dtype, so that checkpointing switches it on again when it recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

__all__ = ["Autocast", "autocast_is_on"]

_is_on, _dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
_NARROW = (torch.float16, torch.bfloat16)

# Matrix products, in the narrow dtype (aten/src/ATen/autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP).
_PRODUCTS = (
    (F, ("linear", "conv1d", "conv2d", "conv3d")),
    (torch, ("matmul", "bmm", "mm", "mv", "baddbmm", "addmm", "addbmm", "einsum", "conv1d", "conv2d", "conv3d")),
    (torch.Tensor, ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "baddbmm", "addmm", "addbmm")),
)
# Functions that layers use and that run in float32 (AT_FORALL_FP32) ...
_IN_FLOAT32 = ("pow", "__pow__", "rsqrt", "exp", "expm1", "log", "log2", "log10", "log1p", "reciprocal", "logsumexp")
# ... and those that give float32 without a copy of their input (AT_FORALL_FP32_SET_OPT_DTYPE).
_INTO_FLOAT32 = ("cumsum", "cumprod", "prod", "sum", "log_softmax")


def autocast_is_on() -> bool:
    """Whether the products run in 16 bits."""
    return _is_on("cpu")


class _OfTheCpu(torch.autocast):
    """Autocast on any device is that of the CPU."""

    def __init__(self, device_type: str, *args, **kwargs) -> None:
        super().__init__("cpu", *args, **kwargs)


class Autocast:
    """The functions that autocast changes, with the copies of weights that it keeps until it ends."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._forget = torch.clear_autocast_cache

    def changes(self) -> Iterator[tuple[object, str, Callable]]:
        """Where a function is, its name, and what goes in its place."""
        for place, names in _PRODUCTS:
            for name in names:
                yield place, name, self._narrow(getattr(place, name))
        for place in (torch, torch.Tensor):
            for name in _IN_FLOAT32:
                if hasattr(place, name):
                    yield place, name, _in_float32(getattr(place, name))
            for name in _INTO_FLOAT32:
                yield place, name, _into_float32(getattr(place, name))
        yield F, "softplus", _in_float32(F.softplus)
        yield F, "log_softmax", _into_float32(F.log_softmax)
        yield F, "softmax", _softmax
        for place in (torch, torch.Tensor):
            yield place, "softmax", _softmax_at
        yield F, "layer_norm", _layer_norm
        yield F, "rms_norm", _rms_norm
        yield torch, "clear_autocast_cache", self._clear
        # the libraries ask about the device of their tensors, and PEFT about CUDA
        yield torch, "is_autocast_enabled", lambda device="cpu": _is_on("cpu")
        yield torch, "get_autocast_dtype", lambda device="cpu": _dtype("cpu")
        yield torch, "autocast", _OfTheCpu

    def _clear(self) -> None:
        self._copies.clear()
        self._forget()

    def cast(self, value: object) -> object:
        """A tensor in the narrow dtype; the copy of a trained weight is kept (cached_cast in autocast_mode.cpp)."""
        if isinstance(value, list | tuple):
            return type(value)(map(self.cast, value))
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        dtype = _dtype("cpu")
        if value.dtype == dtype:
            return value
        keep = value.is_leaf and value.requires_grad and not value._is_view() and value.dtype == torch.float32
        if keep and (found := self._copies.get(id(value))):
            return found[1]
        narrow = value.to(dtype)
        if keep:
            self._copies[id(value)] = value, narrow
        return narrow

    def _narrow(self, function: Callable) -> Callable:
        def run(*args, **kwargs):
            if _is_on("cpu"):
                args = tuple(map(self.cast, args))
                kwargs = {name: self.cast(value) for name, value in kwargs.items()}
            return function(*args, **kwargs)

        return run


def _in_float32(function: Callable) -> Callable:
    def run(x, *args, **kwargs):
        narrow = isinstance(x, torch.Tensor) and x.dtype in _NARROW  # pow takes a number, too
        return function(x.float() if _is_on("cpu") and narrow else x, *args, **kwargs)

    return run


def _into_float32(function: Callable) -> Callable:
    def run(x, *args, **kwargs):
        if _is_on("cpu") and x.dtype in _NARROW and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return function(x, *args, **kwargs)

    return run


# These go straight to torch's operations: the functions in torch.nn.functional look themselves up again by name.


def _softmax_at(x, dim, dtype=None):
    if dtype is None and _is_on("cpu"):
        dtype = torch.float32
    if x.dtype == torch.float16 and dtype == torch.float32:  # CUDA does both in one kernel (SoftMax.cpp)
        return torch._softmax(x, dim, True)
    return torch._softmax(x if dtype is None else x.to(dtype), dim, False)


def _softmax(x, dim=None, _stacklevel=3, dtype=None):
    return _softmax_at(x, dim, dtype)


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    if not _is_on("cpu"):
        return torch.layer_norm(x, shape, weight, bias, eps)
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return torch.layer_norm(x.float(), shape, weight, bias, eps)


def _rms_norm(x, shape, weight=None, eps=None):
    if _is_on("cpu"):
        x, weight = x.float(), None if weight is None else weight.float()
    return torch.rms_norm(x, shape, weight, eps)
