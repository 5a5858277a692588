"""Tensors that have a size but no values, with autograd: enough to see what a training step keeps in memory.

A `Tensor` holds a `Buffer`, which is freed when Python drops its last reference, as in torch. An operation makes a new
tensor and records what its backward pass will need, which keeps it alive. So the code of a layer, written with these
tensors, takes and frees memory in the same order as the layer in torch, in a millisecond and without torch.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["BLOCK", "FLOAT32", "Backward", "Buffer", "Node", "Tape", "Tensor", "rounded"]

BLOCK = 512  # bytes: the CUDA caching allocator rounds every request up to a multiple of it (torch/c10, kMinBlockSize)
FLOAT32 = 4  # bytes of one number


def rounded(size: float) -> int:
    """Bytes that the allocator hands out for a request of this size."""
    return -(-int(size) // BLOCK) * BLOCK


class Buffer:
    """Memory on a tape, freed with its last reference."""

    __slots__ = ("kind", "size", "tape")

    def __init__(self, tape: Tape, size: int, kind: str | None = None) -> None:
        self.tape, self.size, self.kind = tape, rounded(size), kind
        tape.live += self.size
        if kind:
            tape.live_of[kind] = tape.live_of.get(kind, 0) + self.size
        if tape.live > tape.peak:
            tape.peak, tape.peak_of = tape.live, tape.live_of.copy() if tape.live_of else tape.live_of

    def __del__(self) -> None:
        self.tape.live -= self.size
        if self.kind:
            self.tape.live_of[self.kind] -= self.size


class Node:
    """An operation that the backward pass visits."""

    __slots__ = ("backward", "inputs")

    def __init__(self, inputs: tuple[Node | None, ...], backward: Backward | None) -> None:
        self.inputs, self.backward = inputs, backward


class Tensor:
    """Elements of one width in bytes; `node` is the operation that made it, or None if no gradient flows there."""

    __slots__ = ("buffer", "elements", "node", "width")

    def __init__(self, buffer: Buffer, elements: int, width: int, node: Node | None = None) -> None:
        self.buffer, self.elements, self.width, self.node = buffer, elements, width, node

    def view(self, elements: int | None = None) -> Tensor:
        """The same memory in another shape, or a part of it."""
        return Tensor(self.buffer, self.elements if elements is None else elements, self.width, self.node)


# From the gradient of a result to those of its inputs, one each; None for an input that needs none.
Backward = Callable[[Tensor], tuple[Tensor | None, ...]]


class Tape:
    """Counts the bytes that are alive, and their peak: in total, and the bytes of each kind at that moment."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.live_of: dict[str, int] = {}
        self.peak_of: dict[str, int] = {}
        self.nodes: list[Node] = []
        self.weight_gradients: list[Tensor] = []

    def new(self, elements: int, width: int, kind: str | None = None) -> Tensor:
        """A tensor without history; memory of a `kind` is also counted separately."""
        return Tensor(Buffer(self, elements * width, kind), elements, width)

    def forget_peak(self) -> None:
        """Let the peak begin again at what is alive now."""
        self.peak, self.peak_of = self.live, self.live_of.copy()

    def source(self, elements: int, width: int) -> Tensor:
        """A tensor that requires a gradient: the input of a layer."""
        return self._noted(self.new(elements, width), (), None)

    def _noted(self, out: Tensor, inputs: tuple, backward) -> Tensor:
        out.node = Node(inputs, backward)
        self.nodes.append(out.node)
        return out

    def apply(self, elements: int, width: int, inputs: tuple[Tensor, ...], backward: Backward) -> Tensor:
        """The result of an operation.

        Args:
            elements, width: of the result.
            inputs: the tensors that it was computed from.
            backward: maps the gradient of the result to those of the inputs, one each. What it refers to is what autograd
                saves. The gradient of an input that needs none is dropped.
        """
        out = self.new(elements, width)
        if any(tensor.node for tensor in inputs):
            self._noted(out, tuple(tensor.node for tensor in inputs), backward)
        return out

    def with_weights(self, elements: int, width: int, inputs: tuple[Tensor, ...], backward: Backward) -> Tensor:
        """The same, for an operation with trainable weights: it is recorded even if no input needs a gradient."""
        return self._noted(self.new(elements, width), tuple(tensor.node for tensor in inputs), backward)

    def keep_weight_gradient(self, gradient: Tensor) -> None:
        """Keep the gradient of a weight until the optimizer step."""
        self.weight_gradients.append(gradient)

    def backward(self, last: Node, gradient: Tensor) -> None:
        """Go back from an operation, given its gradient. What an operation has saved is freed once it is done."""
        gradients = {id(last): gradient}
        del gradient
        while self.nodes:
            node = self.nodes.pop()
            incoming = gradients.pop(id(node), None)
            if incoming is None or node.backward is None:
                continue
            results = node.backward(incoming)
            del incoming
            node.backward = None
            for source, result in zip(node.inputs, results, strict=True):
                if source is not None and result is not None and id(source) not in gradients:
                    gradients[id(source)] = result  # a second one is added in place
            del results, result
