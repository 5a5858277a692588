"""How far the logits of a changed model are from those of the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_helpers.chats import Chat
from qlora_helpers.evaluation import evaluating

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Drift", "drift", "logits"]


@dataclass(frozen=True)
class Drift:
    """How far the logits of one model are from those of another, over all tokens of some chats.

    Attributes:
        largest, mean: of the absolute differences. Softmax exponentiates logits, so 1 is a factor of e.
        same_choice: the share of tokens for which both have the same argmax.
    """

    largest: float
    mean: float
    same_choice: float


def logits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> torch.Tensor:
    """The logits of every token of the chats, in float32 on the CPU: [tokens, vocabulary]."""
    encoded = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt").to(model.device)
    with evaluating(model):
        found = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    return found[encoded["attention_mask"].bool()].float().cpu()


def drift(found: torch.Tensor, wanted: torch.Tensor) -> Drift:
    """Compare two models' logits of the same tokens.

    Raises:
        ValueError: the shapes differ, so the tokens or the vocabularies do.
    """
    if found.shape != wanted.shape:
        raise ValueError(
            f"found has the shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}: compare the same tokens"
        )
    difference = (found - wanted).abs()
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return Drift(difference.max().item(), difference.mean().item(), same.item())
