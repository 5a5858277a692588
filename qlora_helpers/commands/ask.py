"""`python -m qlora_helpers ask`: one question, or a file of them, to what a run has trained. For scripts."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.adapters.tuned import LATEST, load_tuned
from qlora_helpers.chats.questions import Question, read_questions
from qlora_helpers.commands.answer_options import add_answer_options, checked_decoding
from qlora_helpers.visible import harmless

if TYPE_CHECKING:
    from qlora_helpers.conversation import Answer

__all__ = ["add_arguments", "command"]

Write = Callable[[str], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Ask what a run has trained. Standard output has the answers alone; remarks go to standard error. Each question is "
        "asked by itself, without the others."
    )
    add_answer_options(parser)
    parser.add_argument(
        "question",
        metavar="QUESTION",
        nargs="*",
        help="one question; several words are joined by blanks. In quotation marks, it may also stand alone",
    )
    parser.add_argument(
        "--file",
        type=Path,
        help="ask the questions of a file: .txt (one a line), .jsonl (chats, or one question a line) or .csv (with a column "
        "question)",
    )
    parser.add_argument(
        "--to", type=Path, metavar="ANSWERS", help="write JSON lines to this new file, as --json prints them"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print each answer as a line of JSON: line (of --file), question, answer, cut_off, and expected, where the file "
        "has the right answer",
    )
    parser.add_argument("--base", action="store_true", help="ask the base, without the adapter")
    parser.add_argument(
        "--batch-size",
        metavar="N",
        default="8",
        help="how many questions are answered at a time (default: 8); fewer need less memory",
    )


def command(args: argparse.Namespace) -> int:
    """Answer, and return 0.

    Raises:
        ValueError, OSError: an option, a question or the file has a fault, or there is nothing to load; the message says
            what.
    """
    batch_size = validation.whole(
        "--batch-size", int(args.batch_size) if args.batch_size.isdecimal() else args.batch_size
    )
    if not args.question and not args.file and len(args.adapter.split()) > 1 and not Path(args.adapter).exists():
        args.question, args.adapter = [args.adapter], str(LATEST)  # several words, so it is no folder that is mistyped
    if args.question and args.file:
        raise ValueError("--file: pass a question or a file of questions, not both")
    if not args.question and not args.file:
        raise ValueError("there is no question: put one behind the folder, or name a file with --file")
    decoding = checked_decoding(args, base=args.base)
    if args.to:
        _check_new(args.to)
    if args.file:
        questions = read_questions(args.file, args.system)
    else:
        system = [{"role": "system", "content": args.system}] if args.system else []
        questions = [Question([*system, {"role": "user", "content": " ".join(args.question)}], line=1)]
        if not questions[0].chat[-1]["content"].strip():
            raise ValueError("question='': must be a text")
    print("Loading the libraries …", file=sys.stderr, flush=True)
    from qlora_helpers.conversation import answers

    model, tokenizer, found = load_tuned(args.adapter, args.model)
    print(f"This is {harmless(str(found))}.", file=sys.stderr, flush=True)
    try:
        replies = answers(model, tokenizer, [question.chat for question in questions], decoding, batch_size, args.base)
    except ValueError as error:
        raise ValueError(_in_the_file(str(error), questions, args.file)) from error
    if len(questions) > 1 and (args.to or not sys.stdout.isatty()):  # else the answers themselves are seen
        replies = _counted(replies, len(questions))
    pairs = zip(questions, replies, strict=True)
    if args.to:
        with _new_file(args.to) as write:
            cut = _write_json(pairs, args.file is not None, write, ensure_ascii=False)
        print(
            f"{len(questions)} {'answer is' if len(questions) == 1 else 'answers are'} in {args.to}.", file=sys.stderr
        )
    elif args.json:
        cut = _write_json(pairs, args.file is not None, _print)  # ASCII, whatever the encoding of the output is
    else:
        cut = _print_plainly(pairs, numbered=len(questions) > 1)
    if cut:
        print(
            f"{cut} of {len(questions)} answers cut off; --max-new-tokens sets how long they may be.",
            file=sys.stderr,
        )
    return 0


def _in_the_file(said: str, questions: list[Question], file: Path | None) -> str:
    """An error of `answers`, with the line of the file instead of the number of the chat."""
    if not (found := re.match(r"chat (\d+)(:?)", said)):
        return said
    where = f"{file}, line {questions[int(found[1]) - 1].line}" if file else "the question"
    return f"{where}{found[2]}{said[found.end() :]}"


def _counted(replies: Iterator[Answer], count: int) -> Iterator[Answer]:
    """The answers, with a bar on standard error if that is a terminal."""
    from tqdm import tqdm

    return iter(tqdm(replies, total=count, unit="answer", disable=None))


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _print_plainly(pairs: Iterator[tuple[Question, Answer]], numbered: bool) -> int:
    """Print the answers; returns how many were cut off."""
    cut = 0
    for number, (question, answer) in enumerate(pairs, start=1):
        if numbered:
            blank = "\n" if number > 1 else ""
            _print(f"{blank}[{number}] {harmless(question.chat[-1]['content'])}\n")
        _print(f"{harmless(answer.text)}\n")
        cut += answer.cut_off
    return cut


def _write_json(
    pairs: Iterator[tuple[Question, Answer]], with_line: bool, write: Write, ensure_ascii: bool = True
) -> int:
    """Write each answer as a line of JSON; returns how many were cut off."""
    cut = 0
    for question, answer in pairs:
        row = {
            **({"line": question.line} if with_line else {}),
            "question": question.chat[-1]["content"],
            "answer": answer.text,
            "cut_off": answer.cut_off,
            **({} if question.expected is None else {"expected": question.expected}),
        }
        write(json.dumps(row, ensure_ascii=ensure_ascii) + "\n")
        cut += answer.cut_off
    return cut


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _check_new(path: Path) -> None:
    """Refuse a file that is there, or that cannot be written.

    Raises:
        OSError: the message says which.
    """
    for file in (path, _part_of(path)):
        if file.exists():
            raise FileExistsError(f"--to={str(path)!r}: {file} is there already: name a new file, or move it away")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--to={str(path)!r}: there is no folder {path.parent}: make it first")


@contextmanager
def _new_file(path: Path) -> Iterator[Write]:
    """A file that gets its name when it is complete. What was answered until an interrupt stays, as `.part`."""
    part = _part_of(path)
    try:
        file = part.open("x", encoding="utf-8")
    except OSError as error:
        raise type(error)(f"--to={str(path)!r} cannot be written ({error.strerror}): name another file") from error
    count = 0

    def write(text: str) -> None:
        nonlocal count
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            raise type(error)(
                f"--to={str(path)!r} cannot be written ({error.strerror}): free some space, or name a file on another disk"
            ) from error
        count += 1

    try:
        with file:
            yield write
        _check_free(path)
        os.replace(part, path)
    except BaseException:
        if count:
            some = "answer is" if count == 1 else f"{count} answers are"
            print(f"\nThe first {some} in {part}.", file=sys.stderr)
        else:
            part.unlink()
        raise


def _check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"--to={str(path)!r}: it has appeared meanwhile; the answers are not written over it")
