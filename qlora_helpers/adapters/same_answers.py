"""Whether two models say the same: the tokens of their prompts, their greedy answers, and the logits of each answer.

Each hop from an adapter to a file that a server loads is judged by this one comparison: the adapter on its base against
the merged model, the merged model against its export. The two need not be in memory at the same time: `said` asks one
model, and `compared` holds two of its results against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_helpers import validation
from qlora_helpers.chats import Chat
from qlora_helpers.evaluation import evaluating
from qlora_helpers.evaluation.answers import context_of, continued, end_tokens, prompts_of
from qlora_helpers.visible import shortened, visible

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Likeness", "Said", "compared", "likeness", "said"]

LONGEST = 200  # characters of a text that are shown


@dataclass(frozen=True)
class Likeness:
    """How alike two models are, the first being the one that is right by definition.

    Logits are compared at every token of the first model's greedy answers, the one that ends an answer included: both
    models are given the first one's answer, and are asked at each of its places what comes next.

    Attributes:
        prompts: how many were asked.
        same_answers: to how many both give the same greedy answer, and end it or have it cut off alike.
        largest_logit_difference: absolute, of any token of the vocabulary at any place. Softmax exponentiates logits, so 1
            is a factor of e.
        mean_kl: the Kullback-Leibler divergence of the second model's distribution from the first one's, sum of
            p1 (log p1 - log p2) over the vocabulary, in nats, averaged over all places.
        same_prompt_tokens: whether both tokenizers make the same tokens of all prompts.
        first_difference: "", or the first prompt whose answers differ, with both, for a person.
        mean_logit_difference: absolute, over the vocabulary and all places.
        same_choice: the share of places at which both choose the same token.
        places: how many there are.
    """

    prompts: int
    same_answers: int
    largest_logit_difference: float
    mean_kl: float
    same_prompt_tokens: bool
    first_difference: str
    mean_logit_difference: float
    same_choice: float
    places: int


@dataclass(frozen=True, eq=False)
class Said:
    """What one model says to some chats.

    Attributes:
        questions: the last message of each chat.
        prompts: the tokens of each chat, up to where the answer begins.
        answers: the tokens of each greedy answer, up to the one that ends it.
        texts: the answers, without special tokens.
        ended: for each, whether the model ended it, or it was cut off.
        logits: for each, [places, vocabulary] in float32 on the CPU: what the model expects at each token of the answer that
            it was asked along, its own or another model's.
    """

    questions: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    ended: tuple[bool, ...]
    logits: tuple[torch.Tensor, ...]


def said(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    *,
    max_new_tokens: int = 64,
    along: Said | None = None,
) -> Said:
    """Ask a model: its greedy answers, and its logits along them or along another model's answers.

    One chat goes through the model at a time, so that padding changes nothing.

    Args:
        model: with or without adapters, as they are active now; on a CPU or a GPU.
        chats: each ends with a question.
        max_new_tokens: an answer is cut off after so many; earlier where the model's context ends.
        along: what the model to compare with has said to the same chats: the logits are then those along its answers.

    Raises:
        ValueError: the tokenizer has no chat template; there are no chats, or one ends with an answer; `along` is about others; a special token is typed into a
            chat; or a chat leaves no room for an answer in the model's context.
    """
    limit, context = validation.whole("max_new_tokens", max_new_tokens), context_of(model)
    _check(tokenizer, chats, along)
    prompts = prompts_of(chats, tokenizer)
    ends = set(end_tokens(model, tokenizer))
    answers, texts, ended, logits = [], [], [], []
    for number, prompt in enumerate(prompts):
        room = limit if context is None else min(limit, context - len(prompt))
        if room < 1:
            raise ValueError(
                f"chat {number + 1} has {len(prompt)} tokens, and the model takes {context} with the answer: shorten it"
            )
        new = continued(model, tokenizer, [prompt], room)[0].tolist()
        end = next((place for place, id in enumerate(new, start=1) if id in ends), None)
        answers.append(tuple(new[:end]))
        texts.append(tokenizer.decode(new[:end], skip_special_tokens=True).strip())
        ended.append(end is not None)
        logits.append(_logits(model, prompt, answers[-1] if along is None else along.answers[number]))
    questions = tuple(chat[-1]["content"] for chat in chats)
    return Said(questions, tuple(map(tuple, prompts)), tuple(answers), tuple(texts), tuple(ended), tuple(logits))


def _check(tokenizer: PreTrainedTokenizerBase, chats: list[Chat], along: Said | None) -> None:
    if not tokenizer.chat_template:
        raise ValueError("tokenizer.chat_template is not set: take the tokenizer of a model that was made for chats")
    if not chats:
        raise ValueError("chats=[]: there must be at least one chat, which ends with a question")
    for number, chat in enumerate(chats, start=1):
        if not chat or chat[-1].get("role") == "assistant":
            raise ValueError(f"chat {number}: it must end with a question; leave its answer out")
    if along is not None and along.questions != tuple(chat[-1]["content"] for chat in chats):
        raise ValueError("along: it was asked other chats than these; ask both models the same")


def _logits(model: PreTrainedModel | PeftModel, prompt: list[int], answer: tuple[int, ...]) -> torch.Tensor:
    """The logits that choose each token of an answer, [its tokens, vocabulary]."""
    # the last token of the answer chooses nothing more
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    with evaluating(model):
        return model(input_ids=ids).logits[0, len(prompt) - 1 :].float().cpu()


def compared(first: Said, second: Said) -> Likeness:
    """Hold what two models said to the same chats against each other.

    Args:
        first: the one that is right by definition.
        second: asked along `first`, as `said(..., along=first)` does.

    Raises:
        ValueError: `second` was not asked along `first`; or the two have vocabularies of different sizes.
    """
    largest, total_kl, total, alike, places, values = 0.0, 0.0, 0.0, 0, 0, 0
    for one, other in zip(first.logits, second.logits, strict=True):
        if one.shape[0] != other.shape[0]:
            raise ValueError("second: it was not asked along the first; ask it with said(..., along=first)")
        if one.shape[1] != other.shape[1]:
            raise ValueError(
                f"second: it has logits for {other.shape[1]:,} tokens, and the first for {one.shape[1]:,}: these models have "
                "different vocabularies, and no logits that could be compared"
            )
        difference = (one - other).abs()
        largest = max(largest, difference.max().item(), key=_nan_last)
        total, values = total + difference.sum(dtype=torch.float64).item(), values + difference.numel()
        p, q = (logits.double().log_softmax(-1) for logits in (one, other))
        total_kl += (p.exp() * (p - q)).sum().item()
        alike, places = alike + int((one.argmax(-1) == other.argmax(-1)).sum()), places + one.shape[0]
    same = [
        (text, end) == (other, other_end)
        for text, end, other, other_end in zip(first.texts, first.ended, second.texts, second.ended, strict=True)
    ]
    return Likeness(
        prompts=len(same),
        same_answers=sum(same),
        largest_logit_difference=largest,
        mean_kl=max(total_kl, 0.0, key=_nan_last) / places,  # rounding can make zero negative
        same_prompt_tokens=first.prompts == second.prompts,
        first_difference="" if all(same) else _shown(first, second, same.index(False)),
        mean_logit_difference=total / values,
        same_choice=alike / places,
        places=places,
    )


def _nan_last(value: float) -> tuple[bool, float]:
    """The order in which `max` takes a number that is none for the largest: it must not be passed over."""
    return value != value, value


def _shown(first: Said, second: Said, number: int) -> str:
    question, one, other = (
        shortened(visible(text), LONGEST)
        for text in (first.questions[number], first.texts[number], second.texts[number])
    )
    return f"to {question!r} the first says {one!r}, and the second {other!r}"


def likeness(
    first: PreTrainedModel | PeftModel,
    second: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    *,
    second_tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
) -> Likeness:
    """Ask two models the same, and say how alike they are.

    Args:
        first: the one that is right by definition. Both may be the same object, with another adapter active by then: use
            `said` and `compared` for that.
        chats: each ends with a question.
        second_tokenizer: that of the second model, where it has one of its own.
        max_new_tokens: an answer is cut off after so many.

    Raises:
        ValueError: as `said` and `compared` do.
    """
    one = said(first, tokenizer, chats, max_new_tokens=max_new_tokens)
    other = said(second, second_tokenizer or tokenizer, chats, max_new_tokens=max_new_tokens, along=one)
    return compared(one, other)
