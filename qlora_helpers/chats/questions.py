"""Questions from a file: plain text with one a line, JSONL, or CSV.

A JSONL file has chats in the `messages` form, which end with a question or with the answer to one; or a question a line, as
a JSON text or under the key "question" or "prompt". A CSV file has a column of one of these names, or one column alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.chats.encodings import to_utf8
from qlora_helpers.chats.messages import Chat, ChatError, fault_in
from qlora_helpers.chats.strict_json import decode
from qlora_helpers.chats.tables import csv_records
from qlora_helpers.validation import shown

__all__ = ["Question", "read_questions"]

KEYS = ("question", "prompt")
FORMS = (".txt", ".jsonl", ".csv")
NO_QUESTION = 'neither "messages" nor a text under "question" or "prompt"'
OTHER_FORMS = "To make .jsonl of another form of chats:  python -m qlora_helpers data FILE --to NEW.jsonl"


@dataclass(frozen=True)
class Question:
    """A question from a file.

    Attributes:
        chat: ends with the question.
        line: where it is in the file, from 1. In a CSV file, the last line of its row.
        expected: the answer that the file has to it; None if it has none.
    """

    chat: Chat
    line: int
    expected: str | None = None


def read_questions(path: str | Path, system: str | None = None) -> list[Question]:
    """Read the questions of a file, and check every line. Empty lines are allowed.

    Args:
        path: its ending says what it is: .txt, .jsonl or .csv. Encodings and delimiters are told as for a file of chats
            (`qlora_helpers.chats.read_file`).
        system: a system message for each chat that has none.

    Raises:
        ChatError: bad lines, the first 20 by number and fault, and the number of the others; or no question at all.
        ValueError: another ending.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMS:
        raise ValueError(
            f"{path}: its name must end in one of {', '.join(FORMS)}, which says how it is read. {OTHER_FORMS}"
        )
    try:
        text = to_utf8(path.read_bytes())
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}): name a file of questions") from error
    if text.fault:
        raise ChatError(f"{path}: {text.fault}")
    rows = _rows_of_csv(text.content, path) if path.suffix.lower() == ".csv" else _lines(text.content)
    read = _of_json if path.suffix.lower() == ".jsonl" else _of_text
    questions, faults = [], []
    for number, row in rows:
        try:
            questions.append(read(row, number))
        except ValueError as error:
            faults.append(f"{path}, line {number}: {error}")
    if faults:
        more = f"\n… and {len(faults) - 20} more" if len(faults) > 20 else ""
        cure = f"\n{OTHER_FORMS}" if any(fault.endswith(NO_QUESTION) for fault in faults) else ""
        raise ChatError("\n".join(faults[:20]) + more + cure)
    if not questions:
        raise ChatError(f"{path}: there is no question in this file")
    return [_with_system(question, system) for question in questions]


def _with_system(question: Question, system: str | None) -> Question:
    if system is None or question.chat[0]["role"] == "system":
        return question
    return Question([{"role": "system", "content": system}, *question.chat], question.line, question.expected)


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    # str.splitlines would also split at characters such as U+2028, which are text
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _is_key(name: str) -> bool:
    return name.strip().lower() in KEYS


def _rows_of_csv(content: bytes, path: Path) -> Iterator[tuple[int, str]]:
    """The cells with the questions, each with the last line of its row."""
    try:
        delimiter, records = csv_records(content, _is_key)
    except ChatError as error:
        raise ChatError(f"{path}: {error}") from error
    for line, record in records:
        if isinstance(record, str):
            raise ChatError(f"{path}, line {line}: {record}")
    header = next((record for _, record in records), [])
    column = next((header.index(name) for key in KEYS for name in header if name.strip().lower() == key), None)
    if column is None and len(header) > 1:
        columns = ", ".join(map(shown, header))
        raise ChatError(f"{path} has the columns {columns}: name the one with the questions {KEYS[0]!r}")
    for line, row in records[column is not None :]:  # one column may begin at once
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise ChatError(
                f"{path}, line {line}: it has {len(row)} cells, and the first line has {len(header)}: put a text with "
                f"{delimiter!r} into double quotes"
            )
        yield line, row[column or 0].strip()


def _of_text(text: str, line: int) -> Question:
    return _checked([{"role": "user", "content": text}], line)


def _of_json(text: str, line: int) -> Question:
    row = decode(text)
    if isinstance(row, str):
        return _of_text(row, line)
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return _checked(row["messages"], line)
    found = [row[key] for key in KEYS if isinstance(row, dict) and isinstance(row.get(key), str)]
    if not found:
        raise ChatError(NO_QUESTION)
    return _of_text(found[0], line)


def _checked(chat: Chat, line: int) -> Question:
    """A question.

    Raises:
        ChatError: says what is wrong with it.
    """
    answered = bool(chat) and isinstance(chat[-1], dict) and chat[-1].get("role") == "assistant"
    whole = chat if answered else [*chat, {"role": "assistant", "content": "an answer"}]
    if fault := fault_in({"messages": whole}):
        raise ChatError(fault)
    return Question(whole[:-1], line, chat[-1]["content"] if answered else None)
