"""The chats of an optimizer step as one batch, which goes through the model in parts of a few rows.

The trainer's own accumulation takes as many batches as it was told, of as many chats each. Here the step comes whole, so
that packing can put its chats into as few rows as they need, and so that a step that runs out of memory can be made again
in smaller parts: nothing of it is left but gradients, which are set back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers.trainer_pt_utils import find_batch_size

if TYPE_CHECKING:
    from qlora_helpers.settings import Settings

__all__ = ["safer", "split"]


def split(inputs: dict[str, torch.Tensor], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """A step's batch in parts.

    Args:
        inputs: `input_ids`, `labels`, and either `attention_mask` or `position_ids`, each rows x tokens.
        rows: of a part; the last one may have fewer.

    Yields:
        Each part without the columns that are padding in all of its rows.
    """
    count = find_batch_size(inputs)
    used = inputs["attention_mask"] if "attention_mask" in inputs else inputs["labels"] != -100
    ends = torch.where(used.bool(), torch.arange(1, used.shape[1] + 1, device=used.device), 0).amax(dim=1).tolist()
    for start in range(0, count, rows):
        width = max(*ends[start : start + rows], 1) if rows > 1 else max(ends[start], 1)
        yield {name: value[start : start + rows, :width] for name, value in inputs.items()}


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
