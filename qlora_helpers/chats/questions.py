"""Questions from a file: plain text with one a line, JSONL, or CSV.

A JSONL file has chats in the `messages` form, which end with a question or with the answer to one; or a question a line, as
a JSON text or under the key "question" or "prompt". A CSV file has a column of one of these names, or one column alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.chats.messages import Chat, ChatError, fault_in
from qlora_helpers.validation import shown

__all__ = ["Question", "read_questions"]

KEYS = ("question", "prompt")
FORMS = (".txt", ".jsonl", ".csv")


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
    """Read the questions of a file in UTF-8, and check every line. Empty lines are allowed.

    Args:
        path: its ending says what it is: .txt, .jsonl or .csv.
        system: a system message for each chat that has none.

    Raises:
        ChatError: bad lines, the first 20 by number and fault, and the number of the others; or no question at all.
        ValueError: another ending.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMS:
        raise ValueError(f"{path}: its name must end in one of {', '.join(FORMS)}, which says how it is read")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}): name a file of questions") from error
    except UnicodeDecodeError as error:
        raise ChatError(f"{path} is not UTF-8 at byte {error.start + 1}: save it in UTF-8") from error
    rows = _rows_of_csv(text, path) if path.suffix.lower() == ".csv" else _lines(text)
    read = _of_json if path.suffix.lower() == ".jsonl" else _of_text
    questions, faults = [], []
    for number, row in rows:
        question = read(row, number)
        if isinstance(question, str):
            faults.append(f"{path}, line {number}: {question}")
        else:
            questions.append(question)
    if faults:
        more = f"\n… and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ChatError("\n".join(faults[:20]) + more)
    if not questions:
        raise ChatError(f"{path}: there is no question in this file")
    return [_with_system(question, system) for question in questions]


def _with_system(question: Question, system: str | None) -> Question:
    if system is None or question.chat[0]["role"] == "system":
        return question
    return Question([{"role": "system", "content": system}, *question.chat], question.line, question.expected)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # str.splitlines would also split at characters such as U+2028, which are text
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _rows_of_csv(text: str, path: Path) -> Iterator[tuple[int, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        first = next(reader, [])
        header = [name.strip().lower() for name in first]
        column = next((header.index(key) for key in KEYS if key in header), None)
        if column is None:
            if len(header) > 1:
                columns = ", ".join(map(shown, first))
                raise ChatError(f"{path} has the columns {columns}: name the one with the questions {KEYS[0]!r}")
            if header:  # one column, which begins at once
                yield reader.line_num, first[0].strip()
            column = 0
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise ChatError(
                    f"{path}, line {reader.line_num}: it has {len(row)} cells, and the first line has {len(header)}: put a "
                    "text with commas into double quotes"
                )
            yield reader.line_num, row[column].strip()
    except csv.Error as error:
        raise ChatError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _of_text(text: str, line: int) -> Question | str:
    return _checked([{"role": "user", "content": text}], line)


def _of_json(text: str, line: int) -> Question | str:
    """A question, or what is wrong with its line."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if isinstance(row, str):
        return _of_text(row, line)
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return _checked(row["messages"], line)
    found = [row[key] for key in KEYS if isinstance(row, dict) and isinstance(row.get(key), str)]
    return _of_text(found[0], line) if found else 'neither "messages" nor a text under "question" or "prompt"'


def _checked(chat: Chat, line: int) -> Question | str:
    answered = bool(chat) and isinstance(chat[-1], dict) and chat[-1].get("role") == "assistant"
    whole = chat if answered else [*chat, {"role": "assistant", "content": "an answer"}]
    if fault := fault_in({"messages": whole}):
        return fault
    return Question(whole[:-1], line, chat[-1]["content"] if answered else None)
