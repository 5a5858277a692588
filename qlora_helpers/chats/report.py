"""What is in chat data, before anything is trained: how much of it, how long, what is odd, and which tokens count."""

from __future__ import annotations

import dataclasses
import html
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from qlora_helpers.chats.marked import BEGIN, COUNTS, END, IGNORED, LINE, as_html, as_text, pieces_of
from qlora_helpers.chats.messages import Chat
from qlora_helpers.chats.templates import CHUNK, ids_of, mark, missing_text, rendered
from qlora_helpers.chats.words import tokens_per_word, warning_of_spelling
from qlora_helpers.validation import whole
from qlora_helpers.visible import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Bar", "DataReport", "Overlap", "Tokens", "report_on"]

MARKED = 5_000  # rows whose tokens are marked; of more rows as many, evenly spread, and all that are too long
EXAMPLES, EXAMPLE_TOKENS = 3, 160
BARS, BAR_WIDTH, WIDTH = 10, 30, 100
ON, OFF = "\x1b[1;4;32m", "\x1b[0m"  # bold, underlined and green


@dataclass(frozen=True)
class Bar:
    """The number of rows with `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int

    @property
    def name(self) -> str:
        """The range as text."""
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a row in the chat template: the fewest, the median, what 95 % of the rows do not exceed, the most."""

    least: int
    median: int
    most_of_95_percent: int
    most: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Overlap:
    """What the validation data shares with the training data, in rows of the validation data.

    Attributes:
        rows: equal as a whole to a training row.
        questions: with the same question as a training row, and all that comes before it; these rows included.
    """

    rows: int
    questions: int


