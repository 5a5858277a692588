"""Read and check chat data from a file, in the forms in which people have it.

What the course writes is JSONL, one chat per line, in the `messages` format:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

`tables` knows what else can hold rows, and `forms` how else a row can be written. Every row is checked. By default a file
with a bad one is refused as a whole: the error names the first 20 bad rows by number, each with its first fault, and counts
the others. Nothing is dropped, changed or left unread silently.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.chats.forms import FORMS, Reading, columns_of, convert, detect, known, read_json_cells
from qlora_helpers.chats.messages import Chat, ChatError
from qlora_helpers.chats.strict_json import quoted
from qlora_helpers.chats.tables import Table, read_table
from qlora_helpers.chats.tokens import faults_for
from qlora_helpers.json_files import write_new

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ON_BAD", "ChatFile", "read_chats", "read_file", "said_of_the_dropped", "without", "write_chats"]

ON_BAD = ("stop", "drop")
NAMED = 20  # bad rows in an error
_IN_A_LINE = 8  # columns, or kinds of changes, that one line names


@dataclass(frozen=True)
class ChatFile:
    """What was read from a file.

    Attributes:
        path: the file.
        chats: each a list of messages.
        rows: the number of each chat in the file, counted from 1: its line in JSONL, else its row (without a header).
        row_name: "line" or "row".
        form: the form of the file, one of "messages", "alpaca", "sharegpt", "prompt-completion", "question-answer".
        said: one line: what was found, and what became what.
        dropped: the rows that are left out, by number, each with its first fault.
        changed: what was changed in the chats, such as "developer became system", and how often.
        plain: whether it is JSONL in UTF-8 in the `messages` format, and was taken as it is.
    """

    path: Path
    chats: list[Chat]
    rows: list[int]
    row_name: str
    form: str
    said: str
    dropped: dict[int, str] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    plain: bool = False

    @property
    def counted(self) -> str:
        """How its rows are counted, where that is not what a spreadsheet shows; else ""."""
        return "rows are counted without the header" if {".csv", ".tsv"}.intersection(self.path.suffixes) else ""

    def kinds_of_faults(self) -> list[tuple[int, int, str]]:
        """The faults of the rows left out, the commonest first: how many rows, the first of them, and its fault.

        Faults that differ only in numbers, or in a value that they quote, are one kind.
        """
        rows: dict[str, list[int]] = {}
        for number, fault in self.dropped.items():
            rows.setdefault(_kind(fault), []).append(number)
        kinds = sorted(
            ((len(numbers), min(numbers)) for numbers in rows.values()), key=lambda kind: (-kind[0], kind[1])
        )
        return [(count, first, self.dropped[first]) for count, first in kinds]


def read_chats(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    *,
    form: str | None = None,
    on_bad: str = "stop",
) -> list[Chat]:
    """Read a chat file and check every row.

    One line says what was found, unless the file is JSONL in the `messages` format and every chat of it was taken.

    Args:
        path, tokenizer, max_length, form, on_bad: as in `read_file`, which also gives the number of each chat in the file.

    Returns:
        The chats, each a list of messages.

    Raises:
        ChatError, ValueError, OSError: as `read_file` does.
    """
    file = read_file(path, tokenizer, max_length, form=form, on_bad=on_bad)
    if not file.plain:
        print(file.said)
    if file.dropped:
        print(said_of_the_dropped(file))
    return file.chats


def read_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    *,
    form: str | None = None,
    on_bad: str = "stop",
) -> ChatFile:
    """Read a file of chats in any form, and check every row.

    Args:
        path: a file of JSONL, JSON, CSV, TSV or parquet, in gzip or not; or a folder that `datasets` saved. Text is in
            UTF-8, or in UTF-16 with its mark, or plainly in Windows-1252. Empty lines are allowed.
        tokenizer: with it, three more things are faults: a special token that is typed into a message, a chat that the
            chat template refuses, and one that is too long.
        max_length: in tokens. A longer chat is a fault, since the trainer would cut its answer.
        form: "messages", "alpaca", "sharegpt", "prompt-completion" or "question-answer"; None to tell it by the names of
            the columns, which is an error where two are possible.
        on_bad: "stop" to refuse a file with a bad row, "drop" to leave such rows out.

    Raises:
        ChatError: bad rows, the first 20 of them by file, number and first fault, and the number of the others; with
            "drop", only if no row is good. Or the file as a whole cannot be read, or has no form that is known.
        FormLeftOpen: its columns fit more than one form. It is a ChatError.
        ValueError: `max_length` without a tokenizer, or not a positive whole number; `form` or `on_bad` is unknown; or the
            tokenizer has no chat template.
        OSError: the file cannot be read.
    """
    if max_length is not None and tokenizer is None:
        raise ValueError(f"max_length={validation.shown(max_length)} is counted in tokens: pass the tokenizer too")
    if max_length is not None:
        max_length = validation.whole("max_length", max_length, otherwise="None for any length")
    if form is not None:
        form = validation.one_of("form", form, FORMS, otherwise="None to tell it by the columns")
    on_bad = validation.one_of("on_bad", on_bad, ON_BAD)

    file = _read(Path(path), form)
    faults = faults_for(tokenizer, dict(zip(file.rows, file.chats, strict=True)), max_length) if tokenizer else {}
    return without(file, faults, on_bad)


def without(file: ChatFile, faults: dict[int, str], on_bad: str = "stop") -> ChatFile:
    """A file without the rows in which more faults were found.

    Raises:
        ChatError: there is a bad row, these or one of those that were dropped before; with on_bad="drop", only if no row
            is good. It names the first 20 of them.
    """
    faults = dict(sorted((file.dropped | faults).items()))
    good = {number: chat for number, chat in zip(file.rows, file.chats, strict=True) if number not in faults}
    if faults and (on_bad == "stop" or not good):
        lines = [f"{file.path}, {file.row_name} {number}: {fault}" for number, fault in faults.items()]
        more = f"\n… and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        raise ChatError("\n".join(lines[:NAMED]) + more)
    return replace(file, chats=list(good.values()), rows=list(good), dropped=faults)


def _read(path: Path, form: str | None) -> ChatFile:
    """A file as it is read, with no row that is good or with some."""
    table = read_table(path, known)
    if cells := read_json_cells(table.rows, table.faults):
        table.changed["list of messages was read from JSON in a cell"] += cells
    columns = columns_of(table.rows.values(), table.header)
    if not columns.filled and not table.unread and (table.faults or table.plain) and form is None:
        reading = Reading("messages", {"messages": "messages"}, {})  # so that each line gets its own fault
    else:
        try:
            reading = detect(columns, form, table.unread)
        except ChatError as error:
            raise type(error)(f"path={str(path)!r}: {error}") from error
    chats, faults, changed = _converted(table, reading)
    used = {*reading.columns.values(), *reading.refused}
    unused = {name: count for name, count in columns.filled.items() if count and name not in used}
    unused |= dict.fromkeys(table.unread, len(table.rows))
    said = f"{path.name or path.resolve().name}: {_rows(len(table.rows | table.faults))} of {reading.form} ({table.container})"
    if what := list(filter(None, (reading.said(), _not_used(unused), _counted(changed)))):
        said += f": {'; '.join(what)}"
    plain = table.plain and reading.form == "messages" and not reading.said() and not changed
    return ChatFile(
        path, list(chats.values()), list(chats), table.row_name, reading.form, said, faults, dict(changed), plain
    )


def _converted(table: Table, reading: Reading) -> tuple[dict[int, Chat], dict[int, str], Counter[str]]:
    """The chats and the faults by row; and what was changed in the chats."""
    chats, faults, changed = {}, dict(table.faults), table.changed.copy()
    for number, row in table.rows.items():
        changes: list[str] = []
        try:
            chats[number] = convert(row, reading, changes)
        except ChatError as error:
            faults[number] = str(error)
        else:
            changed.update(changes)
    return chats, faults, changed


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


def _some(parts: list[str]) -> str:
    more = f" and {len(parts) - _IN_A_LINE} more" if len(parts) > _IN_A_LINE else ""
    return ", ".join(parts[:_IN_A_LINE]) + more


def _not_used(unused: dict[str, int]) -> str:
    return (
        f"not used: {_some([f'{quoted(name)} ({_rows(count)})' for name, count in unused.items()])}" if unused else ""
    )


def _counted(changed: Counter[str]) -> str:
    return _some([f"{what} ({count:,} time{'s' * (count != 1)})" for what, count in changed.most_common()])


def _kind(fault: str) -> str:
    """A fault without its numbers and the values that it quotes."""
    return re.sub(r"\d[\d,.]*", "0", re.sub(r"'[^']*'", "''", fault))


def said_of_the_dropped(file: ChatFile) -> str:
    """Which rows were left out of a file: a line for all, and one for each kind of fault."""
    are = "is" if len(file.dropped) == 1 else "are"
    counted = f" ({file.counted})" if file.counted else ""
    lines = [f"{_rows(len(file.dropped))} of {file.path.name} cannot be used, and {are} left out{counted}:"]
    kinds = file.kinds_of_faults()
    for count, first, fault in kinds[:NAMED]:
        lines.append(f"  {_rows(count)}{', such as' if count > 1 else ':'} {file.row_name} {first}: {fault}")
    if len(kinds) > NAMED:
        more = len(kinds) - NAMED
        lines.append(f"  … and {more} more kind{'s' * (more > 1)} of fault")
    return "\n".join(lines)


def write_chats(path: str | Path, chats: list[Chat]) -> None:
    """Write chats as JSONL in UTF-8, in the `messages` format. `read_chats` gives the same chats again.

    The file appears complete or not at all, and never in place of another.

    Raises:
        FileExistsError: there is something under this name.
        OSError: it cannot be written.
    """
    lines = (json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
    write_new(Path(path), (line.encode("utf-8") for line in lines))
