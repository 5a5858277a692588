"""The options that were typed, so that an error calls them as the command line does: --batch-size, and not batch_size."""

from __future__ import annotations

import argparse
import re

from qlora_helpers.validation import shown

__all__ = ["as_typed", "typed_options"]


def typed_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, tuple[str, object]]:
    """The options that the command line names, as {"batch_size": ("--batch-size", 4)}.

    An option with the value that it has by default is not among them.

    Args:
        parser: of the command.
        args: what it made of the words.
    """
    found = vars(args)
    return {
        action.dest: (action.option_strings[0], found[action.dest])
        for action in reversed(parser._actions)  # argparse has no other list of them; a name's first option counts
        if action.option_strings and action.dest in found and found[action.dest] != action.default
    }


def as_typed(message: str, options: dict[str, tuple[str, object]]) -> str:
    """A message about Python's arguments, with those that were typed called by their options.

    A name counts if a value follows it, as in "epochs='abc'", and where it is no English word also without one, as in
    "Raise max_length". Within quotes and paths nothing changes.

    Args:
        options: those of `typed_options`.
    """
    for name, (option, value) in options.items():
        if isinstance(value, list):  # typed with commas
            message = message.replace(f"{name}={shown(value)}", f"{name}={','.join(map(str, value))}")
        after = r"(?![\w/\\-]|\.\w)" if "_" in name else "(?==)"
        message = re.sub(rf"(?<![^\s(]){name}{after}", option, message)
    return message
