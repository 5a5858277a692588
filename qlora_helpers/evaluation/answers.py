"""What a model answers: generated answers, whether they end, exact match, and how long a token takes.

All answers are decoded greedily: always the most likely next token, no sampling.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import GenerationConfig

from qlora_helpers import validation
from qlora_helpers.chats import Chat, check_texts, split_question, stop_tokens
from qlora_helpers.decoding import Decoding
from qlora_helpers.evaluation.batches import evaluating, grouped, padded, padding_token
from qlora_helpers.evaluation.losses import check_not_empty

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

__all__ = [
    "Answer",
    "answer",
    "answers_up_to",
    "context_of",
    "continued",
    "end_tokens",
    "exact_match",
    "prompts_of",
    "seconds_per_token",
    "share_that_ends",
    "tokens_needed",
]

MOST_ROWS = 250
MOST_TOKENS, MOST_CACHE = 2**14, 2**30  # of a batch: tokens, and bytes of their keys and values
SHORTEST_LIMIT = 16


def prompts_of(questions: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each chat that ends with a question, in the chat template, up to where the answer begins.

    Raises:
        ValueError: a special token, such as an end of turn, is typed into a question.
    """
    check_texts(questions, tokenizer)
    rendered = [
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) for question in questions
    ]
    # the template has already added the BOS token: adding special tokens would double it
    # verbose: transformers warns of a chat that is longer than the context, which the callers refuse themselves
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"] if rendered else []


@contextmanager
def _by(config: GenerationConfig, model) -> Iterator[None]:
    """Generate by this config alone: a model's own generation_config.json may have a top_k, or a longest answer."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's
    own, inner.generation_config = inner.generation_config, config
    try:
        yield
    finally:
        inner.generation_config = own


def continued(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    limit: int,
    decoding: Decoding | None = None,
    *,
    seed: int | None = None,
    least: int = 0,
    adapters: list[str] | None = None,
    streamer: BaseStreamer | None = None,
) -> torch.Tensor:
    """The new tokens of one batch, [prompts, up to limit]; what follows one of `end_tokens` is padding.

    Args:
        prompts: tokens, as `prompts_of` makes them.
        limit: the most new tokens of each.
        decoding: its temperature and seed; by default greedy. Nothing is taken from the model's generation_config.json
            but what ends an answer.
        seed: instead of that of `decoding`.
        least: so many tokens are generated in any case.
        adapters: as in `answer`.
        streamer: gets the tokens of a single prompt as they come.
    """
    decoding, ends = decoding or Decoding(), end_tokens(model, tokenizer)
    drawn = decoding.temperature > 0
    config = GenerationConfig(
        max_new_tokens=limit,
        min_new_tokens=least or None,
        do_sample=drawn,
        temperature=decoding.temperature if drawn else None,
        top_k=0 if drawn else None,
        eos_token_id=ends or None,
        pad_token_id=padding_token(tokenizer),
    )
    batch = {name: tensor.to(model.device) for name, tensor in padded(prompts, tokenizer, "left").items()}
    chosen = {} if adapters is None else {"adapter_names": adapters}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=drawn), evaluating(model), _by(config, model):
        if drawn:
            torch.manual_seed(decoding.seed if seed is None else seed)
        output = model.generate(**batch, **chosen, streamer=streamer)
    return output[:, batch["input_ids"].shape[1] :]


def _generated(
    model, tokenizer, questions: list[Chat], max_new_tokens: int, batch_size: int, adapters: list[str] | None = None
) -> Iterator[torch.Tensor]:
    """The new tokens of each batch, (questions, up to max_new_tokens); what follows one of `end_tokens` is padding."""
    max_new_tokens = validation.whole("max_new_tokens", max_new_tokens)
    batch_size = validation.whole("batch_size", batch_size)
    prompts = prompts_of(questions, tokenizer)
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        chosen = None if adapters is None else adapters[batch]
        yield continued(model, tokenizer, prompts[batch], max_new_tokens, adapters=chosen)


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

    An answer ends with one of `end_tokens`. A model that generates none of them continues until it is cut off.

    Raises:
        ValueError: there are no chats; or as `answer` does.
    """
    check_not_empty("chats", chats, "chat")
    questions = [split_question(chat)[0] for chat in chats]
    ended = 0
    for new in _generated(model, tokenizer, questions, max_new_tokens, batch_size):
        ended += int(torch.isin(new.cpu(), torch.tensor(end_tokens(model, tokenizer))).any(1).sum())
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
        ValueError: as `exact_match_each` does.
    """
    return sum(exact_match_each(model, tokenizer, chats, max_new_tokens)) / len(chats)


def exact_match_each(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    max_new_tokens: int | None = None,
) -> list[bool]:
    """For each chat: whether the model generates its last answer word for word. Two models are compared chat by chat.

    Args:
        max_new_tokens: an answer is cut off after this many; by default as many as the longest right answer needs.

    Raises:
        ValueError: there are no chats; a right answer is longer than `max_new_tokens`, so it would count as wrong; or as
            `answer` does.
    """
    check_not_empty("chats", chats, "chat")
    if max_new_tokens is not None:
        otherwise = "None for as many as the longest right answer needs"
        max_new_tokens = validation.whole("max_new_tokens", max_new_tokens, otherwise=otherwise)
    check_texts(chats, tokenizer)
    questions, wanted = zip(*map(split_question, chats), strict=True)
    needed = tokens_needed(wanted, tokenizer)
    longest = max(needed)
    if max_new_tokens is not None and max_new_tokens < longest - 2:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: the right answer of chat {needed.index(longest) + 1} has {longest - 2} tokens, so "
            "it would always count as wrong. Pass more, or leave it out"
        )
    generated = answer(model, tokenizer, list(questions), max_new_tokens or longest)
    return [got == want for got, want in zip(generated, wanted, strict=True)]


class Answer(NamedTuple):
    """A generated answer: its text, and whether the model ended it, or it was cut off."""

    text: str
    ended: bool


def tokens_needed(answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How many new tokens a model needs to give each of these answers and to end it."""
    if not answers:
        return []
    # one more for the EOS token, and one since a text may begin with other tokens after a question than alone
    return [len(ids) + 2 for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]


