"""What a run of the command line is asked for: a model, a file of chats, and the rules for reading it.

It is kept in the run's record, so that `run --resume` needs nothing but the folder's name.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qlora_helpers.adapters.tuned import is_adapter, locate
from qlora_helpers.commands.settings_options import given, option_of
from qlora_helpers.json_files import read_json_if_whole
from qlora_helpers.models.fetched import FETCHABLE, fetched_folder

__all__ = ["SHIPPED", "SUGGESTED", "Request", "asked_for", "refuse_another"]

SHIPPED = "tiny-llama"
SUGGESTED = "suggested"  # as many of one's own chats as `qlora_helpers.suggestions` says


@dataclass(frozen=True)
class Request:
    """What a run is asked for.

    Attributes:
        model: a folder, a name of the Hub, "tiny-llama", or one that can be fetched, such as "smollm2-135m".
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
        ValueError: another model than the shipped one, and no data for it; what is no model; or how to read a file, and no
            file.
        OSError: a file that it names is not there.
    """
    settings = given(args)
    default = None if args.data is None else SUGGESTED
    request = Request(
        model=_path_or_name(SHIPPED if args.model is None else args.model),
        data=None if args.data is None else _file("--data", args.data),
        validation=_held_out(settings.pop("validation", default)),
        form=args.form,
        on_bad=args.on_bad or "stop",
        too_long=args.too_long or "stop",
        settings=settings,
    )
    if request.data is None and request.model != SHIPPED:
        raise ValueError(
            f"--model={args.model!r} needs chats to learn from: name a file with --data, such as your own or "
            "data/chats/qlora/train.jsonl. The chats that are used without it are about the shipped model's world"
        )
    if request.data is None and not isinstance(request.validation, str):
        for option in ("form", "on_bad", "too_long"):
            if (value := getattr(args, option)) is not None:
                raise ValueError(f"{option_of(option)}={value}: there is no file to read: name yours with --data")
    return request


def _file(option: str, name: str) -> str:
    """The full path of a file, which another working folder does not change."""
    path = Path(name)
    if not name or not path.exists():
        raise FileNotFoundError(f"{option}={name!r} is not there: name a file of chats, or a dataset's folder")
    return os.path.abspath(path)


def _held_out(validation: float | str | None) -> float | str | None:
    return _file("--validation", validation) if isinstance(validation, str) and validation != SUGGESTED else validation


def _path_or_name(model: str) -> str:
    """The full path of a model's folder; a name stays as it is.

    Raises:
        ValueError: it is empty, or what a run has trained on top of a model.
        NotFetched: it can be fetched, and is not on this disk.
    """
    if not model.strip():
        raise ValueError(f"--model={model!r}: name a model, or leave it out for the shipped one")
    if model in FETCHABLE:
        fetched_folder(model)  # else this would be found only once the libraries are loaded
        return model
    if model == SHIPPED or not Path(model).is_dir():
        return model
    with suppress(OSError):  # a folder that holds neither a run nor a model is refused when it is loaded
        found = locate(model)
        if is_adapter(found):
            base = (read_json_if_whole(found / "adapter_config.json") or {}).get("base_model_name_or_path")
            raise ValueError(
                f"--model={model!r} holds an adapter, and a run starts from a model: name the adapter's base"
                + (f", {base}" if isinstance(base, str) else "")
            )
        if found != Path(model):
            raise ValueError(f"--model={model!r} is the folder of a run: name that of the model in it, {found}")
    return os.path.abspath(model)


def refuse_another(args: argparse.Namespace, folder: Path, record: dict[str, Any]) -> Request:
    """What the run in a folder was asked for, if the command line asks for nothing else.

    The files and the model's folder may lie elsewhere now: whether they are the same is checked when they are read. So it
    is for all that a record does not say, as those of older versions and of `train` do not.

    Args:
        record: of the run.

    Raises:
        ValueError: the command line asks for something else; the message names the option.
        OSError: a file is not there.
    """
    settings = given(args)
    found = record.get("request")
    if isinstance(found, dict):
        before = Request(**{known.name: found[known.name] for known in fields(Request) if known.name in found})
        _refuse_another_reading(args, before, folder)
    else:
        before = replace(asked_for(args), settings={})
    held_out = settings.pop("validation", before.validation)
    for name, value in settings.items():
        if value not in (before.settings.get(name), record.get(name)):
            _refuse(name, value, before.settings.get(name, record.get(name)), folder)
    data = args.data or before.data
    return replace(
        before,
        model=_path_or_name(args.model or before.model),
        data=data and _file("--data", data),
        validation=_held_out(held_out),
    )


def _refuse_another_reading(args: argparse.Namespace, before: Request, folder: Path) -> None:
    """Refuse another model, or other rules for reading the files."""
    moved = os.path.isabs(before.model) and not os.path.exists(before.model)
    if args.model and _path_or_name(args.model) != before.model and not (moved and os.path.isdir(args.model)):
        _refuse("model", args.model, before.model, folder)
    for option, begun in (("form", before.form), ("on_bad", before.on_bad), ("too_long", before.too_long)):
        if getattr(args, option) not in (None, begun):
            _refuse(option, getattr(args, option), begun, folder)


def _refuse(name: str, value: Any, begun: Any, folder: Path) -> None:
    option = option_of(name)
    how = "without it" if begun is None else f"with {begun}"
    raise ValueError(
        f"{option}={value}: the run in --output={str(folder)!r} was begun {how}. Leave out {option} to continue it, or leave "
        "out --resume to begin another"
    )
