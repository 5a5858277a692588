"""Rows of a data file, whatever holds them: JSONL, JSON, CSV, TSV, parquet, these in gzip, or a folder of `datasets`.

What holds the rows is told by the content; of a name only the endings .jsonl and .json count, where the content leaves it
open. Nothing is guessed about values: a cell of a CSV is text, also "007" and "NA".
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.chats.encodings import Text, to_utf8
from qlora_helpers.chats.messages import ChatError
from qlora_helpers.chats.strict_json import NotJson, decode_all, decode_bytes, quoted
from qlora_helpers.json_files import read_json

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Table", "csv_records", "read_table"]

READABLE = "JSONL, JSON, CSV, TSV or parquet"
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_OTHERS = {
    b"PK\x03\x04": "a zip file, as an Excel workbook is: save the sheet as CSV in UTF-8, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as CSV in UTF-8",
    b"ARROW1": "an Arrow file: name the folder that datasets' save_to_disk wrote, or save it as parquet",
    b"\xff\xff\xff\xff": "an Arrow stream: name the folder that datasets' save_to_disk wrote, or save it as parquet",
    b"SQLite format 3": "an SQLite database: export the table as CSV",
    b"%PDF": "a PDF",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it first",
    b"BZh": "packed with bzip2: unpack it first",
    b"\xfd7zXZ": "packed with xz: unpack it first",
}
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_BATCH = 1000  # rows that are taken out of Arrow at a time


@dataclass(frozen=True)
class Table:
    """The rows of a file as Python objects, by their number.

    Attributes:
        rows: what each row holds: of a table a dict by column, of JSON whatever is there.
        faults: the rows that could not be taken out of the file, and why.
        row_name: how rows are counted: "line" of a JSONL file; else "row", from 1, without the header of a CSV.
        header: the names of the columns, where a header has them.
        container: what holds them, for a message, such as "CSV, semicolons".
        unread: columns that were not read, since no form has them.
        changed: what was changed in the texts, and how often.
        plain: whether it is a JSONL file in UTF-8.
    """

    rows: dict[int, object] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    row_name: str = "row"
    header: list[str] = field(default_factory=list)
    container: str = ""
    unread: list[str] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)
    plain: bool = False


def read_table(path: Path, known: Callable[[str], bool]) -> Table:
    """Read the rows of a file or of a dataset's folder.

    Args:
        known: whether a form has a column of this name. It tells the delimiter of a CSV, and spares reading others.

    Raises:
        ChatError: the file as a whole cannot be read, with the reason.
        OSError: there is no such file, or it is a folder of another kind.
    """
    if path.is_dir():
        return _dataset(path, known)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise type(error)(f"path={str(path)!r} cannot be read ({error.strerror}): name a file of {READABLE}") from error
    try:
        return _table(content, path.name.lower(), known)
    except ChatError as error:
        raise ChatError(f"path={str(path)!r}: {error}") from error


def _table(content: bytes, name: str, known: Callable[[str], bool]) -> Table:
    if content.startswith(_GZIP):
        table = _table(_unpacked(content), name.removesuffix(".gz"), known)
        return replace(table, container=f"{table.container}, gzip", plain=False)
    for mark, kind in _OTHERS.items():
        if content.startswith(mark):
            raise ChatError(f"this is {kind}")
    if content.startswith(_PARQUET):
        return _parquet(content, known)
    text = to_utf8(content)
    if text.fault and text.encoding != "UTF-8":  # else each line of JSONL gets its own fault
        raise ChatError(text.fault)
    if not text.content.strip():
        raise ChatError(f"there is no chat in this file: it is empty. Name a file of {READABLE}")
    lines = name.endswith((".jsonl", ".ndjson"))
    if lines or name.endswith(".json") or text.content.lstrip()[:1] in (b"{", b"["):
        table = _json(text, lines, known)
    else:
        table = _delimited(text, known)
    if text.encoding != "UTF-8":
        as_in = f' as in "{text.example}"' if text.example else ""
        table = replace(table, container=f"{table.container}, {text.encoding}{as_in}", plain=False)
    return table


def _unpacked(content: bytes) -> bytes:
    try:
        unpacked = gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ChatError(f"its gzip is damaged ({error})") from error
    if unpacked.startswith(_GZIP):
        raise ChatError("it is packed with gzip twice: unpack it first")
    return unpacked


# JSON


def _json(text: Text, is_jsonl: bool, known: Callable[[str], bool]) -> Table:
    """JSONL if the first line is a value and others follow; else all of it is one value, or one after another."""
    # as bytes: str.splitlines would also split at characters such as U+2028, which JSON allows inside a string
    lines = text.content.split(b"\n" if b"\n" in text.content else b"\r")
    filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
    if len(filled) > 1 and _is_json(lines[filled[0] - 1]):
        return _json_lines(lines)
    if text.fault:
        if is_jsonl:
            return _json_lines(lines)
        raise ChatError(text.fault)
    try:
        values = decode_all(text.content.decode("utf-8"))
    except NotJson as error:
        if is_jsonl:
            return _json_lines(lines)
        raise ChatError(str(error)) from error
    if len(values) > 1:
        return Table(dict(enumerate(values, start=1)), container="JSON, one object after another")
    if isinstance(values[0], dict):
        if inner := _key_of_rows(values[0], known):
            return Table(dict(enumerate(values[0][inner], start=1)), container=f"JSON, under {quoted(inner)}")
        if len(filled) == 1:
            return _json_lines(lines)
    if values[0] == []:
        raise ChatError("there is no row in it")
    if isinstance(values[0], list):
        return Table(dict(enumerate(values[0], start=1)), container="JSON")
    return Table({1: values[0]}, container="JSON")


def _is_json(line: bytes) -> bool:
    try:
        decode_bytes(line)
    except NotJson:
        return False
    return True


def _json_lines(lines: list[bytes]) -> Table:
    table = Table(row_name="line", container="JSONL", plain=True)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                table.rows[number] = decode_bytes(line)
            except NotJson as error:
                table.faults[number] = str(error)
    return table


def _key_of_rows(value: dict, known: Callable[[str], bool]) -> str | None:
    """The key of an object that holds all rows, as in {"data": [...]}; None if the object is itself a row.

    Raises:
        ChatError: several keys hold rows; or the keys are columns, as pandas' to_json writes them.
    """
    if len(value) > 1 and all(isinstance(column, dict | list) and column for column in value.values()):
        firsts = [next(iter(column.values() if isinstance(column, dict) else column)) for column in value.values()]
        if any(map(known, value)) and not any(isinstance(first, dict) for first in firsts):
            raise ChatError(
                "it is one object of columns: write an object for each row, with pandas by "
                "to_json(…, orient='records', lines=True)"
            )
    if any(map(known, value)):
        return None
    of_rows = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    of_rows = [key for key in of_rows if not {"role", "from"} & value[key][0].keys()]
    if len(of_rows) > 1:
        raise ChatError(
            f"it holds rows under several keys ({', '.join(map(quoted, of_rows))}): write one of them to a file of its own"
        )
    return of_rows[0] if of_rows else None


# CSV


def _delimited(text: Text, known: Callable[[str], bool]) -> Table:
    if text.fault:
        raise ChatError(text.fault)
    delimiter, records = csv_records(text.content, known)
    kind = "TSV" if delimiter == "\t" else f"CSV, {DELIMITERS.get(delimiter, repr(delimiter))}"
    return _csv_table([record for _, record in records], kind, delimiter)


def csv_records(content: bytes, known: Callable[[str], bool]) -> tuple[str, list[tuple[int, list[str] | str]]]:
    """The delimiter of a table, and its records that are not empty lines, each with the line in which it ends.

    A record that cannot be read is the reason, as a text.

    Args:
        content: in UTF-8.
        known: as in `read_table`.

    Raises:
        ChatError: it is no text file.
    """
    if place := content.find(b"\0") + 1:
        raise ChatError(f"byte {place} is NUL, so it is no text file: name a file of {READABLE}")
    old_limit = csv.field_size_limit(2**31 - 1)  # by default a cell has at most 128 KiB
    try:
        if named := re.match(
            rb"\s*sep=([!-~\t ])[ ]*[\r\n]", content, re.IGNORECASE
        ):  # Excel's own line, which is no row
            delimiter = named[1].decode("ascii")
            return delimiter, list(_records(content[named.end() :], delimiter, content.count(b"\n", 0, named.end())))
        delimiter = max(DELIMITERS, key=lambda sign: _names_found(content, sign, known))
        return delimiter, list(_records(content, delimiter))
    finally:
        csv.field_size_limit(old_limit)


def _records(content: bytes, delimiter: str, lines_before: int = 0) -> Iterator[tuple[int, list[str] | str]]:
    lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                record = "a text begins with a quote that never ends"
            else:
                record = f'a quote inside a quoted text is not doubled, as in "she said ""no""" ({error})'
        if record:
            yield lines_before + reader.line_num, record


