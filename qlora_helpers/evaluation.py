"""What a model knows and how it answers: recall of facts, generated answers, exact match, loss.

All answers are decoded greedily: always the most likely next token, no sampling.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_helpers import validation
from qlora_helpers.chats import Chat, check_texts, split_question, stop_tokens, tokenized

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "answer",
    "commonest_answer_rate",
    "evaluating",
    "exact_match",
    "loss",
    "read_facts",
    "recall",
    "seconds_per_token",
    "share_that_ends",
    "standard_error",
]

MOST_LOGITS = 2**27  # in one batch: 256 MiB in 16 bits


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


def read_facts(path: str | Path) -> list[dict[str, str]]:
    """Read `recall.jsonl`: facts, each with a `prompt`, the correct next word (`answer`), and its `attribute`."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def _check_not_empty(name: str, cases: list, what: str) -> None:
    if not cases:
        raise ValueError(f"{name}=[]: there is nothing to score. Pass at least one {what}")


def recall(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: list[dict[str, str]],
    batch_size: int = 500,
) -> float:
    """The share of facts whose answer is the model's most likely next token.

    Raises:
        ValueError: there are no facts, an answer is not a single token of this tokenizer, or `batch_size` is no positive
            whole number.
    """
    _check_not_empty("facts", facts, "fact")
    batch_size, right = validation.whole("batch_size", batch_size), 0
    for start in range(0, len(facts), batch_size):
        batch = facts[start : start + batch_size]
        answers = [tokenizer(fact["answer"], add_special_tokens=False)["input_ids"] for fact in batch]
        for fact, ids in zip(batch, answers, strict=True):
            if len(ids) != 1:
                raise ValueError(f"answer={fact['answer']!r} is {len(ids)} tokens of this tokenizer; recall needs one")
        prompts = tokenizer([fact["prompt"] for fact in batch], padding=True, return_tensors="pt").to(model.device)
        with evaluating(model):
            predicted = model(**prompts, logits_to_keep=1).logits[:, -1].argmax(-1)
        right += int((predicted == torch.tensor(answers, device=model.device).flatten()).sum())
    return right / len(facts)


def standard_error(share: float, count: int) -> float:
    """The standard error of a share measured on `count` independent cases: sqrt(share (1 - share) / count).

    Raises:
        ValueError: the share is not from 0 to 1, or the count is no positive whole number.
    """
    share, count = validation.number("share", share, at_least=0, at_most=1), validation.whole("count", count)
    return math.sqrt(share * (1 - share) / count)


def _generated(
    model, tokenizer, questions: list[Chat], max_new_tokens: int, batch_size: int, adapters: list[str] | None = None
) -> Iterator[torch.Tensor]:
    """The new tokens of each batch, (questions, up to max_new_tokens); what follows an EOS token is padding."""
    max_new_tokens = validation.whole("max_new_tokens", max_new_tokens)
    batch_size = validation.whole("batch_size", batch_size)
    check_texts(questions, tokenizer)
    stops = stop_tokens(tokenizer)
    for start in range(0, len(questions), batch_size):
        rendered = [
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            for question in questions[start : start + batch_size]
        ]
        # the template has already added the BOS token: adding special tokens would double it
        batch = tokenizer(rendered, padding=True, add_special_tokens=False, return_tensors="pt").to(model.device)
        chosen = {} if adapters is None else {"adapter_names": adapters[start : start + batch_size]}
        with evaluating(model):
            output = model.generate(
                **batch,
                **chosen,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                # a model's generation_config.json may set these; they have no place in greedy decoding
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )
        yield output[:, batch["input_ids"].shape[1] :]


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Chat],
    max_new_tokens: int = 16,
    batch_size: int = 250,
    adapters: list[str] | None = None,
) -> list[str]:
    """Generate an answer to each chat that ends with a question.

    Args:
        adapters: for each question, the name of the adapter that answers it, or "__base__" for none; a batch may mix
            them. By default the active adapter answers all.

    Raises:
        ValueError: `adapters` is not as long as `questions`; a special token, such as an end of turn, is typed into a
            question; or a number is no positive whole one.
    """
    if adapters is not None and len(adapters) != len(questions):
        raise ValueError(f"adapters has {len(adapters)} names for {len(questions)} questions: pass one for each")
    texts = []
    for new in _generated(model, tokenizer, questions, max_new_tokens, batch_size, adapters):
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


