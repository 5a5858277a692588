"""The chats of a run of the command line: which are trained on, which are watched meanwhile, which are asked afterwards."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.chats import (
    Chat,
    ChatError,
    ChatFile,
    fit_to_length,
    read_file,
    said_of_the_dropped,
    tokenized,
    warning_of_spelling,
)
from qlora_helpers.chats.files import without
from qlora_helpers.chats.split import split
from qlora_helpers.chats.templates import CHUNK, mark
from qlora_helpers.chats.tokens import faults_for, too_long_fault
from qlora_helpers.commands.reading_options import read_and_say, settled
from qlora_helpers.commands.run_request import SUGGESTED, Request
from qlora_helpers.paths import data_path
from qlora_helpers.suggestions import validation_rows
from qlora_helpers.validation import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MOST_ASKED", "RunData", "read_run_data"]

WIDTH = 100  # columns of a warning
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
    if request.too_long != "stop" and max_length is None:
        raise ValueError(
            f"--too-long={request.too_long}: how many tokens this model takes is not known. Say how many a chat may have "
            "with --max-length"
        )
    if request.data is None:
        training = read_file(data_path("chats", "train.jsonl"), tokenizer).chats
        described: dict[str, Any] = {}
    else:
        training, described = _read(request.data, request, tokenizer, max_length)
        if warning := warning_of_spelling(training, tokenizer):
            print(textwrap.fill(f"Warning: {warning}.", WIDTH))
            described["data_warning"] = warning
    held_out: list[Chat] = []
    if request.validation == SUGGESTED:
        training, held_out = _split(training, validation_rows(len(training)) / len(training), seed)
    elif isinstance(request.validation, str):
        held_out, of_file = _read(request.validation, request, tokenizer, max_length, second=True)
        described |= {name.replace("data_", "validation_"): value for name, value in of_file.items()}
    elif request.validation is not None:
        training, held_out = _split(training, request.validation, seed)
    if request.data is None:  # about people whom no training chat mentions
        asked = read_file(data_path("chats", "test.jsonl"), tokenizer).chats
    else:
        asked = held_out[:MOST_ASKED]
    longest, answer_tokens = _counted(training, tokenizer)
    longest_held_out, _ = _counted(held_out, tokenizer)
    longest = max(longest, longest_held_out)
    # of the shipped chats; those of files are refused before, with their rows
    if max_length is not None and longest > max_length:
        raise refuse("max_length", max_length, f"the longest training chat has {longest} tokens. Raise it")
    described |= {
        "data_rows": len(training),
        "data_answer_tokens": answer_tokens,
        "longest_chat": longest,
        "validation_rows": len(held_out),
        "test_rows": len(asked),
    }
    return RunData(training, held_out, asked, longest, answer_tokens, described)


def _read(
    path: str, request: Request, tokenizer, max_length: int | None, second: bool = False
) -> tuple[list[Chat], dict[str, Any]]:
    """The chats of a file by the rules of the request, and what became of its rows, which is also printed.

    Args:
        second: it is the validation file.
    """
    file = read_and_say(path, request.form, request.on_bad, second)
    file = settled(file, faults_for(tokenizer, _by_row(file), None), request.on_bad)
    lengths, faults = {}, {}
    for part in _parts(_by_row(file)):
        marked, unmarked = mark(part, tokenizer)
        lengths |= {row: len(tokens["input_ids"]) for row, tokens in marked.items()}
        faults |= unmarked
    file = settled(file, faults, request.on_bad)
    if file.dropped:
        print(said_of_the_dropped(file))
    described = {"data_file": Path(path).name, "data_form": file.form, "data_dropped": len(file.dropped)}
    described |= {"data_changed": file.changed}
    if max_length is None:
        return file.chats, described
    if request.too_long == "stop":
        _refuse_too_long(file, lengths, max_length, named="max_length" in request.settings)
        return file.chats, described | {"data_cut": 0, "data_too_long": 0}
    chats, fitted = fit_to_length(file.chats, tokenizer, max_length, request.too_long)
    if fitted.cut or fitted.dropped:
        cut, dropped = ({file.rows[n - 1]: what for n, what in those.items()} for those in (fitted.cut, fitted.dropped))
        print(replace(fitted, cut=cut, dropped=dropped, name=file.row_name).said)
    return chats, described | {"data_cut": len(fitted.cut), "data_too_long": len(fitted.dropped)}


def _by_row(file: ChatFile) -> dict[int, Chat]:
    return dict(zip(file.rows, file.chats, strict=True))


def _parts(chats: dict[int, Chat]) -> Iterator[dict[int, Chat]]:
    """A part of the chats at a time, since their tokens take much more memory than their text."""
    numbers = list(chats)
    for start in range(0, len(numbers), CHUNK):
        yield {number: chats[number] for number in numbers[start : start + CHUNK]}


def _refuse_too_long(file: ChatFile, lengths: dict[int, int], max_length: int, named: bool) -> None:
    """Stop at chats that are too long, with the rows of their file.

    Args:
        named: whether the command line says how long they may be.
    """
    faults = {row: too_long_fault(length, max_length) for row, length in lengths.items() if length > max_length}
    try:
        without(replace(file, dropped={}), faults)
    except ChatError as error:
        why = "" if named else "Without --max-length, max_length is what the model takes. "
        raise ChatError(
            f"{error}\n{why}To leave such chats out, or to shorten their questions: --too-long drop, --too-long cut-question"
        ) from error


def _counted(chats: list[Chat], tokenizer) -> tuple[int, int]:
    """The tokens of the longest chat, and those of all answers."""
    longest = answer_tokens = 0
    for part in _parts(dict(enumerate(chats))):
        for row in tokenized(list(part.values()), tokenizer):
            longest = max(longest, len(row["input_ids"]))
            answer_tokens += sum(row["assistant_masks"])
    return longest, answer_tokens


def _split(chats: list[Chat], share: float, seed: int) -> tuple[list[Chat], list[Chat]]:
    cure = "Name a file with --validation, or train without: --validation none"
    if len(chats) == 1:
        raise ValueError(f"--data has one chat that can be used, so none can be held out for validation. {cure}")
    try:
        training, held_out = split(chats, share, seed)
    except ValueError as error:
        raise ValueError(f"--validation: {error}. {cure}") from None
    print(
        f"{len(held_out):,} of the {len(chats):,} chats {'is' if len(held_out) == 1 else 'are'} held out for validation; "
        f"{len(training):,} {'is' if len(training) == 1 else 'are'} trained on."
    )
    return training, held_out
