"""The chats of a run of the command line: which are trained on, which are watched meanwhile, which are asked afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.chats import (
    Chat,
    fit_to_length,
    lengths_of,
    read_file,
    said_of_the_dropped,
    tokenized,
)
from qlora_helpers.chats.split import split
from qlora_helpers.chats.words import warning_of_spelling
from qlora_helpers.commands.run_request import SUGGESTED, Request
from qlora_helpers.paths import data_path
from qlora_helpers.suggestions import validation_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MOST_ASKED", "RunData", "read_run_data"]

MOST_ASKED = 200  # answering takes longer than training: of more validation chats so many are asked


@dataclass(frozen=True)
class RunData:
    """The chats of a run.

    Attributes:
        training: those that are trained on.
        validation: those whose loss is measured while training; [] for none.
        asked: those whose questions are asked before and after training.
        longest: of all, in tokens of the chat template.
        answer_tokens: of the training chats: those that count in the loss.
        described: the files, and what became of their rows, for the report.
    """

    training: list[Chat]
    validation: list[Chat]
    asked: list[Chat]
    longest: int
    answer_tokens: int
    described: dict[str, Any] = field(default_factory=dict)


def read_run_data(request: Request, tokenizer: PreTrainedTokenizerBase, max_length: int | None, seed: int) -> RunData:
    """Read the chats of a run, say what was found, and hold some of them out.

    Args:
        max_length: in tokens; None for any length.
        seed: decides which chats are held out, if a share is.

    Raises:
        ChatError, ValueError, OSError: a file cannot be read; or, with the rules of the request, not as it is.
    """
    if request.data is None:
        training = read_file(data_path("chats", "train.jsonl"), tokenizer, max_length).chats
        described: dict[str, Any] = {}
    else:
        training, described = _read(request.data, request, tokenizer, max_length)
        if warning := warning_of_spelling(training, tokenizer):
            print(f"warning: {warning}")
    held_out: list[Chat] = []
    if request.validation == SUGGESTED:
        training, held_out = _split(training, validation_rows(len(training)) / len(training), seed)
    elif isinstance(request.validation, str):
        held_out, of_file = _read(request.validation, request, tokenizer, max_length)
        described |= {name.replace("data_", "validation_"): value for name, value in of_file.items()}
    elif request.validation is not None:
        training, held_out = _split(training, request.validation, seed)
    if request.data is None:  # about people whom no training chat mentions
        asked = read_file(data_path("chats", "test.jsonl"), tokenizer).chats
    else:
        asked = held_out[:MOST_ASKED]
    longest = max(lengths_of([*training, *held_out], tokenizer))
    answer_tokens = sum(sum(row["assistant_masks"]) for row in tokenized(training, tokenizer))
    described |= {
        "data_rows": len(training),
        "data_answer_tokens": answer_tokens,
        "longest_chat": longest,
        "validation_rows": len(held_out),
        "test_rows": len(asked),
    }
    return RunData(training, held_out, asked, longest, answer_tokens, described)


def _read(path: str, request: Request, tokenizer, max_length: int | None) -> tuple[list[Chat], dict[str, Any]]:
    """The chats of a file by the rules of the request, and what became of its rows, which is also printed."""
    file = read_file(path, tokenizer, form=request.form, on_bad=request.on_bad)
    print(file.said)
    if file.dropped:
        print(said_of_the_dropped(file))
    described = {"data_file": Path(path).name, "data_form": file.form, "data_dropped": len(file.dropped)}
    described |= {"data_changed": file.changed}
    if max_length is None:
        return file.chats, described
    chats, fitted = fit_to_length(file.chats, tokenizer, max_length, request.too_long)
    if fitted.cut or fitted.dropped:
        print(fitted.said)
    counts = {"data_cut": len(fitted.cut), "data_too_long": len(fitted.dropped)}
    return chats, described | counts


def _split(chats: list[Chat], share: float, seed: int) -> tuple[list[Chat], list[Chat]]:
    if len(chats) < 2:
        raise ValueError("--data: a single chat cannot be held out and trained on. To train without: --validation none")
    try:
        training, held_out = split(chats, share, seed)
    except ValueError as error:
        raise ValueError(f"--validation: {error}. Or train without: --validation none") from None
    print(
        f"{len(held_out):,} of the {len(chats):,} chats are held out for validation; {len(training):,} are trained on."
    )
    return training, held_out
