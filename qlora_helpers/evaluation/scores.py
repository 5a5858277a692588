"""The scores of a model on chats of one's own: loss, exact match where answers are short, overlap where they are long."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.chats import Chat, check_texts, split_question, tokenized
from qlora_helpers.evaluation.answers import answers_up_to, context_of, tokens_needed
from qlora_helpers.evaluation.losses import check_marked, check_not_empty, losses_of
from qlora_helpers.statistics import Interval, ratio, standard_error

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SHORT_ANSWER", "ScoredAnswer", "Scores", "as_json", "is_short", "score"]

SHORT_ANSWER = 80  # characters, on one line


@dataclass(frozen=True)
class ScoredAnswer:
    """One generated answer.

    Attributes:
        text: of the answer.
        ended: whether the model ended it; else it was cut off at the length that its right answer needs.
        short: whether the right answer is short (see `is_short`), so that exact match counts.
        exact: whether it is the right answer, word for word.
        overlap: chrF with the right answer, from 0 to 100.
        loss: the sum of the cross-entropy of the chat's answer tokens, in nats; all answers of the chat count.
        tokens: the number of these tokens.
    """

    text: str
    ended: bool
    short: bool
    exact: bool
    overlap: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class Scores:
    """How a model does on some chats. Each error is a standard error, None where fewer than two rows count.

    Attributes:
        rows: one for each chat.
        seconds: that the scoring took.
    """

    rows: list[ScoredAnswer] = field(repr=False)
    seconds: float

    @cached_property
    def _loss(self) -> Interval | None:
        totals, counts = zip(*((row.loss, row.tokens) for row in self.rows), strict=True)
        return ratio(totals, counts) if len(self.rows) > 1 else None

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the answers' tokens, in nats per token; each token counts the same."""
        return sum(row.loss for row in self.rows) / self.tokens

    @property
    def loss_error(self) -> float | None:
        return None if self._loss is None else self._loss.standard_error

    @property
    def tokens(self) -> int:
        """The number of tokens whose loss counts."""
        return sum(row.tokens for row in self.rows)

    @property
    def short_rows(self) -> int:
        """The number of rows with a short right answer: those that `exact_match` is about."""
        return sum(row.short for row in self.rows)

    @property
    def exact_match(self) -> float | None:
        """The share of the short right answers that the model gave word for word; None if there are none."""
        return sum(row.exact for row in self.rows if row.short) / self.short_rows if self.short_rows else None

    @property
    def exact_match_error(self) -> float | None:
        """None also where no answer or each of them is right: the formula would say 0, as if nothing were left to chance."""
        known = self.short_rows > 1 and 0 < self.exact_match < 1
        return standard_error(self.exact_match, self.short_rows) if known else None

    @property
    def long_rows(self) -> int:
        """The number of rows with a long right answer: those that `overlap` is about."""
        return len(self.rows) - self.short_rows

    @property
    def overlap(self) -> float | None:
        """The mean chrF of the answers whose right answer is long, from 0 to 100; None if there are none."""
        return sum(row.overlap for row in self.rows if not row.short) / self.long_rows if self.long_rows else None

    @property
    def overlap_error(self) -> float | None:
        found = [row.overlap for row in self.rows if not row.short]
        return ratio(found, [1] * len(found)).standard_error if len(found) > 1 else None

    @property
    def answers(self) -> list[str]:
        return [row.text for row in self.rows]

    @property
    def cut_off(self) -> int:
        """How many answers the model had not ended at the length that their right answers need."""
        return sum(not row.ended for row in self.rows)

    def as_dict(self) -> dict[str, float | int | None]:
        """All scores for a JSON file, without the answers; None where one is not a finite number."""
        names = ("loss", "loss_error", "tokens", "exact_match", "exact_match_error", "short_rows")
        names += ("overlap", "overlap_error", "long_rows", "cut_off", "seconds")
        return {"rows": len(self.rows)} | {name: as_json(getattr(self, name)) for name in names}


def as_json(value: float | None) -> float | None:
    """A number, or None for one that JSON does not have, such as the loss of a model that overflows."""
    return value if value is not None and math.isfinite(value) else None


def is_short(right: str) -> bool:
    """Whether a right answer is so short that it can be expected word for word: one line of up to 80 characters.

    Characters, since they count the same for every tokenizer and in languages that put no space between words.
    """
    right = right.strip()
    return len(right) <= SHORT_ANSWER and "\n" not in right


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    batch_size: int | None = None,
) -> Scores:
    """Ask the model each chat's last question, and hold its answer against the chat's last message.

    The loss is that of training: of all answers of a chat. Answers are greedy, and each may be as long as its right
    answer needs, rounded up to a power of two (`qlora_helpers.evaluation.answers.answers_up_to`). A model that has not
    ended its answer there is cut off, and counted. Earlier turns and system messages are part of the question.

    Short right answers (`is_short`) are scored by exact match, long ones by their overlap: chrF, the F2 score of
    character n-grams of one to six (Popović 2015, aclanthology.org/W15-3049), as sacrebleu computes it for one sentence.
    It needs no words, so it works in every language; a text beside the point still has some 15 to 25.

    Args:
        model: one with adapters is asked with the active one; within `model.disable_adapter()` it is the base.
        batch_size: chats per batch; by default as many as memory should take.

    Raises:
        ValueError: there are no chats; a special token is typed into one; one is longer than the model's context; the
            chat template marks no token of an answer; or `batch_size` is no positive whole number.
    """
    from sacrebleu.metrics import CHRF

    started = time.perf_counter()
    check_not_empty("chats", chats, "chat")
    if batch_size is not None:
        batch_size = validation.whole("batch_size", batch_size, otherwise="None for what fits")
    check_texts(chats, tokenizer)
    encoded, context = tokenized(chats, tokenizer), context_of(model)
    for number, row in enumerate(encoded, start=1):
        if context is not None and len(row["input_ids"]) > context:
            raise ValueError(
                f"chat {number} has {len(row['input_ids'])} tokens, and the model takes {context}: leave it out or shorten it"
            )
    losses = losses_of(model, tokenizer, encoded, batch_size)
    check_marked(tuple(tokens for _, tokens in losses))
    questions, right = zip(*map(split_question, chats), strict=True)
    answers = answers_up_to(model, tokenizer, list(questions), tokens_needed(right, tokenizer), batch_size)
    overlap_of = CHRF().sentence_score
    rows = [
        ScoredAnswer(
            text=text,
            ended=ended,
            short=is_short(wanted),
            exact=text == wanted.strip(),
            overlap=overlap_of(text, [wanted]).score,
            loss=total,
            tokens=tokens,
        )
        for (text, ended), wanted, (total, tokens) in zip(answers, right, losses, strict=True)
    ]
    return Scores(rows, time.perf_counter() - started)
