"""The loss: how unlikely a model finds the tokens that it should say."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from qlora_helpers import validation
from qlora_helpers.chats import Chat, check_texts, tokenized
from qlora_helpers.evaluation.batches import evaluating, grouped, padded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["loss", "losses_of"]

MOST_LOGITS = 2**27  # in one batch: 256 MiB in 16 bits
MOST_ROWS = 250


def losses_of(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    batch_size: int | None = None,
) -> list[tuple[float, int]]:
    """The cross-entropy of each row's marked tokens, as its sum in nats and the number of these tokens.

    Args:
        rows: "input_ids", and "assistant_masks" with a 1 for each token that counts, as `qlora_helpers.chats.tokenized`
            makes them. A row's first token follows nothing and never counts.
        batch_size: rows per batch; by default up to 250, fewer where a large vocabulary makes the logits large.

    Raises:
        ValueError: `batch_size` is no positive whole number.
    """
    if batch_size is not None:
        batch_size = validation.whole("batch_size", batch_size, otherwise="None for what fits")
    # Rotary positions are relative, so either side gives the same but for rounding: the tokenizer's, as in generation.
    # Learned positions are counted from the first column, padding included, which on the left would move every token.
    side = tokenizer.padding_side if hasattr(model.config.get_text_config(), "rope_parameters") else "right"
    most_tokens = None if batch_size else MOST_LOGITS // model.config.get_text_config().vocab_size
    # The last token of a row is only asked for. So rows that differ in nothing else, such as the same beginning of a
    # sentence with four endings, go through the model once.
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        alike[tuple(row["input_ids"][:-1])].append(number)
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    alike.pop((), None)  # rows of one token have no loss
    beginnings = list(alike)
    for places in grouped([len(tokens) for tokens in beginnings], batch_size or MOST_ROWS, most_tokens):
        batch = padded([beginnings[place] for place in places], tokenizer, side)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        numbers = [number for place in places for number in alike[beginnings[place]]]
        owner = torch.tensor([at for at, place in enumerate(places) for _ in alike[beginnings[place]]])
        wanted = padded([rows[number]["input_ids"][1:] for number in numbers], tokenizer, side)["input_ids"]
        spoken = padded([rows[number]["assistant_masks"][1:] for number in numbers], tokenizer, side)
        spoken = (spoken["input_ids"] * spoken["attention_mask"]).bool()
        counts = spoken.sum(1).tolist()
        with evaluating(model):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        of, column = (tensor.to(logits.device) for tensor in torch.nonzero(spoken, as_tuple=True))
        of, answers = owner.to(of.device)[of], wanted[spoken].to(of.device)
        # in parts: rows that share their logits can be any number
        most = max(1, MOST_LOGITS // logits.shape[-1])
        parts = zip(of.split(most), column.split(most), answers.split(most), strict=True)
        each = torch.cat([cross_entropy(logits[row, at].float(), right, reduction="none") for row, at, right in parts])
        for number, of_row, count in zip(numbers, each.double().cpu().split(counts), counts, strict=True):
            found[number] = of_row.sum().item(), count
    return found


def loss(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    batch_size: int | None = None,
) -> float:
    """Mean cross-entropy of the assistant's tokens, in nats per token: what training minimises.

    Args:
        batch_size: chats per batch; by default up to 250, fewer where a large vocabulary makes the logits large.

    Raises:
        ValueError: there are no chats; a special token is typed into one; the chat template marks no token of an answer;
            or `batch_size` is no positive whole number.
    """
    check_not_empty("chats", chats, "chat")
    if batch_size is not None:
        batch_size = validation.whole("batch_size", batch_size, otherwise="None for what fits")
    check_texts(chats, tokenizer)
    totals, counts = zip(*losses_of(model, tokenizer, tokenized(chats, tokenizer), batch_size), strict=True)
    check_marked(counts)
    return sum(totals) / sum(counts)


def check_not_empty(name: str, cases: list, what: str) -> None:
    """Refuse an empty list: a score of nothing does not exist."""
    if not cases:
        raise ValueError(f"{name}=[]: there is nothing to score. Pass at least one {what}")


def check_marked(counts: tuple[int, ...]) -> None:
    """Refuse chats of which one has no token that the chat template marks as the assistant's."""
    if 0 in counts:
        raise ValueError(
            f"chat {counts.index(0) + 1}: the chat template marks none of its tokens as the assistant's, so there is no loss: "
            "load the tokenizer with qlora_helpers.models.loading.load_tokenizer"
        )