def _names_found(content: bytes, delimiter: str, known: Callable[[str], bool]) -> tuple[int, int]:
    """How many names of columns the header has with this delimiter: those known, and all."""
    _, header = next(_records(content, delimiter), (0, []))
    return (sum(map(known, header)), len(header)) if isinstance(header, list) else (0, 0)


def _csv_table(records: list[list[str] | str], kind: str, delimiter: str) -> Table:
    header, *records = records or [[]]
    if isinstance(header, str):
        raise ChatError(f"its header cannot be read: {header}")
    names = [name.strip() or f"column {place}" for place, name in enumerate(header, start=1)]
    _check_names(names)
    table = Table(header=names, container=kind)
    for number, record in enumerate(records, start=1):
        if isinstance(record, str):
            table.faults[number] = record
        elif not any(record):
            table.changed["empty row was left out"] += 1
        elif len(record) != len(names):
            table.faults[number] = (
                f"the header has {len(names)} columns, and this row {len(record)}: put a text with {delimiter!r} or a line break in "
                "it into quotes"
            )
        elif any(cell[0:1] == " " and cell.lstrip().startswith('"') for cell in record):
            table.faults[number] = "a quoted text begins with a space before its quote: leave out the space"
        else:
            if any("\r\n" in cell for cell in record):
                table.changed[r"line end \r\n in a text became \n"] += sum("\r\n" in cell for cell in record)
                record = [cell.replace("\r\n", "\n") for cell in record]
            table.rows[number] = dict(zip(names, record, strict=True))
    if not table.rows and not table.faults:
        raise ChatError(f"there is no row below its header ({', '.join(map(quoted, names[:20]))})")
    return table


