"""Two models on the same chats, side by side: the base and what was trained on it."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qlora_helpers import validation
from qlora_helpers.chats import Chat
from qlora_helpers.evaluation.scores import SHORT_ANSWER, ScoredAnswer, Scores, as_json
from qlora_helpers.statistics import Interval, mcnemar, ratio
from qlora_helpers.visible import shortened, visible

__all__ = ["Comparison", "Example", "compare"]

WIDTH = 100  # of the text for terminals
LONGEST = 600  # characters of a text that are shown


class Example(NamedTuple):
    """One row of the table: the number of the chat, from 1, its last question and answer, and what both models said."""

    number: int
    question: str
    right: str
    before: str
    after: str
    after_is_exact: bool
    after_overlap: float


@dataclass(frozen=True)
class Comparison:
    """The scores of two models on the same chats. `print` it, or let a notebook show it.

    Attributes:
        before, after: the scores of the base, and of the trained model.
        first: examples from the beginning of the chats.
        worst: of the others, those that the trained model answers worst: the least overlap (chrF) with the right answer,
            then the highest loss. None of them is exactly right.
        loss_change: after minus before, in nats per token, with its 95 % confidence interval; None for a single chat.
        exact_match_chance: the probability that exact match changes as much by chance (McNemar's exact test); None if no
            right answer is short.
        overlap_change: after minus before; None if fewer than two right answers are long.
    """

    before: Scores
    after: Scores
    first: list[Example] = field(repr=False)
    worst: list[Example] = field(repr=False)
    loss_change: Interval | None
    exact_match_chance: float | None
    overlap_change: Interval | None

    def lines(self) -> list[tuple[str, str, str, str]]:
        """The table of scores: (what, before, after, what the change is worth); only what was measured."""
        before, after = self.before, self.after
        found = [
            (
                "loss",
                _plus_minus(before.loss, before.loss_error, ".3f"),
                _plus_minus(after.loss, after.loss_error, ".3f"),
                f"nats per token, {before.tokens:,} tokens; {_change(self.loss_change, '.3f')}",
            )
        ]
        if before.exact_match is not None:
            chance = "more than chance" if self.exact_match_chance < 0.05 else "may be chance"
            chance = f"{chance} (p = {self.exact_match_chance:.2g})"
            pairs = zip(before.rows, after.rows, strict=True)
            if all(one.exact == other.exact for one, other in pairs if one.short):
                chance = "none became right or wrong"
            found.append(
                (
                    "exact match",
                    _plus_minus(before.exact_match, before.exact_match_error, ".1%"),
                    _plus_minus(after.exact_match, after.exact_match_error, ".1%"),
                    f"{before.short_rows:,} answers of one line of up to {SHORT_ANSWER} characters; {chance}",
                )
            )
        if before.overlap is not None:
            found.append(
                (
                    "overlap (chrF)",
                    _plus_minus(before.overlap, before.overlap_error, ".1f"),
                    _plus_minus(after.overlap, after.overlap_error, ".1f"),
                    f"of 100, {before.long_rows:,} longer answers; {_change(self.overlap_change, '.1f')}",
                )
            )
        share = f"of {len(before.rows):,} answers, at the length that the right one needs"
        found.append(("cut off", f"{before.cut_off:,}", f"{after.cut_off:,}", share))
        return found

    def __str__(self) -> str:
        found = [("", "before", "after", ""), *self.lines()]
        widths = [max(len(line[column]) for line in found) for column in range(3)]
        text = []
        for what, before, after, note in found:
            start = f"{what:{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}  "
            lines = textwrap.wrap(note, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or [start]
            text += [line.rstrip() for line in lines]
        text.append("± is one standard error.")
        for title, examples in self._parts():
            text += ["", title]
            for example in examples:
                text += _block(f"{example.number:>5}  asked   ", example.question)
                text += _block(f"{'':5}  right   ", example.right)
                text += _block(f"{'':5}  before  ", example.before)
                text += _block(f"{'':5}  after   ", example.after)
        return "\n".join(text)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # where IPython shows no HTML

    def _repr_html_(self) -> str:
        head = f"<tr>{_cells('', 'before', 'after', '', kind='th')}</tr>"
        rows = "".join(f"<tr>{_cells(what, kind='th')}{_cells(*values)}</tr>" for what, *values in self.lines())
        # mathjax_ignore: else a notebook takes what stands between two dollars for a formula
        parts = [
            f"<div class='mathjax_ignore tex2jax_ignore'><table>{head}{rows}</table><p>± is one standard error.</p>"
        ]
        for title, examples in self._parts():
            head = _cells("chat", "question", "right", "before", "after", kind="th")
            rows = "".join(
                f"<tr>{_cells(str(example.number), example.question, example.right, example.before, example.after)}</tr>"
                for example in examples
            )
            parts.append(f"<p>{html.escape(title)}</p><table><tr>{head}</tr>{rows}</table>")
        return "".join(parts) + "</div>"

    def _parts(self) -> Iterator[tuple[str, list[Example]]]:
        if self.first:
            yield "The first chats:" if len(self.first) > 1 else "The first chat:", self.first
        if self.worst:
            yield "Of the others, those with the worst answers after training:", self.worst

    def as_dict(self) -> dict[str, Any]:
        """All of it for a JSON file. An interval is [mean, half its width]."""

        def pair(interval: Interval | None) -> list[float | None] | None:
            return None if interval is None else [as_json(interval.mean), as_json(interval.half)]

        return {
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "loss_change": pair(self.loss_change),
            "exact_match_chance": self.exact_match_chance,
            "overlap_change": pair(self.overlap_change),
            "first": [example._asdict() for example in self.first],
            "worst": [example._asdict() for example in self.worst],
        }


def compare(before: Scores, after: Scores, chats: list[Chat], first: int = 5, worst: int = 5) -> Comparison:
    """Hold the scores of a trained model against those of its base.

    Args:
        before, after: what `score` said of both for these chats.
        first, worst: how many examples to show: from the beginning, and of the worst of the rest.

    Raises:
        ValueError: the scores are not of the same chats, or a number is no whole number.
    """
    first, worst = validation.whole("first", first, at_least=0), validation.whole("worst", worst, at_least=0)
    counts = {"before": before, "after": after}
    for name, scores in counts.items():
        if len(scores.rows) != len(chats):
            raise ValueError(f"{name} has {len(scores.rows)} rows for {len(chats)} chats: score the same chats")
    if [(row.tokens, row.short) for row in before.rows] != [(row.tokens, row.short) for row in after.rows]:
        raise ValueError("before and after count other tokens: score the same chats with the same tokenizer")
    pairs = list(zip(before.rows, after.rows, strict=True))
    examples = [
        Example(number, chat[-2]["content"], chat[-1]["content"], one.text, other.text, other.exact, other.overlap)
        for number, (chat, (one, other)) in enumerate(zip(chats, pairs, strict=True), start=1)
    ]
    wrong = [example for example in examples[first:] if not example.after_is_exact]
    wrong = sorted(wrong, key=lambda example: (example.after_overlap, -_per_token(after.rows[example.number - 1])))
    short = [pair for pair in pairs if pair[0].short]
    long = [pair for pair in pairs if not pair[0].short]
    changes = [other.overlap - one.overlap for one, other in long]
    return Comparison(
        before=before,
        after=after,
        first=examples[:first],
        worst=wrong[:worst],
        loss_change=ratio([other.loss - one.loss for one, other in pairs], [one.tokens for one, _ in pairs])
        if len(pairs) > 1
        else None,
        exact_match_chance=mcnemar([one.exact for one, _ in short], [other.exact for _, other in short])
        if short
        else None,
        overlap_change=ratio(changes, [1] * len(changes)) if len(changes) > 1 else None,
    )


def _per_token(row: ScoredAnswer) -> float:
    return row.loss / row.tokens


def _plus_minus(value: float, error: float | None, form: str) -> str:
    """A score with its standard error, in the notation `form`."""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _change(change: Interval | None, form: str) -> str:
    """What a difference is worth."""
    if change is None:
        return "no interval from one alone"
    said = f"{change.mean:+{form}} ± {change.half:{form}} (95 % interval)"
    return f"{said}, may be chance" if change.is_noise else said


def _block(start: str, text: str) -> list[str]:
    """A text after its label, wrapped under its own beginning."""
    text = shortened(visible(text), LONGEST)
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), drop_whitespace=True
    ) or [start.rstrip()]


def _cells(*texts: str, kind: str = "td") -> str:
    """Cells of a table, on the left, where JupyterLab would put them on the right."""
    return "".join(
        f"<{kind} style='text-align:left'>{html.escape(shortened(visible(text), LONGEST))}</{kind}>" for text in texts
    )