@dataclass(frozen=True)
class DataReport:
    """What is in chat data; `str()` gives it as plain text, and a notebook shows it with bars and marked tokens.

    Attributes:
        rows, validation_rows: how many chats there are.
        messages: their number by role.
        answers: the number of chats with one answer, two, and so on.
        tokens: of each row.
        max_length: what a row may have; None for any length.
        too_long: tokens of the rows that have more, by their number.
        cut_in: of the rows that are too long, in which message the cut would be, such as "answer 1": their number.
        validation_too_long: rows of the validation data that have more.
        refused: what the chat template does not take, by the row's number.
        repeated: rows that are equal to an earlier one.
        contradicting: rows whose question occurs with another answer, too.
        empty_answers, one_word_answers: their number.
        overlap: what both splits share; None without validation data.
        marked_rows: rows in which the tokens that count were looked for.
        counted: the share of their tokens that count in the loss, 0 to 1.
        tokens_per_word, warning: how well the tokenizer knows the words.
        examples: the first rows, each as pieces of text and whether they count in the loss.
    """

    rows: int
    validation_rows: int
    messages: dict[str, int]
    answers: dict[int, int]
    tokens: Tokens | None
    max_length: int | None
    too_long: dict[int, int]
    cut_in: dict[str, int]
    validation_too_long: int
    refused: dict[int, str]
    repeated: int
    contradicting: int
    empty_answers: int
    one_word_answers: int
    overlap: Overlap | None
    marked_rows: int
    counted: float
    tokens_per_word: float
    warning: str
    examples: tuple[tuple[tuple[str, bool], ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it in what JSON has; row numbers and numbers of answers are texts."""
        made = dataclasses.asdict(self)
        for name in ("answers", "too_long", "refused"):
            made[name] = {str(key): value for key, value in made[name].items()}
        return made

    def __str__(self) -> str:
        return self._text(BEGIN, END)

    def in_colour(self) -> str:
        """The report for a terminal, with the tokens that count in green, bold and underlined.

        As plain as `str()` where standard output is no terminal or the environment variable NO_COLOR is set.
        """
        plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR")
        return str(self) if plain else self._text(ON, OFF)

    def _text(self, on: str, off: str) -> str:
        lines = [self._title()]
        for name, text in self._facts():
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=f"  {name:<18} ", subsequent_indent=" " * 21, break_long_words=False
            )
        if self.tokens:
            lines += ["", "Tokens per row:"]
            most = max(bar.rows for bar in self.tokens.bars)
            for bar in self.tokens.bars:
                length = max(1, round(BAR_WIDTH * bar.rows / most)) if bar.rows else 0
                lines.append(f"  {bar.name:>15}  {'█' * length}{' ' if length else ''}{bar.rows:,}")
                if self.max_length is not None and bar.low <= self.max_length <= bar.high:
                    lines.append(f"  {'':>15}  ---- max_length={self.max_length:,}")
        if self.examples:
            how = f"{on}marked like this{off}"
            lines += ["", f"The first rows as the model sees them; what counts in the loss is {how}:"]
            for number, pieces in enumerate(self.examples, start=1):
                lines.append(f"  {number}: {as_text(pieces, on, off)}")
        if self.warning:
            lines += ["", *textwrap.wrap(f"Warning: {self.warning}.", WIDTH)]
        return "\n".join(lines)

    def _title(self) -> str:
        return f"{_rows(self.rows)} for training" + (
            f", {self.validation_rows:,} for validation" if self.validation_rows else ""
        )

    def _facts(self) -> Iterator[tuple[str, str]]:
        """The figures, each with its name."""
        yield "messages", ", ".join(f"{count:,} {role}" for role, count in self.messages.items()) or "none"
        if self.answers:
            several = (f"{_rows(rows)} with {count}" for count, rows in self.answers.items())
            yield "answers per row", f"{next(iter(self.answers))}" if len(self.answers) == 1 else ", ".join(several)
        if self.tokens:
            yield (
                "tokens per row",
                f"{self.tokens.least:,} to {self.tokens.most:,}; half of the rows have at most {self.tokens.median:,}, "
                f"95 % at most {self.tokens.most_of_95_percent:,}",
            )
        if self.max_length is not None:
            yield "too long", self._too_long()
        if self.refused:
            number = min(self.refused)
            yield (
                "not usable",
                f"{_rows(len(self.refused))}; the first is row {number:,}: {visible(self.refused[number])}",
            )
        if self.marked_rows:
            sample = (
                f" (measured on {self.marked_rows:,} rows)" if self.marked_rows < self.rows - len(self.refused) else ""
            )
            yield (
                "learnt",
                f"{100 * self.counted:.0f} % of the tokens count in the loss: the answers, each with the token that ends it{sample}",
            )
        yield "tokens per word", f"{self.tokens_per_word:.1f}" + ("; see the warning" if self.warning else "")
        yield (
            "said twice",
            f"{_rows(self.repeated)} equal to an earlier one" if self.repeated else "no row is there twice",
        )
        if self.contradicting:
            yield "contradictions", f"{_rows(self.contradicting)} whose question has another answer elsewhere"
        if self.empty_answers:
            yield "empty answers", f"{self.empty_answers:,}"
        if self.one_word_answers:
            yield "one-word answers", f"{self.one_word_answers:,}"
        if self.overlap is not None:
            yield "in both splits", self._in_both()

    def _too_long(self) -> str:
        limit = f"max_length={self.max_length:,}"
        validation = f"; {_rows(self.validation_too_long)} of the validation data" if self.validation_too_long else ""
        if not self.too_long:
            return f"no row has more tokens than {limit}{validation}"
        worst = sorted(self.too_long, key=lambda number: -self.too_long[number])[:3]
        where = ", ".join(f"{place} ({count:,})" for place, count in self.cut_in.items())
        named = ", ".join(f"row {number:,} with {self.too_long[number]:,}" for number in worst)
        return (
            f"{_rows(len(self.too_long))} with more tokens than {limit} ({named}{', …' if len(self.too_long) > 3 else ''})"
            + (f"; they would be cut in: {where}" if where else "")
            + validation
        )

    def _in_both(self) -> str:
        if not self.overlap.questions:
            return "no row of the validation data has a question of the training data"
        return (
            f"of the validation data, {_rows(self.overlap.rows)} equal to a training row, and {_rows(self.overlap.questions)} with "
            "a question of the training data: the score on them says nothing about new questions"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # where IPython shows no HTML

    def _repr_html_(self) -> str:
        return "\n".join(_html(self))


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


# The measuring


def report_on(
    chats: list[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    validation: list[Chat] = (),
    numbers: Sequence[int] | None = None,
) -> DataReport:
    """Look at chat data before anything is trained.

    Every row is counted and measured, but for two figures: the share of tokens that count in the loss is taken from about
    5,000 rows, and tokens per word from about 1,000, both evenly spread.

    Args:
        max_length: what a row may have, in tokens; None for any length.
        validation: the chats that are kept for validation.
        numbers: of the chats, for the report to name them by, such as those in their file (`ChatFile.rows`); None to
            count them from 1.

    Raises:
        ValueError: there are no chats, `max_length` is no positive whole number, or the tokenizer has no chat template.
    """
    if not chats:
        raise ValueError("chats=[]: there is nothing to report on. Pass at least one chat")
    if max_length is not None:
        max_length = whole("max_length", max_length, otherwise="None for any length")
    numbers = range(1, len(chats) + 1) if numbers is None else numbers
    lengths, refused = _lengths(chats, tokenizer)
    too_long = {number: length for number, length in lengths.items() if max_length is not None and length > max_length}
    step = max(1, len(chats) // MARKED)
    chosen = sorted({*range(1, len(chats) + 1, step), *list(too_long)[:MARKED]} & lengths.keys())
    counted = total = marked = 0
    cut_in: Counter[str] = Counter()
    examples: list[tuple] = []
    for start in range(0, len(chosen), CHUNK):
        rows, faults = mark({number: chats[number - 1] for number in chosen[start : start + CHUNK]}, tokenizer)
        refused |= faults
        for number, row in rows.items():
            if number in too_long:
                cut_in[_place_of_cut(chats[number - 1], row, max_length)] += 1
            if (number - 1) % step == 0:
                marked, total = marked + 1, total + len(row["input_ids"])
                counted += sum(row["assistant_masks"])
            if len(examples) < EXAMPLES:
                examples.append(_pieces(row, tokenizer))
    ahead = [_digests(chat) for chat in chats]
    later_lengths, _ = _lengths(validation, tokenizer) if max_length is not None else ({}, {})
    answers = [message["content"] for chat in chats for message in chat if message["role"] == "assistant"]
    return DataReport(
        rows=len(chats),
        validation_rows=len(validation),
        messages=dict(Counter(message["role"] for chat in chats for message in chat)),
        answers=dict(sorted(Counter(sum(m["role"] == "assistant" for m in chat) for chat in chats).items())),
        tokens=_spread(sorted(lengths.values())) if lengths else None,
        max_length=max_length,
        too_long={numbers[number - 1]: length for number, length in too_long.items()},
        cut_in=dict(sorted(cut_in.items())),
        validation_too_long=sum(length > max_length for length in later_lengths.values()),
        refused={numbers[number - 1]: fault for number, fault in sorted(refused.items())},
        repeated=len(ahead) - len(set(ahead)),
        contradicting=_contradicting(ahead),
        empty_answers=sum(not answer.strip() for answer in answers),
        one_word_answers=sum(len(answer.split(None, 1)) == 1 for answer in answers),
        overlap=_overlap(ahead, [_digests(chat) for chat in validation]) if validation else None,
        marked_rows=marked,
        counted=counted / total if total else 0.0,
        tokens_per_word=tokens_per_word(chats, tokenizer),
        warning=warning_of_spelling(chats, tokenizer),
        examples=tuple(examples),
    )


def _lengths(chats: list[Chat], tokenizer) -> tuple[dict[int, int], dict[int, str]]:
    """The tokens of each chat, and why a chat cannot be used; both by number. A part at a time, for the memory."""
    lengths, refused = {}, {}
    for start in range(0, len(chats), CHUNK):
        chunk = dict(enumerate(chats[start : start + CHUNK], start=start + 1))
        texts, faults = rendered(chunk, tokenizer)
        refused |= faults
        refused |= {number: fault for number, text in texts.items() if (fault := missing_text(chunk[number], text))}
        lengths |= dict(zip(texts, map(len, ids_of(list(texts.values()), tokenizer)), strict=True))
    return lengths, refused


def _spread(ordered: list[int]) -> Tokens:
    """The lengths of all rows, from the shortest to the longest, in figures and at most ten bars of a round width."""
    last = len(ordered) - 1
    width = _round_width((ordered[last] - ordered[0] + 1) / BARS)
    counts = Counter((length - 1) // width for length in ordered)
    bars = (Bar(n * width + 1, (n + 1) * width, counts[n]) for n in range(min(counts), max(counts) + 1))
    middle = ordered[last // 2]
    return Tokens(ordered[0], middle, ordered[-(-95 * len(ordered) // 100) - 1], ordered[last], tuple(bars))


def _round_width(least: float) -> int:
    """The first of 1, 2, 5, 10, 20, 50, … that is not below."""
    power = 1
    while True:
        for width in (power, 2 * power, 5 * power):
            if width >= least:
                return width
        power *= 10


def _place_of_cut(chat: Chat, row: dict[str, list[int]], max_length: int) -> str:
    """Which message the token after the last that fits belongs to."""
    marks = row["assistant_masks"]
    begun = sum(mark > before for mark, before in zip(marks[: max_length + 1], [0, *marks], strict=False))
    if marks[max_length]:
        return f"answer {begun}"
    if begun == sum(message["role"] == "assistant" for message in chat):
        return "what the template writes after the last answer"
    return f"what comes before answer {begun + 1}"


def _digests(chat: Chat) -> tuple[bytes, bytes]:
    """What stands for the question, with all that comes before it, and for the last answer."""
    question = "\0".join(f"{message['role']}\0{message['content'].strip()}" for message in chat[:-1])
    return _digest(question), _digest(chat[-1]["content"].strip())


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _contradicting(digests: list[tuple[bytes, bytes]]) -> int:
    different = Counter(question for question, _ in set(digests))
    return sum(different[question] > 1 for question, _ in digests)


def _overlap(ahead: list[tuple[bytes, bytes]], later: list[tuple[bytes, bytes]]) -> Overlap:
    rows, questions = set(ahead), {question for question, _ in ahead}
    return Overlap(sum(pair in rows for pair in later), sum(question in questions for question, _ in later))


# The first rows, token by token


def _pieces(row: dict[str, list[int]], tokenizer) -> tuple[tuple[str, bool], ...]:
    """The first tokens of a row as text, whether each counts, and how many more there are."""
    ids = row["input_ids"][:EXAMPLE_TOKENS]
    pieces = pieces_of(ids, row["assistant_masks"], tokenizer)
    left = len(row["input_ids"]) - len(ids)
    return (*pieces, (f" … ({left:,} more tokens)", False)) if left else pieces


def _html(report: DataReport) -> Iterator[str]:
    cell = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"
    yield '<div style="max-width:60em">'
    yield f"<p><b>{html.escape(report._title())}</b></p>"
    if report.warning:
        yield f'<p role="alert"><b>Warning:</b> {html.escape(report.warning)}.</p>'
    yield "<table>"
    for name, text in report._facts():
        yield f'<tr><th scope="row" style="{cell};white-space:nowrap">{html.escape(name)}</th><td style="{cell}">{html.escape(text)}</td></tr>'
    yield "</table>"
    if report.tokens:
        yield from _html_bars(report)
    if report.examples:
        yield (
            f'<p>The first rows as the model sees them, token by token: <span style="{COUNTS}">bold and underlined</span> counts in '
            f'the loss, <span style="{IGNORED}">dotted</span> does not.</p>'
        )
        yield '<ol aria-label="The first rows, with the tokens that count in the loss in bold">'
        for pieces in report.examples:
            yield f'<li style="{LINE}">{as_html(pieces)}</li>'
        yield "</ol>"
    yield "</div>"


def _html_bars(report: DataReport) -> Iterator[str]:
    tokens, limit = report.tokens, report.max_length
    most = max(bar.rows for bar in tokens.bars)
    said = "Tokens per row: " + "; ".join(f"{bar.name}: {_rows(bar.rows)}" for bar in tokens.bars)
    yield f'<div role="img" aria-label="{html.escape(said)}" style="margin:8px 0"><p>Tokens per row:</p>'
    for bar in tokens.bars:
        over = limit is not None and bar.low > limit
        ground = (
            "repeating-linear-gradient(45deg,rgb(213,94,0) 0 4px,transparent 4px 8px)" if over else "rgb(0,114,178)"
        )
        width = max(0.2, 24 * bar.rows / most) if bar.rows else 0
        note = ""
        if bar.rows and limit is not None and bar.high > limit:
            note = f", {'' if over else 'in part '}over max_length={limit:,}"
        yield (
            '<div style="display:flex;align-items:center;gap:8px;line-height:1.5">'
            f'<span style="width:9em;text-align:right">{bar.name}</span>'
            f'<span style="display:inline-block;height:.9em;width:{width:.2f}em;background:{ground}"></span>'
            f"<span>{bar.rows:,}{note}</span></div>"
        )
    yield "</div>"
