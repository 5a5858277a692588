"""The few values that a run's Python asks for, of tensors that have none.

A full batch is ones throughout: its tokens, its mask, its labels. What a model makes of such tensors, such as the sum of a
mask, is known again as long as every element is the same. For anything else, a question that decides nothing about memory
has the usual answer, and any other is refused.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["Values"]

_aten = torch.ops.aten
_MAKE = {_aten.ones.default: 1, _aten.zeros.default: 0, _aten.ones_like.default: 1, _aten.zeros_like.default: 0}
_FILL = (_aten.full.default, _aten.full_like.default, _aten.scalar_tensor.default)
_SAME_NAMES = ("all", "any", "max", "min", "amax", "amin", "mean")
_ELEMENTWISE = (
    "eq", "ne", "lt", "le", "gt", "ge", "bitwise_not", "bitwise_and", "bitwise_or", "logical_not", "logical_and",
    "logical_or", "add", "sub", "rsub", "mul", "div", "neg", "_to_copy", "clone", "where", "clamp", "abs", "remainder",
    "floor_divide", "maximum", "minimum",
)  # fmt: skip


class Values:
    """What is known of tensors: the value that all elements of one share, the highest of a count, the share that is not 0."""

    def __init__(self) -> None:
        self._known: dict[int, bool | int | float] = {}
        self._classes: dict[int, int] = {}  # of a choice for each token: one of so many is not 0
        self._most: dict[int, int] = {}  # of positions, which count from 0

    def _tell(self, tensor: torch.Tensor, value: bool | int | float, known: dict | None = None) -> None:
        key = tensor.untyped_storage()._cdata
        known = self._known if known is None else known
        if key not in known:
            weakref.finalize(tensor.untyped_storage(), known.pop, key, None)
        known[key] = value

    def of(self, tensor: torch.Tensor) -> bool | int | float | None:
        """The value of all elements; None if they differ, or it is not known."""
        return self._known.get(tensor.untyped_storage()._cdata)

    def value_of(self, tensor: torch.Tensor) -> bool | int | float:
        """The value of the one element of a tensor.

        Raises:
            RuntimeError: it is not known.
        """
        value = self.of(tensor)
        if value is None:
            raise RuntimeError("its code asks for the value of a tensor, which only a run with real weights has")
        return value

    def places_in(self, mask: torch.Tensor) -> torch.Tensor:
        """Where a mask is not 0: everywhere; or of a choice among experts an even share, as training aims at.

        Any of the places does for what memory depends on; that they are 0 stands for that.
        """
        classes = self._classes.get(mask.untyped_storage()._cdata, 1)
        rows = 0 if self.of(mask) == 0 else -(-mask.numel() // classes)
        places = torch.empty(rows, mask.dim(), dtype=torch.long, device="meta")
        self._tell(places, 0)
        return places

    def choices(self, one_hot: torch.Tensor) -> torch.Tensor:
        """Note that the last dimension has one element each that is not 0."""
        self._tell(one_hot, one_hot.shape[-1], self._classes)
        self._known.pop(one_hot.untyped_storage()._cdata, None)
        return one_hot

    def note(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> None:
        """Note what is known of the result of an operation."""
        if not isinstance(result, torch.Tensor):
            if isinstance(result, tuple) and len(result) == 2 and function.overloadpacket._qualified_op_name in _PAIRS:
                self._note_reduction(function, args, result[0])
            return
        name = function.overloadpacket.__name__
        if function is _aten.nonzero.default:
            return
        if function in _MAKE:
            self._tell(result, _MAKE[function])
        elif function in _FILL or name == "fill_":
            value = args[0] if function is _aten.scalar_tensor.default else args[1]
            if isinstance(value, bool | int | float):
                self._tell(result, value)
        elif name == "rand" and not result.dim():
            self._tell(result, 1.0)  # a layer is dropped if the number is small: none is
        elif name == "arange":
            self._note_arange(args, result)
        elif name.endswith("_") and not name.startswith("_") and args and args[0] is result:
            self._known.pop(result.untyped_storage()._cdata, None)  # changed in place
        elif name == "sum" or name in _SAME_NAMES:
            self._note_reduction(function, args, result)
        elif name in _ELEMENTWISE:
            self._note_elementwise(function, args, kwargs, result)

    def _note_arange(self, args: tuple, result: torch.Tensor) -> None:
        counts = not result.is_floating_point() and result.numel() and all(isinstance(entry, int) for entry in args)
        if counts and len(args) <= 2:
            self._tell(result, args[-1] - 1, self._most)

    def _note_reduction(self, function, args: tuple, result: torch.Tensor) -> None:
        name = function.overloadpacket.__name__
        tensor = args[0]
        value = self.of(tensor)
        if value is not None and result.numel():
            times = tensor.numel() // result.numel() if name == "sum" else 1
            self._tell(result, bool(value) if name in ("all", "any") else value * times)
        elif name in ("all", "any"):  # of a full batch all tokens count, and none is out of the ordinary
            self._tell(result, name == "all")
        elif name in ("max", "amax") and (most := self._most.get(tensor.untyped_storage()._cdata)) is not None:
            self._tell(result, most)

    def _note_elementwise(self, function, args: tuple, kwargs: dict, result: torch.Tensor) -> None:
        tensors = [entry for entry in tree_flatten((args, kwargs))[0] if isinstance(entry, torch.Tensor)]
        values = [self.of(tensor) for tensor in tensors]
        if not tensors or any(value is None for value in values):
            return

        def one(entry):
            if isinstance(entry, torch.Tensor):
                return torch.full((), self.of(entry), dtype=entry.dtype, device="cpu")
            return torch.device("cpu") if isinstance(entry, torch.device) else entry

        with torch.utils._python_dispatch._disable_current_modes():
            value = function(*tree_map(one, args), **tree_map(one, kwargs)).item()
        self._tell(result, value)


_PAIRS = ("aten::max", "aten::min")
