"""Options of the command line that are fields of `Settings`: with its names and texts, and checked only by it."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable
from dataclasses import fields

from qlora_helpers.settings import Settings

__all__ = ["SHORT", "TYPES", "add_settings", "given", "number_or_text", "option_of"]

SHORT = {"num_gpus": "gpus"}  # options that have another name than their field
TYPES = {field.name: field.type for field in fields(Settings)}


def _texts() -> dict[str, str]:
    """What the docstring of `Settings` says about each field; nothing under `python -OO`, which drops docstrings."""
    found = re.search(r"Attributes:\n(.*?)\n\n", Settings.__doc__ or "", re.DOTALL)
    listed = textwrap.dedent(found[1]) if found else ""
    entries = re.findall(r"^(\w+): (.*(?:\n .*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()).replace("`", "") for name, text in entries}


def number_or_text(text: str) -> int | float | str:
    """A number, or the text itself, which is then refused by name."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _value(text: str) -> int | float | str | None:
    """A number, None, or the text itself: `Settings` decides whether the field accepts it."""
    return None if text.lower() == "none" else number_or_text(text)


def _names(text: str) -> str | list[str]:
    return text if text == "all-linear" else [name.strip() for name in text.split(",")]


def option_of(name: str) -> str:
    """The option of a field, such as "--batch-size"."""
    return "--" + SHORT.get(name, name).replace("_", "-")


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str], defaults: Settings) -> None:
    """Add an option for each of these fields. An option that is not given sets nothing: see `given`."""
    texts = _texts()
    for name in names:
        default = getattr(defaults, name)
        said = f"{texts.get(name, name).rstrip('.')} (default: {default})".replace("%", "%%")
        if TYPES[name] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": _names if name == "target_modules" else _value, "metavar": name.upper()}
        parser.add_argument(option_of(name), dest=name, default=argparse.SUPPRESS, help=said, **how)


def given(args: argparse.Namespace) -> dict[str, object]:
    """The fields of `Settings` that the command line names, with their values."""
    return {name: value for name, value in vars(args).items() if name in TYPES}
