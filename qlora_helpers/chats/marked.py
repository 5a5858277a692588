"""One row of training data as text, token by token, with the tokens that count in the loss marked."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.visible import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MarkedRow", "marked_row"]

BEGIN, END = "⟦", "⟧"  # around what counts, where there is no colour

# For notebooks: colours only on grounds that let both a light and a dark page through, and never colour alone
COUNTS = "background:rgba(0,158,115,.25);border-bottom:2px solid rgb(0,158,115);font-weight:bold"
IGNORED = "border-bottom:2px dotted rgba(128,128,128,.6)"
LINE = "font-family:monospace;line-height:1.9;overflow-wrap:anywhere"


@dataclass(frozen=True, repr=False)
class MarkedRow:
    """A row that shows itself: in a notebook with the counted tokens bold on green, as text with them in ⟦ and ⟧.

    Attributes:
        pieces: for each token its text, and whether it counts in the loss. Tokens that only together make a character
            are one piece.
    """

    pieces: tuple[tuple[str, bool], ...]

    def __str__(self) -> str:
        return as_text(self.pieces)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return f'<div style="{LINE}">{as_html(self.pieces)}</div>'


def marked_row(ids: Sequence[int], counts: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> MarkedRow:
    """A row of token ids as text.

    Args:
        ids: the tokens of one row, a list or a tensor of one dimension.
        counts: for each of them whether it counts in the loss: that is, whether its label is not -100.

    Raises:
        ValueError: `counts` is not as long as `ids`.
    """
    if len(ids) != len(counts):
        raise ValueError(f"counts has {len(counts)} entries for {len(ids)} ids: must have one for each token")
    return MarkedRow(pieces_of([int(token) for token in ids], [bool(one) for one in counts], tokenizer))


def pieces_of(ids: list[int], counts: Sequence[bool], tokenizer) -> tuple[tuple[str, bool], ...]:
    """The tokens of a row as text, and whether each counts; tokens that only together make a character are one piece."""
    pieces: list[tuple[str, bool]] = []
    shown, start = "", 0
    for place in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:place])  # a token alone may lose the space before it
        if text.endswith("\ufffd") and place < len(ids):
            continue
        same = next(
            (n for n, (a, b) in enumerate(zip(shown, text, strict=False)) if a != b), min(len(shown), len(text))
        )
        pieces.append((unmarked(text[same:]), bool(counts[start])))
        shown, start = text, place
    return tuple(pieces)


def unmarked(text: str) -> str:
    """A text of one line without what tokens are marked with."""
    return visible(text).replace(BEGIN, "\\u27e6").replace(END, "\\u27e7")


def as_text(pieces: tuple[tuple[str, bool], ...], begin: str = BEGIN, end: str = END) -> str:
    """Pieces as text, with `begin` and `end` around each stretch that counts."""
    return "".join(f"{begin}{text}{end}" if counts else text for text, counts in _runs(pieces))


def as_html(pieces: tuple[tuple[str, bool], ...]) -> str:
    """Pieces as spans, one for each."""
    return "".join(
        f'<{"strong" if counts else "span"} style="{COUNTS if counts else IGNORED};margin-right:1px;white-space:pre-wrap">'
        f"{html.escape(text)}</{'strong' if counts else 'span'}>"
        for text, counts in pieces
    )


def _runs(pieces: tuple[tuple[str, bool], ...]) -> Iterator[tuple[str, bool]]:
    """Pieces that follow each other and count alike, as one."""
    text, counting = "", False
    for piece, counts in pieces:
        if counts != counting and text:
            yield text, counting
            text = ""
        text, counting = text + piece, counts
    if text:
        yield text, counting