def answers_up_to(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Chat],
    limits: Sequence[int],
    batch_size: int | None = None,
) -> list[Answer]:
    """Generate an answer to each chat that ends with a question, each with a limit of its own.

    A limit is rounded up to a power of two, 16 or more, but not beyond the model's context, and questions with the same
    limit go through the model together: one long answer does not make all the others as long. An answer ends where the
    model generates the tokenizer's EOS token, or another that its generation_config.json names.

    Args:
        limits: for each question, how many new tokens its answer may need (see `tokens_needed`).
        batch_size: questions per batch; by default up to 250, fewer where their keys and values would take more than
            1 GiB.

    Raises:
        ValueError: there is not one limit for each question; a question fills the model's context; or as `answer` does.
    """
    if len(limits) != len(questions):
        raise ValueError(f"limits has length {len(limits)} for {len(questions)} questions: pass one for each")
    limits = [validation.whole("limits", limit) for limit in limits]
    if batch_size is not None:
        batch_size = validation.whole("batch_size", batch_size, otherwise="None for what fits")
    prompts, context = prompts_of(questions, tokenizer), context_of(model)
    by_limit: dict[int, list[int]] = defaultdict(list)
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if context is not None and len(prompt) >= context:
            raise ValueError(
                f"question {number + 1} has {len(prompt)} tokens, and the model takes {context} with the answer: shorten it"
            )
        rounded = max(SHORTEST_LIMIT, 1 << (limit - 1).bit_length())
        by_limit[rounded if context is None else min(rounded, context - len(prompt))].append(number)
    ends = end_tokens(model, tokenizer)
    found: dict[int, Answer] = {}
    for limit, numbers in sorted(by_limit.items(), reverse=True):
        most_tokens = None if batch_size else min(MOST_TOKENS, MOST_CACHE // _cache_bytes_per_token(model))
        lengths = [len(prompts[number]) + limit for number in numbers]
        for batch in grouped(lengths, batch_size or MOST_ROWS, most_tokens):
            asked = [numbers[place] for place in batch]
            new = continued(model, tokenizer, [prompts[number] for number in asked], limit).cpu()
            ended = torch.isin(new, torch.tensor(ends)).any(1).tolist()
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            found |= {number: Answer(text.strip(), end) for number, text, end in zip(asked, texts, ended, strict=True)}
    return [found[number] for number in range(len(questions))]


def context_of(model: PreTrainedModel | PeftModel) -> int | None:
    """How many tokens the model takes at once; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the EOS token, the end of a turn in the chat template, and what the model names itself."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return list(dict.fromkeys([*stop_tokens(tokenizer), *own]))


def _cache_bytes_per_token(model) -> int:
    """The bytes of one token's keys and values in all layers; an upper bound where some layers keep only a window."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * key_heads * width * model.dtype.itemsize


def seconds_per_token(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, question: Chat, tokens: int = 32
) -> float:
    """Seconds per new token of a greedy answer of exactly `tokens` tokens, after a short one to warm up.

    Raises:
        ValueError: `tokens` is no positive whole number.
    """
    tokens = validation.whole("tokens", tokens)
    prompts = prompts_of([question], tokenizer)

    def generate(count: int) -> float:
        started = time.perf_counter()
        continued(model, tokenizer, prompts, count, least=count)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    generate(2)
    return generate(tokens) / tokens