def _check_names(names: list[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ChatError(f"the column {quoted(twice[0])} is there twice: rename or remove one")


# Arrow: parquet, and the folders of datasets


def _parquet(content: bytes, known: Callable[[str], bool]) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        _check_names(file.schema_arrow.names)
        wanted, unread = _wanted(file.schema_arrow, known)
        table = _arrow_table(file.iter_batches(_BATCH, columns=wanted) if wanted else (), "parquet")
        if not file.metadata.num_rows:
            raise ChatError("there is no row in it")
    except (pyarrow.ArrowException, OSError) as error:
        raise ChatError(f"its parquet cannot be read ({str(error).splitlines()[0]})") from error
    return replace(table, unread=unread)


def _wanted(schema: pyarrow.Schema, known: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The columns that a form may have, by their name or as a list of objects; and the others."""
    from pyarrow import types

    def may_hold_a_chat(column: pyarrow.Field) -> bool:
        of_items = types.is_list(column.type) or types.is_large_list(column.type)
        return known(column.name) or (of_items and types.is_struct(column.type.value_type))

    wanted = [column.name for column in schema if may_hold_a_chat(column)]
    return wanted, [name for name in schema.names if name not in wanted]


def _arrow_table(batches: Iterable, container: str) -> Table:
    table, first = Table(container=container), 1
    for batch in batches:
        try:
            table.rows.update(enumerate(batch.to_pylist(), start=first))
        except (ValueError, OverflowError):  # such as a text that is not UTF-8
            for place in range(batch.num_rows):
                try:
                    (table.rows[first + place],) = batch.slice(place, 1).to_pylist()
                except (ValueError, OverflowError) as error:
                    table.faults[first + place] = f"it cannot be read ({error})"
        first += batch.num_rows
    return table


def _dataset(folder: Path, known: Callable[[str], bool]) -> Table:
    container, named = "dataset folder", f"path={str(folder)!r}"
    if (folder / "dataset_dict.json").is_file():
        splits = _splits(folder)
        if len(splits) > 1:
            raise ChatError(
                f"{named} is a dataset of several splits ({', '.join(splits)}): name the folder of one, such as "
                f"{str(folder / splits[0])!r}"
            )
        folder, container = folder / splits[0], f"dataset folder, split {splits[0]}"
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        inside = next((file for file in sorted(folder.iterdir()) if file.suffix.lower() in _ENDINGS), None)
        raise IsADirectoryError(
            f"{named} cannot be read (it is a folder, but not one that datasets' save_to_disk wrote): name a file of {READABLE}"
            + (f", such as {str(inside)!r}" if inside else "")
        )
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder)).with_format("arrow")
        wanted, unread = _wanted(dataset.data.schema, known)
        table = _arrow_table(dataset.select_columns(wanted).iter(_BATCH) if wanted else (), container)
        rows = len(dataset)
    except Exception as error:  # damaged files fail in many ways, as they are read by many parts of the library
        raise ChatError(f"{named}: this dataset cannot be read ({type(error).__name__}: {error})") from error
    if not rows:
        raise ChatError(f"{named}: there is no row in it")
    return replace(table, unread=unread)


def _splits(folder: Path) -> list[str]:
    try:
        splits = read_json(folder / "dataset_dict.json").get("splits")
    except ValueError as error:
        raise ChatError(f"path={str(folder)!r}: its dataset_dict.json {error}") from error
    if not (isinstance(splits, list) and splits and all(isinstance(name, str) for name in splits)):
        raise ChatError(f"path={str(folder)!r}: its dataset_dict.json names no splits")
    return splits
