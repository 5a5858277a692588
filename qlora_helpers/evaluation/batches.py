"""How rows of different lengths go through a model: in evaluation mode, padded, and as many at once as memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["evaluating", "grouped", "padded", "padding_token"]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), without gradients; the previous mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def grouped(lengths: Sequence[int], most_rows: int, most_tokens: int | None = None) -> Iterator[list[int]]:
    """The numbers of rows, from 0, in batches of similar length, the longest first.

    Args:
        lengths: of the rows, in tokens.
        most_rows: in a batch.
        most_tokens: in a batch, its padding included; None for any number. A row that alone has more is a batch.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[batch[0]] if batch else 0
        if batch and (
            len(batch) == most_rows or (most_tokens is not None and (len(batch) + 1) * longest > most_tokens)
        ):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, side: str) -> dict[str, torch.Tensor]:
    """Rows of tokens as "input_ids" and "attention_mask", each [rows, longest], on the CPU.

    Args:
        side: of the padding. Generation needs "left": it goes on where a row ends. "right" leaves each token at its own
            position.
    """
    longest = max(map(len, rows))
    # not the tokenizer's own padding: it refuses where there is no token for it, as in many models of the Hub
    ids = torch.full((len(rows), longest), padding_token(tokenizer))
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that rows are filled up with; any will do where there is none for it, since the attention mask hides it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
