"""Options of the command line that say how a file of chats is read; the same in each command that reads one."""

from __future__ import annotations

import argparse

from qlora_helpers.chats.files import ON_BAD
from qlora_helpers.chats.forms import FORMS

__all__ = ["add_reading"]


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add --format and --on-bad. What is not given is None; for --on-bad this means "stop"."""
    parser.add_argument("--format", choices=FORMS, help="the form of the rows, where the columns leave it open")
    parser.add_argument(
        "--on-bad",
        choices=ON_BAD,
        help="what to do if rows cannot be used: stop with an error, or drop them and say which (default: stop)",
    )
