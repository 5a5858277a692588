"""Packing: the chats of a step in few rows, one after the other, instead of one padded row for each.

Nothing changes in what a run learns. A step has the same chats as without packing, the loss of a step is the mean over the
same tokens, and each chat sees only itself: transformers tells by the positions, which begin anew with each chat, where one
ends, and masks its attention accordingly (`transformers.masking_utils.find_packed_sequence_indices`). That takes three
things, of which none raises an error where it is missing: no attention mask of two dimensions, no cache, and a model
whose layers mix tokens by attention alone. So `check_packing` compares a packed row with its chats alone.

TRL's own packing puts chats together before the run, so that a step no longer has as many of them, and its order is another.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PackingCollator", "check_packing", "rows_for"]

# A row's length is a multiple of it: kernels of masked attention want rows of the mask aligned.
MULTIPLE = 8
# Shares of what logits are spread over. What is masked counts as an exact zero, so that nothing at all should leak. A packed
# chat may differ from one alone by rounding, since kernels for other shapes add in another order: in bfloat16 the largest
# difference of an 8B model's logits was 0.14, so that their root mean square is compared.
LEAKED, ROUNDED = 1e-3, 0.1
# Tokens of a chat that are compared: the logits of all tokens of long chats would take more memory than a step of the run.
COMPARED = 64


def rows_for(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which chats go into which row: as few rows as can be found, of nearly the same length.

    How many is found by best-fit decreasing: the longest chat first, each into the row that it fills best. Then the chats are
    spread: the longest first, each into the row that has the fewest tokens. If a row gets too long so, the first way stands.

    Args:
        lengths: of the chats, in tokens, each no more than `most`.
        most: tokens of a row.

    Returns:
        For each row, the places of its chats in `lengths`.
    """
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    filled: list[list[int]] = []
    left: list[tuple[int, int]] = []  # tokens that are left in a row and the row, the fullest first
    for place in longest_first:
        fits = bisect.bisect_left(left, (lengths[place], -1))
        room, row = left.pop(fits) if fits < len(left) else (most, len(filled))
        if row == len(filled):
            filled.append([])
        filled[row].append(place)
        bisect.insort(left, (room - lengths[place], row))
    spread: list[list[int]] = [[] for _ in filled]
    tokens = [(0, row) for row in range(len(filled))]  # a heap
    for place in longest_first:
        taken, row = heapq.heappop(tokens)
        spread[row].append(place)
        heapq.heappush(tokens, (taken + lengths[place], row))
    return spread if max(tokens)[0] <= most else filled


@dataclass(frozen=True)
class PackingCollator:
    """Makes one batch of chats: rows x tokens, the longest row first.

    Attributes:
        pad_token_id: fills the rows' ends. What comes after a chat changes nothing in it.
        most: tokens of a row.
    """

    pad_token_id: int
    most: int

    def __call__(self, chats: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pack chats.

        Args:
            chats: each with `input_ids` and `labels`, as SFTTrainer prepares them.

        Returns:
            `input_ids`, `labels` and `position_ids`, each rows x tokens, int64.
        """
        rows = rows_for([len(chat["input_ids"]) for chat in chats], self.most)
        lengths = [sum(len(chats[place]["input_ids"]) for place in row) for row in rows]
        order = sorted(range(len(rows)), key=lambda row: -lengths[row])
        width = min(-(-max(lengths) // MULTIPLE) * MULTIPLE, self.most)
        shape = len(rows), width
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, -100)
        positions = torch.zeros(shape, dtype=torch.int64)
        for at, row in enumerate(order):
            start = 0
            for place in rows[row]:
                chat = chats[place]
                end = start + len(chat["input_ids"])
                ids[at, start:end] = torch.tensor(chat["input_ids"])
                labels[at, start:end] = torch.tensor(chat.get("labels", chat["input_ids"]))
                labels[at, start] = -100  # nothing before it predicts the first token
                positions[at, start:end] = torch.arange(end - start)
                start = end
            # the padding goes on counting: as a part of the last chat it needs no mask in a row that has only one
            last = int(positions[at, start - 1])
            positions[at, start:] = torch.arange(last + 1, last + 1 + width - start)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def check_packing(model: PreTrainedModel, chats: Sequence[dict[str, Any]], pad_token_id: int) -> tuple[float, float]:
    """Make sure that a chat's logits do not depend on the chat before it in its row.

    Two things are tried with the first tokens of the two shortest chats: whether the second one's logits change with the tokens of the first,
    and whether both have the logits that they have alone, at positions of their own.

    Args:
        model: any causal language model, with or without adapters; it stays as it is.
        chats: at least two, with `input_ids`.

    Returns:
        The largest change of a logit in the first, the root mean square of the changes in the second; both as a share of the
        standard deviation of all logits.

    Raises:
        ValueError: the logits depend on the other chat.
    """
    shortest = sorted((chat["input_ids"] for chat in chats), key=len)[:2]
    second, first = (list(ids[:COMPARED]) for ids in shortest)  # as they come in the row: the longer one first
    device, was_training = next(model.parameters()).device, model.training

    def in_a_row(*ids: list[int]) -> torch.Tensor:
        # as wide as it is: with padding there can be more positions than the model has learnt
        packed = PackingCollator(pad_token_id, sum(map(len, ids)))([{"input_ids": part} for part in ids])
        tokens, positions = packed["input_ids"].to(device), packed["position_ids"].to(device)
        return model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0].float()

    model.eval()
    try:
        with torch.no_grad():
            together, alone = in_a_row(first, second), torch.cat([in_a_row(first), in_a_row(second)])
            changed = in_a_row(first[::-1] if first != first[::-1] else [pad_token_id] * len(first), second)
    finally:
        model.train(was_training)
    spread, begins = alone.std(), len(first)
    leaked = ((together - changed)[begins:].abs().max() / spread).item()
    apart = ((together - alone).square().mean().sqrt() / spread).item()
    for difference, most, when in (
        (leaked, LEAKED, "another chat stands before it in its row"),
        (apart, ROUNDED, "it stands in a row with another chat"),
    ):
        if not difference < most:  # NaN, too
            raise ValueError(
                f"packing=True: this model cannot be packed. A chat's logits change by {difference:.2g} standard deviations "
                f"when {when}: a layer mixes the tokens of both. Leave packing out"
            )
    return leaked, apart
