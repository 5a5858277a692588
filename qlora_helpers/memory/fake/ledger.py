"""A ledger of all tensors that a run makes: their bytes, and when each of them comes and goes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_helpers.memory.fake.values import Values
from qlora_helpers.memory.tape import rounded

__all__ = ["ALIVE", "Ledger"]

ALIVE = 1 << 60  # the time of an end that has not come


class Ledger(TorchDispatchMode):
    """Notes each storage that is made, in bytes as the allocator rounds them, and the moment at which it is freed.

    Time is a count of events: a storage that is made, one that is freed, or a mark.

    Attributes:
        sizes, births, deaths, kinds: one entry for each storage, in the order in which they were made. A death is `ALIVE`
            until it comes.
        marks: the times and names of the moments that `mark` noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.births: list[int] = []
        self.deaths: list[int] = []
        self.kinds: list[str | None] = []
        self.marks: list[tuple[int, str]] = []
        self.clock = 0
        self._kind: str | None = None
        self._alive: dict[int, int] = {}  # the entry of each storage that is alive
        self.in_backward = False
        self._waiting: str | None = None
        self._sum: tuple[int, int] | None = None  # the storages of a sum that was just made, and of its first part
        self.values = Values()

    def mark(self, name: str, with_next: bool = False) -> None:
        """Note that a part of the run begins here; or `with_next`, with the next piece of memory that is made."""
        if with_next:
            self._waiting = name
            return
        self._waiting = None
        self.clock += 1
        self.marks.append((self.clock, name))

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """What is made within is of this kind."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def brief(self, sizes: tuple[int, ...]) -> None:
        """Note memory that a kernel takes and gives back by itself, which no operation shows."""
        first = len(self.sizes)
        for size in sizes:
            self._note(rounded(size), self._kind)
        for entry in range(first, len(self.sizes)):
            self.clock += 1
            self.deaths[entry] = self.clock

    def _note(self, size: int, kind: str | None) -> None:
        if self._waiting:
            self.mark(self._waiting)
        self._sum = None
        self.clock += 1
        self.sizes.append(size)
        self.births.append(self.clock)
        self.deaths.append(ALIVE)
        self.kinds.append(kind)

    def _free(self, key: int) -> None:
        if self._sum and key == self._sum[1]:
            self._keep_for_the_sum(key)
            return
        self.clock += 1
        self.deaths[self._alive.pop(key)] = self.clock

    def _keep_for_the_sum(self, key: int) -> None:
        """The sum of two gradients takes the place of the first.

        autograd adds a second gradient of a tensor to the first in place if nothing else holds it; not so while a dispatch
        mode such as this one is on (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace). So if the first is gone
        right after its sum was made, the sum has its memory.
        """
        sum_key, entry = self._sum[0], self._alive[self._sum[0]]
        self.clock += 1
        self.sizes[entry], self.deaths[entry] = 0, self.clock  # it took nothing
        self._alive[sum_key] = self._alive.pop(key)
        self._sum = None

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = len(self.sizes)
            self._note(rounded(storage.nbytes()), self._kind)
            weakref.finalize(storage, self._free, storage._cdata)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is _VALUE_OF and args[0].is_meta:
            return self.values.value_of(args[0])
        if function is _INDEX and args[0].is_meta:
            args = args[0], self._by_places(args[1])
        if function is _NONZERO and args[0].is_meta:
            result = self.values.places_in(args[0])
        else:
            result = function(*args, **(kwargs or {}))
        self.values.note(function, args, kwargs or {}, result)
        if isinstance(result, torch.Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for part in result:
                if isinstance(part, torch.Tensor):
                    self._see(part)
        if self.in_backward and function is _ADD and not torch.is_grad_enabled():
            self._note_sum(result, *args[:2])
        if taken := _INSIDE.get(function):
            self.brief(taken(*args))
        return result

    def _by_places(self, indices: list) -> list:
        """Where a mask picks elements, the places that are picked, as a kernel finds them first."""
        found: list = []
        for index in indices:
            masks = index is not None and index.dtype in (torch.bool, torch.uint8)
            found += self.values.places_in(index).unbind(1) if masks else [index]
        return found

    def _note_sum(self, result: torch.Tensor, first: torch.Tensor, second: object) -> None:
        if not isinstance(second, torch.Tensor) or not first.shape == second.shape == result.shape:
            return
        of_result, of_first = result.untyped_storage(), first.untyped_storage()
        if of_first.nbytes() == of_result.nbytes():
            self._sum = of_result._cdata, of_first._cdata


_ADD = torch.ops.aten.add.Tensor
_INDEX = torch.ops.aten.index.Tensor
_NONZERO = torch.ops.aten.nonzero.default
_VALUE_OF = torch.ops.aten._local_scalar_dense.default


# ---- What CUDA kernels take internally


def _flash_attention_backward(gradient, query, key, *_) -> tuple[int, ...]:
    """aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: sums in float32, and gradients per head."""
    batch, heads, tokens, head = query.shape
    rows = batch * heads * (-(-tokens // 128) * 128)
    expanded = 2 * (query.numel() * query.element_size(),) if key.shape[1] != heads else ()
    return (rows * 4, rows * (-(-head // 32) * 32) * 4, *expanded)


def _efficient_attention_backward(gradient, query, *_) -> tuple[int, ...]:
    """aten/src/ATen/native/transformers/cuda/attention_backward.cu: one float32 number for each query and head."""
    batch, heads, tokens, _ = query.shape
    return (batch * heads * tokens * 4,)


def _softmax_backward(gradient, output, *_) -> tuple[int, ...]:
    """aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out: gradient * output."""
    return (output.numel() * output.element_size(),)


_INSIDE = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_attention_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: _efficient_attention_backward,
    torch.ops.aten._softmax_backward_data.default: _softmax_backward,
}
