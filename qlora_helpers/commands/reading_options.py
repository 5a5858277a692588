"""Options of the command line that say how a file of chats is read; the same in each command that reads one."""

from __future__ import annotations

import argparse

from qlora_helpers.chats.files import ON_BAD
from qlora_helpers.chats.forms import FORMS
from qlora_helpers.chats.lengths import TOO_LONG

__all__ = ["add_reading"]


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add --format, --on-bad and --too-long. What is not given is None, and means "stop" for the last two."""
    parser.add_argument("--format", choices=FORMS, help="the form of the rows, where the columns leave it open")
    parser.add_argument(
        "--on-bad",
        choices=ON_BAD,
        help="what to do if rows cannot be used: stop with an error, or drop them and say which (default: stop)",
    )
    parser.add_argument(
        "--too-long",
        choices=TOO_LONG,
        help="what to do with chats of more tokens than the longest allowed: stop with an error, drop them, or cut out the "
        "middle of their longest question; answers stay whole (default: stop)",
    )
