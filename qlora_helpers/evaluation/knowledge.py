"""What a model knows apart from what it was trained on, before and after training: whether it has forgotten something.

The set is fixed. For the course's own model it is 500 facts of the invented world (data/recall.jsonl), for any other 45
facts and 15 short texts of general knowledge in English, which come with the package (general_knowledge.json). A set of
this size finds a model that was damaged, not the loss of a few rare facts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.evaluation.facts import read_facts
from qlora_helpers.evaluation.losses import losses_of
from qlora_helpers.evaluation.scores import as_json
from qlora_helpers.paths import data_path
from qlora_helpers.statistics import Interval, mcnemar, ratio, standard_error

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Item",
    "Kept",
    "Knowledge",
    "KnownItem",
    "forgetting",
    "general_items",
    "measure_knowledge",
    "shipped_items",
]

GENERAL = Path(__file__).with_name("general_knowledge.json")
SHIPPED_FACTS, WRONG_ANSWERS = 500, 3
_MEANING = {
    "broken": "The loss is no longer a finite number: the trained model is broken.",
    "forgotten": "It has forgotten some of what its base knew.",
    "less sure": "It gets about as many facts right as its base did, and is less sure than that was.",
    "kept": "Nothing was forgotten that this set can show.",
}


@dataclass(frozen=True)
class Item:
    """A fact: the beginning of a sentence, the word that completes it, and wrong words; or a text, which has none.

    Attributes:
        prompt: "" for a text.
        answer: what completes the prompt after a space; the text itself.
        wrong: of the same kind as the answer.
    """

    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownItem:
    """What a model makes of an item.

    Attributes:
        item: the item.
        loss: the sum of the cross-entropy of its answer's tokens, in nats.
        tokens: the number of these tokens.
        right: whether the right answer is more likely than each wrong one, its tokens taken together; None for a text.
    """

    item: Item
    loss: float
    tokens: int
    right: bool | None


@dataclass(frozen=True)
class Knowledge:
    """What one model knows of the set. Each error is a standard error; None where all facts are right, or none is.

    Attributes:
        what: the set, in words.
        items: each item with what the model makes of it.
    """

    what: str
    items: list[KnownItem] = field(repr=False)

    @cached_property
    def _loss(self) -> Interval:
        return ratio([item.loss for item in self.items], [item.tokens for item in self.items])

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the answers and texts, in nats per token."""
        return self._loss.mean

    @property
    def loss_error(self) -> float:
        return self._loss.standard_error

    @property
    def choices(self) -> list[bool]:
        """For each fact, whether its right answer is the most likely one."""
        return [item.right for item in self.items if item.right is not None]

    @property
    def right(self) -> float:
        """The share of the facts whose right answer is more likely than the wrong ones; guessing has 0.25."""
        return sum(self.choices) / len(self.choices)

    @property
    def right_error(self) -> float | None:
        return standard_error(self.right, len(self.choices)) if 0 < self.right < 1 else None

    def as_dict(self) -> dict[str, Any]:
        """The figures for a JSON file; None where one is not a finite number."""
        names = ("loss", "loss_error", "right", "right_error")
        return {name: as_json(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Kept:
    """What a model knew before training and knows after. `print` it for the figures and what they mean.

    Attributes:
        before, after: what it knew, and knows.
        loss_change: after minus before, in nats per token, with its 95 % confidence interval, item by item.
        chance: the probability that as many facts change sides by chance (McNemar's exact test).
    """

    before: Knowledge
    after: Knowledge
    loss_change: Interval
    chance: float

    @property
    def verdict(self) -> str:
        """In a word or two; each is said where chance alone would do so in less than one case of twenty.

        - "broken": the loss is no longer a finite number;
        - "forgotten": fewer facts are right than before;
        - "less sure": the loss rose, and no fewer facts are right;
        - "kept": nothing was forgotten that this set can show.
        """
        if as_json(self.after.loss) is None:
            return "broken"
        if self.after.right < self.before.right and self.chance < 0.05:
            return "forgotten"
        return "less sure" if self.loss_change.mean > self.loss_change.half else "kept"

    def __str__(self) -> str:
        before, after, change = self.before, self.after, self.loss_change
        worth = f"{'more' if self.chance < 0.05 else 'no more'} than chance (p = {self.chance:.2g})"
        worth = "none has changed" if before.choices == after.choices else worth
        rose = "no more than noise" if change.is_noise else "more than noise"
        texts = len(after.items) - len(after.choices)
        on = f", on these and {texts} short texts," if texts else ""
        figures = (
            f"Of {len(after.choices)} {before.what}, {sum(before.choices)} were right before training ({before.right:.1%}) "
            f"and {sum(after.choices)} are right after it ({after.right:.1%}): {worth}. The loss{on} went from "
            f"{before.loss:.3f} to {after.loss:.3f} nats per token ({change.mean:+.2g} ± {change.half:.2g}, 95 % interval): "
            f"{rose}."
        )
        return f"{figures}\n{_MEANING[self.verdict]}"

    def as_dict(self) -> dict[str, Any]:
        """All of it for a JSON file, item by item. `loss_change` is [mean, half its interval's width]."""
        return {
            "what": self.before.what,
            "facts": len(self.before.choices),
            "items": len(self.before.items),
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "loss_change": [as_json(self.loss_change.mean), as_json(self.loss_change.half)],
            "chance": self.chance,
            "verdict": self.verdict,
            "said": str(self),
            "by_item": [
                {
                    "text": f"{one.item.prompt} {one.item.answer}".strip(),
                    "tokens": one.tokens,
                    "loss_before": as_json(one.loss),
                    "loss_after": as_json(other.loss),
                    "right_before": one.right,
                    "right_after": other.right,
                }
                for one, other in zip(self.before.items, self.after.items, strict=True)
            ],
        }


def general_items() -> list[Item]:
    """General knowledge that comes with the package: 45 facts with three wrong answers each, and 15 short texts."""
    found = json.loads(GENERAL.read_text(encoding="utf-8"))
    facts = [Item(fact["prompt"], fact["answer"], tuple(fact["wrong"])) for fact in found["facts"]]
    return facts + [Item("", text) for text in found["texts"]]


@cache
def shipped_items() -> tuple[Item, ...]:
    """The first 500 facts of the invented world, each with three wrong answers of the same kind.

    Raises:
        FileNotFoundError: the course's data is not there (`qlora_helpers.paths.data_path`).
    """
    facts = read_facts(data_path("recall.jsonl"))
    answers = {
        kind: sorted({fact["answer"] for fact in facts if fact["attribute"] == kind})
        for kind in {fact["attribute"] for fact in facts}
    }
    draw = random.Random(0)
    return tuple(
        Item(
            fact["prompt"],
            fact["answer"],
            tuple(draw.sample([word for word in answers[fact["attribute"]] if word != fact["answer"]], WRONG_ANSWERS)),
        )
        for fact in facts[:SHIPPED_FACTS]
    )


def _items_for(tokenizer) -> tuple[str, Sequence[Item]]:
    """The set for a model and its name: the invented world's, if each of its answers is one token of this tokenizer."""
    try:
        shipped = shipped_items()
    except FileNotFoundError:  # the package is used without the course
        shipped = ()
    answers = sorted({item.answer for item in shipped})
    if answers and all(
        len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]
    ):
        return "facts of the course's invented world", shipped
    return "facts of general knowledge", general_items()


def measure_knowledge(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None = None
) -> Knowledge:
    """What a model knows of the set that fits it: the course's own facts if its tokenizer has their words as tokens, else
    general knowledge.

    The texts are continued as they are, without the chat template.

    Args:
        batch_size: texts per batch; by default as many as memory should take.

    Raises:
        ValueError: `batch_size` is no positive whole number.
    """
    what, items = _items_for(tokenizer)
    pairs = [(item.prompt, answer) for item in items for answer in (item.answer, *item.wrong)]
    losses = iter(losses_of(model, tokenizer, _rows(pairs, tokenizer), batch_size))
    known = []
    for item in items:
        (loss, tokens), *others = [next(losses) for _ in range(1 + len(item.wrong))]
        right = all(loss < other for other, _ in others) if others else None
        known.append(KnownItem(item, loss, tokens, right))
    return Knowledge(what, known)


def _rows(pairs: list[tuple[str, str]], tokenizer) -> list[dict[str, list[int]]]:
    """Each prompt and its continuation as tokens, with a mark on what differs from the prompt alone.

    They are tokenised together, since the last token of a prompt may be another one once the text goes on.
    """
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    texts = tokenizer([f"{prompt} {answer}" if prompt else answer for prompt, answer in pairs])["input_ids"]
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        same = next((n for n, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other), len(prompt))
        same = max(1, min(same, len(text)))  # nothing comes before the first token, so it has no loss
        rows.append({"input_ids": text, "assistant_masks": [0] * same + [1] * (len(text) - same)})
    return rows


def forgetting(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    before: Knowledge | None = None,
    batch_size: int | None = None,
) -> Kept:
    """What a trained model still knows of what its base knew.

    Args:
        before: what `measure_knowledge` said of the base. It may be left out for a model with adapters, which are then
            switched off to measure the base; after full fine-tuning the base is gone.
        batch_size: as in `measure_knowledge`.

    Raises:
        ValueError: `before` is None for a model without adapters, or is of another set; or as `measure_knowledge` does.
    """
    from peft import PeftModel

    if before is None:
        if not isinstance(model, PeftModel):
            raise ValueError("before=None: this model has no adapter to switch off. Pass measure_knowledge of the base")
        with model.disable_adapter():
            before = measure_knowledge(model, tokenizer, batch_size)
    after = measure_knowledge(model, tokenizer, batch_size)
    if [(one.item, one.tokens) for one in before.items] != [(one.item, one.tokens) for one in after.items]:
        raise ValueError("before is of other items: measure the base of this model, with the same tokenizer")
    changes = [other.loss - one.loss for one, other in zip(before.items, after.items, strict=True)]
    loss_change = ratio(changes, [item.tokens for item in after.items])
    return Kept(before, after, loss_change, mcnemar(before.choices, after.choices))
