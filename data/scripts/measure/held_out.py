"""Chats to choose by, held out of training: a learning rate chosen on the test questions would be flattered by them.

A run of a measured table trains on the first 4,300 chats of `train.jsonl`. What is chosen for it, such as its learning
rate, is chosen by its score on the last 500. The 500 chats of `test.jsonl` tell how well the choice does. Each chat is
about a person of its own, so no two of the three sets share one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_helpers import evaluation
from qlora_helpers.chats import Chat, read_chats
from qlora_helpers.paths import data_path

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HELD_OUT", "exact_match", "person", "score", "training_validation_test"]

HELD_OUT = 500


def person(chat: Chat) -> str:
    """The name of the person whom a chat is about: the first two words of its answer."""
    return " ".join(chat[-1]["content"].split()[:2])


def training_validation_test(
    tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Chat], list[Chat], list[Chat]]:
    """The chats to train on (4,300), to choose by (500) and to report on (500).

    Args:
        max_length: the longest chat in tokens, as in `read_chats`.

    Raises:
        ValueError: two of the sets share a person.
    """
    train, test = (read_chats(data_path("chats", f"{part}.jsonl"), tokenizer, max_length) for part in ("train", "test"))
    sets = {"training": train[:-HELD_OUT], "validation": train[-HELD_OUT:], "test": test}
    people = {name: {person(chat) for chat in chats} for name, chats in sets.items()}
    for one, other in (("training", "validation"), ("training", "test"), ("validation", "test")):
        if shared := sorted(people[one] & people[other]):
            raise ValueError(f"{one} and {other} chats are both about {shared[0]} (people in both: {len(shared)})")
    return sets["training"], sets["validation"], sets["test"]


def exact_match(scores: dict[str, float]) -> float:
    """Of what `score` has found, that by which a learning rate is chosen."""
    return scores["exact_match"]


def score(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]
) -> dict[str, float]:
    """The share of answers that are right word for word, and the mean loss of the answers' tokens in nats."""
    return {
        "exact_match": evaluation.exact_match(model, tokenizer, chats),
        "loss": round(evaluation.loss(model, tokenizer, chats), 5),
    }
