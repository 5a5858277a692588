"""What autograd keeps for a backward pass: the bytes that a piece of code holds so that gradients could be computed.

A graph that nobody needs any more is often still held by a loss that was added to a sum, and its activations with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["MostSaved", "most_saved"]


class _Saved:
    """A tensor that the graph keeps; it lives as long as the graph does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # with its history, an operation that keeps its own output would never be freed


@dataclass(frozen=True)
class MostSaved:
    """What was held while a function ran.

    Attributes:
        result: what it returned.
        most_bytes: in the tensors that the graph kept, at the moment when it kept the most; each storage counts once.
    """

    result: Any
    most_bytes: int


class _Counter:
    def __init__(self) -> None:
        self.most = self.now = 0
        self.held: dict[int, int] = {}  # a storage's address, and how many tensors of it are kept

    def pack(self, tensor: torch.Tensor) -> _Saved:
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not self.held.get(address):
            self.now += size
            self.most = max(self.most, self.now)
        self.held[address] = self.held.get(address, 0) + 1
        weakref.finalize(saved, self._let_go, address, size)
        return saved

    def _let_go(self, address: int, size: int) -> None:
        self.held[address] -= 1
        if not self.held[address]:
            del self.held[address]
            self.now -= size


def most_saved(function: Callable[..., Any], *arguments: Any) -> MostSaved:
    """Call a function, and measure the most bytes that autograd keeps for a backward pass at any one time.

    On any device. Weights that the graph refers to count too, once each. Without gradients (`torch.no_grad()`) nothing is
    kept: 0 bytes.

    Args:
        function: called with `arguments`.
    """
    counter = _Counter()
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda saved: saved.tensor):
        result = function(*arguments)
    return MostSaved(result, counter.most)
