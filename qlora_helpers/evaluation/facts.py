"""What a model knows of the invented world: recall of facts as the next word, and how far guessing goes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_helpers import validation
from qlora_helpers.chats import Chat
from qlora_helpers.evaluation.batches import evaluating
from qlora_helpers.evaluation.losses import check_not_empty

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["commonest_answer_rate", "read_facts", "recall", "recall_each"]


def read_facts(path: str | Path) -> list[dict[str, str]]:
    """Read `recall.jsonl`: facts, each with a `prompt`, the correct next word (`answer`), and its `attribute`."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def recall(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: list[dict[str, str]],
    batch_size: int = 500,
) -> float:
    """The share of facts whose answer is the model's most likely next token.

    Raises:
        ValueError: as `recall_each` does.
    """
    return sum(recall_each(model, tokenizer, facts, batch_size)) / len(facts)


def recall_each(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: list[dict[str, str]],
    batch_size: int = 500,
) -> list[bool]:
    """For each fact: whether its answer is the model's most likely next token. Two models are compared fact by fact.

    Raises:
        ValueError: there are no facts, an answer is not a single token of this tokenizer, or `batch_size` is no positive
            whole number.
    """
    check_not_empty("facts", facts, "fact")
    batch_size, right = validation.whole("batch_size", batch_size), []
    for start in range(0, len(facts), batch_size):
        batch = facts[start : start + batch_size]
        answers = [tokenizer(fact["answer"], add_special_tokens=False)["input_ids"] for fact in batch]
        for fact, ids in zip(batch, answers, strict=True):
            if len(ids) != 1:
                raise ValueError(f"answer={fact['answer']!r} is {len(ids)} tokens of this tokenizer; recall needs one")
        prompts = tokenizer([fact["prompt"] for fact in batch], padding=True, return_tensors="pt").to(model.device)
        with evaluating(model):
            predicted = model(**prompts, logits_to_keep=1).logits[:, -1].argmax(-1)
        right += (predicted == torch.tensor(answers, device=model.device).flatten()).tolist()
    return right


def commonest_answer_rate(train: list[Chat], test: list[Chat]) -> float:
    """The exact match of knowing nothing: of always giving the most common answer to a question's wording.

    Only for questions about the people of the invented world: the answer begins with the person's two names.

    Raises:
        ValueError: there are no test chats.
    """
    check_not_empty("test", test, "chat")

    def anonymous(chat: Chat) -> tuple[str, str]:
        question, reply = chat[-2]["content"], chat[-1]["content"]
        name = " ".join(reply.split()[:2])
        return question.replace(name, "{name}"), reply.replace(name, "{name}")

    replies: dict[str, Counter] = defaultdict(Counter)
    for question, reply in map(anonymous, train):
        replies[question][reply] += 1
    right = sum(
        bool(replies[question]) and replies[question].most_common(1)[0][0] == reply
        for question, reply in map(anonymous, test)
    )
    return right / len(test)
