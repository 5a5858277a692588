"""What a run of the command line is asked for: a model, a file of chats, and the rules for reading it.

It is kept in the run's record, so that `run --resume` needs nothing but the folder's name.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qlora_helpers.commands.settings_options import given, option_of

__all__ = ["SHIPPED", "SUGGESTED", "Request", "asked_for", "refuse_another"]

SHIPPED = "tiny-llama"
SUGGESTED = "suggested"  # as many of one's own chats as `qlora_helpers.suggestions` says


@dataclass(frozen=True)
class Request:
    """What a run is asked for.

    Attributes:
        model: a folder, a name of the Hub, or "tiny-llama".
        data: the file of the chats; None for those that the course ships.
        validation: the share that is held out, or the full path of another file, or "suggested", or None.
        form, on_bad, too_long: how the files are read, as in `qlora_helpers.chats.read_chats`.
        settings: those that the command line names.
    """

    model: str = SHIPPED
    data: str | None = None
    validation: float | str | None = None
    form: str | None = None
    on_bad: str = "stop"
    too_long: str = "stop"
    settings: dict[str, Any] = field(default_factory=dict)


def asked_for(args: argparse.Namespace) -> Request:
    """What the command line asks for.

    Raises:
        ValueError: another model than the shipped one, and no data for it.
        OSError: a file that it names cannot be read.
    """
    settings = given(args)
    default = None if args.data is None else SUGGESTED
    request = Request(
        model=_path_or_name(args.model or SHIPPED),
        data=None if args.data is None else _file("--data", args.data),
        validation=_held_out(settings.pop("validation", default)),
        form=args.format,
        on_bad=args.on_bad or "stop",
        too_long=args.too_long or "stop",
        settings=settings,
    )
    if request.data is None and request.model != SHIPPED:
        raise ValueError(
            f"--model={args.model!r} needs chats to learn from: name a file with --data, such as your own or "
            "data/chats/qlora/train.jsonl. The chats that are used without it are about the shipped model's world"
        )
    return request


def _file(option: str, name: str) -> str:
    """The full path of a file, which another working folder does not change."""
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"{option}={name!r} is not there: name a file of chats, or a dataset's folder")
    return os.path.abspath(path)


def _held_out(validation: float | str | None) -> float | str | None:
    return _file("--validation", validation) if isinstance(validation, str) and validation != SUGGESTED else validation


def _path_or_name(model: str) -> str:
    """The full path of a model's folder; a name stays as it is."""
    return os.path.abspath(model) if model != SHIPPED and Path(model).is_dir() else model


def _begun_with(record: dict[str, Any]) -> Request:
    """What a run was asked for, by its record; the shipped chats if it does not say."""
    found = record.get("request") or {}
    return Request(**{known.name: found[known.name] for known in fields(Request) if known.name in found})


def refuse_another(args: argparse.Namespace, folder: Path, record: dict[str, Any]) -> Request:
    """What the run in a folder was asked for, if the command line asks for nothing else.

    The files may lie elsewhere now: whether their chats are the same is checked when they are read.

    Args:
        record: of the run.

    Raises:
        ValueError: the command line asks for something else; the message names the option.
    """
    before = _begun_with(record)
    for name in ("model", "form", "on_bad", "too_long"):
        option = "format" if name == "form" else name
        asked, begun = getattr(args, option), getattr(before, name)
        if asked is not None and (_path_or_name(asked) if name == "model" else asked) != begun:
            _refuse(option, asked, begun, folder)
    changed = given(args)
    held_out = changed.pop("validation", before.validation)
    for name, value in changed.items():
        if value not in (before.settings.get(name), record.get(name)):
            _refuse(name, value, before.settings.get(name, record.get(name)), folder)
    data = before.data if args.data is None else _file("--data", args.data)
    return replace(before, data=data, validation=_held_out(held_out))


def _refuse(name: str, value: Any, begun: Any, folder: Path) -> None:
    option = option_of(name)
    raise ValueError(
        f"{option}={value}: the run in --output={str(folder)!r} was begun with {begun}. Leave out {option} to continue it, "
        "or leave out --resume to begin another"
    )
