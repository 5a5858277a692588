"""How a file of chats is read on the command line, with options that are the same in each command that reads one."""

from __future__ import annotations

import argparse
from pathlib import Path

from qlora_helpers.chats.files import ON_BAD, ChatFile, read_file, without
from qlora_helpers.chats.forms import FORMS
from qlora_helpers.chats.messages import ChatError, FormLeftOpen

__all__ = ["add_reading", "read_and_say", "settled"]


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add --form and --on-bad. What is not given is None; for --on-bad this means "stop"."""
    parser.add_argument("--form", choices=FORMS, help="the form of the rows, where the columns leave it open")
    # its name in earlier versions, which scripts may have
    parser.add_argument("--format", choices=FORMS, dest="form", help=argparse.SUPPRESS)
    parser.add_argument(
        "--on-bad",
        choices=ON_BAD,
        help="what to do if rows cannot be used: stop with an error, or drop them and say which (default: stop)",
    )


def read_and_say(path: str | Path, form: str | None, on_bad: str, second: bool = False) -> ChatFile:
    """Read a file, and print what was found.

    Args:
        form, on_bad: as in `qlora_helpers.chats.read_file`.
        second: it is the validation file. It may be of another form than the data, so `form` only holds for it where its
            own columns leave the form open.

    Raises:
        ChatError, OSError: as `read_file` does; the message names the option that helps.
    """
    try:
        file = read_file(path, form=None if second else form, on_bad="drop")
    except FormLeftOpen:
        if not (second and form):
            raise
        file = read_file(path, form=form, on_bad="drop")
    print(file.said, flush=True)
    return settled(file, {}, on_bad)


def settled(file: ChatFile, faults: dict[int, str], on_bad: str) -> ChatFile:
    """A file without its bad rows, or an error that names them.

    Args:
        faults: more of them, by the number of the row.

    Raises:
        ChatError: as `qlora_helpers.chats.files.without` does, with the option that leaves such rows out.
    """
    try:
        return without(file, faults, on_bad)
    except ChatError as error:
        some = len(file.dropped | faults) < len(file.chats) + len(file.dropped)
        counted = f"{file.counted.capitalize()}. " if file.counted else ""
        raise ChatError(f"{error}\n{counted}To leave such rows out: --on-bad drop" if some else str(error)) from error