def share_that_ends(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    max_new_tokens: int = 24,
    batch_size: int = 250,
) -> float:
    """The share of chats in which the model ends its answer to the last question within `max_new_tokens` tokens.

    An answer ends with `tokenizer.eos_token`, or with the end of a turn in its chat template. A model that generates neither
    continues until it is cut off.

    Raises:
        ValueError: there are no chats; or as `answer` does.
    """
    _check_not_empty("chats", chats, "chat")
    questions = [split_question(chat)[0] for chat in chats]
    ended, stops = 0, torch.tensor(stop_tokens(tokenizer))
    for new in _generated(model, tokenizer, questions, max_new_tokens, batch_size):
        ended += int(torch.isin(new, stops.to(new.device)).any(1).sum())
    return ended / len(chats)


def exact_match(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    max_new_tokens: int | None = None,
) -> float:
    """The share of chats whose last answer the model generates word for word.

    Args:
        max_new_tokens: an answer is cut off after this many; by default as many as the longest right answer needs.

    Raises:
        ValueError: there are no chats; a right answer is longer than `max_new_tokens`, so it would count as wrong; or as
            `answer` does.
    """
    _check_not_empty("chats", chats, "chat")
    if max_new_tokens is not None:
        otherwise = "None for as many as the longest right answer needs"
        max_new_tokens = validation.whole("max_new_tokens", max_new_tokens, otherwise=otherwise)
    check_texts(chats, tokenizer)
    questions, wanted = zip(*map(split_question, chats), strict=True)
    needed = [len(ids) for ids in tokenizer(list(wanted), add_special_tokens=False)["input_ids"]]
    longest = max(needed)
    if max_new_tokens is not None and max_new_tokens < longest:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: the right answer of chat {needed.index(longest) + 1} has {longest} tokens, so "
            "it would always count as wrong. Pass more, or leave it out"
        )
    # one more for the EOS token, and one since a text may begin with other tokens after a question than alone
    generated = answer(model, tokenizer, list(questions), max_new_tokens or longest + 2)
    return sum(got == want for got, want in zip(generated, wanted, strict=True)) / len(chats)


def commonest_answer_rate(train: list[Chat], test: list[Chat]) -> float:
    """The exact match of knowing nothing: of always giving the most common answer to a question's wording.

    Only for questions about the people of the invented world: the answer begins with the person's two names.

    Raises:
        ValueError: there are no test chats.
    """
    _check_not_empty("test", test, "chat")

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
        ValueError: there are no chats; a special token is typed into one; `batch_size` is no positive whole number; or the
            answers cannot be told from the rest, as in `qlora_helpers.chats.tokenized`.
    """
    _check_not_empty("chats", chats, "chat")
    if batch_size is not None:
        batch_size = validation.whole("batch_size", batch_size, otherwise="None for what fits")
    check_texts(chats, tokenizer)
    rows = tokenized(chats, tokenizer)
    if batch_size is None:
        longest = max(len(row["input_ids"]) for row in rows)
        batch_size = max(1, min(250, MOST_LOGITS // (longest * model.config.vocab_size)))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        encoded = tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        width = encoded["input_ids"].shape[1]
        spoken = torch.tensor([[0] * (width - len(row["input_ids"])) + row["assistant_masks"] for row in batch])
        spoken = spoken[:, 1:].bool().to(model.device)
        with evaluating(model):
            logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1][spoken].float(), encoded["input_ids"][:, 1:][spoken], reduction="sum"
        ).item()
        count += int(spoken.sum())
    return total / count


def seconds_per_token(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, question: Chat, tokens: int = 32
) -> float:
    """Seconds per new token of a greedy answer of exactly `tokens` tokens, after a short one to warm up.

    Raises:
        ValueError: `tokens` is no positive whole number.
    """
    tokens = validation.whole("tokens", tokens)
    encoded = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)

    def generate(count: int) -> float:
        started = time.perf_counter()
        with evaluating(model):
            model.generate(
                **encoded,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    generate(2)
    return generate(tokens) / tokens
