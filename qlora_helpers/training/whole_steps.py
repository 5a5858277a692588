"""The chats of an optimizer step as one batch, which goes through the model in parts of a few rows.

The trainer's own accumulation takes as many batches as it was told, of as many chats each. Here the step comes whole, so
that packing can put its chats into as few rows as they need, and so that a step that runs out of memory can be made again
in smaller parts: nothing of it is left but gradients, which are set back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qlora_helpers.settings import Settings

__all__ = ["ROW_ENDS", "ShareOfStep", "WithRowEnds", "safer", "split", "without_loss"]

ROW_ENDS = "row_ends"  # of a batch: for each row, the place after its last token that is no padding


@dataclass(frozen=True)
class ShareOfStep:
    """A collator that takes one process's share of the chats, of which each process reads all.

    So a step has the same chats on any number of processes. accelerate's way, where each process reads batches of its own,
    would fill up the last step of an epoch with chats from the epoch's start.

    Attributes:
        collator: makes a batch of the share.
        rank, processes: which share of how many.
    """

    collator: Callable[[Sequence[Any]], dict[str, Any]]
    rank: int
    processes: int

    def __call__(self, chats: Sequence[Any]) -> dict[str, Any]:
        """The chats are dealt out from the longest to the shortest, so that no process waits long for another.

        With fewer chats than processes, one without a share computes on the shortest chat, without a loss: its gradients
        are zero, and the others do not wait for it in vain.
        """
        longest_first = sorted(chats, key=lambda chat: -len(chat["input_ids"]))
        share = longest_first[self.rank :: self.processes]
        if share:
            return self.collator(share)
        return without_loss(self.collator(longest_first[-1:]))


def without_loss(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch none of whose tokens counts in the loss."""
    return batch | {"labels": torch.full_like(batch["labels"], -100)}


@dataclass(frozen=True)
class WithRowEnds:
    """A collator whose batches say where each row ends.

    To find that out from the tensors would make the CPU wait for the GPU at each step. Where the padding comes last, which it
    does here, a causal model needs no mask for it: no token sees what comes after it, and the padding has no loss. Without
    one, attention runs in kernels that are faster and take less memory.

    Attributes:
        collator: makes the batches, padded on the right.
        keep_mask: whether the model has use for the mask all the same, as for a loss over the choice of experts.
    """

    collator: Callable[[Sequence[Any]], dict[str, Any]]
    keep_mask: bool = False

    def __call__(self, chats: Sequence[Any]) -> dict[str, Any]:
        batch = self.collator(chats)
        used = batch["attention_mask"].bool() if "attention_mask" in batch else batch["labels"] != -100
        ends = torch.where(used, torch.arange(1, used.shape[1] + 1), 0).amax(dim=1)
        if not self.keep_mask:
            batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        return batch | {ROW_ENDS: ends.tolist()}


def split(inputs: dict[str, Any], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """A step's batch in parts, the longest rows first, so that rows of a length come together.

    Args:
        inputs: of `WithRowEnds`: tensors of rows x tokens.
        rows: the most of a part.

    Yields:
        Each part without the columns that are padding in all of its rows.
    """
    ends, tensors = inputs[ROW_ENDS], {name: value for name, value in inputs.items() if name != ROW_ENDS}
    order = sorted(range(len(ends)), key=lambda row: -ends[row])
    rows = -(-len(ends) // -(-len(ends) // rows))  # parts of a size, rather than a last one of a single row
    in_order = order == list(range(len(ends)))
    for start in range(0, len(ends), rows):
        part = order[start : start + rows]
        width = max(ends[part[0]], 1)
        if in_order:
            yield {name: value[start : start + rows, :width] for name, value in tensors.items()}
        else:
            picked = torch.tensor(part, device=tensors["input_ids"].device)
            yield {name: value[picked, :width] for name, value in tensors.items()}


def safer(settings: Settings) -> tuple[Settings, str] | None:
    """Settings that take less memory and learn the same, and what is changed in words; None if nothing is left.

    The one that costs least is changed first: the rows that go through the model at once, then which layers are
    checkpointed, then where their inputs are kept.
    """
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        effective = settings.batch_size * settings.accumulation
        return replace(settings, batch_size=half, accumulation=-(-effective // half)), f"batch_size={half}"
    if not settings.gradient_checkpointing or settings.checkpointed_layers is not None:
        changed = {"gradient_checkpointing": True, "checkpointed_layers": None}
        return replace(settings, **changed), "all layers checkpointed"
    if not settings.activation_offloading:
        return replace(settings, activation_offloading=True), "activation_offloading=True"
    return None
