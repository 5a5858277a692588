"""The models that are known by name (`models.json`), and the shape of any other from its config."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.memory.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["TABLE", "find_shape", "known_config", "known_models"]

TABLE = Path(__file__).with_name("models.json")


@cache
def known_models() -> dict[str, dict]:
    """The config of each model that is known by its Hub name, aliases included."""
    file = json.loads(TABLE.read_text(encoding="utf-8"))
    return file["models"] | {alias: file["models"][name] for alias, name in file["aliases"].items()}


def known_config(model: str) -> dict:
    """The config of a known model: those fields of its `config.json` that decide how many parameters it has.

    Args:
        model: a Hub name such as "Qwen/Qwen2.5-7B", or the part after its slash, in any case.

    Raises:
        ValueError: no such model is known.
    """
    return dict(known_models()[_hub_name(model)])


def find_shape(model: ModelShape | PretrainedConfig | dict | str | Path) -> ModelShape:
    """The shape of a model, with its name set.

    Args:
        model: a Hub name such as "Qwen/Qwen2.5-7B" or the part after its slash, in any case; or what
            `ModelShape.from_config` takes: a folder, a config.json, a dict or a transformers config. A folder that has
            a config.json takes precedence over a Hub name, as in transformers. A ModelShape is returned unchanged.

    Raises:
        ValueError: the model or its family is not known.
        FileNotFoundError: there is no such config.json.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, str) and not _is_path(model):
        name = _hub_name(model)
        return replace(ModelShape.from_config(known_models()[name]), name=name)
    shape = ModelShape.from_config(model)
    if isinstance(model, str | Path):
        folder = Path(model) if Path(model).is_dir() else Path(model).parent
        return replace(shape, name=folder.resolve().name)
    return replace(shape, name=shape.name or getattr(model, "name_or_path", "") or f"a {shape.model_type} model")


@cache
def _names() -> dict[str, str]:
    """The name as the Hub spells it, for each name in lower case, with and without its owner."""
    names = {}
    for name in known_models():
        names.setdefault(name.lower(), name)
        names.setdefault(name.lower().rpartition("/")[2], name)
    return names


def _is_path(model: str) -> bool:
    # A folder that merely has a model's name, such as one for its checkpoints, is not the path of a model.
    named = Path(model)
    try:
        return (
            model.endswith(".json")
            or (named / "config.json").is_file()
            or (named.is_dir() and model.lower() not in _names())
        )
    except OSError:  # too long to be the name of a file
        return False


def _hub_name(model: str) -> str:
    if found := _names().get(model.lower()):
        return found
    # Compared without the owner, who says little about the shape of a model.
    short = {name: full for name, full in _names().items() if "/" not in name}
    close = difflib.get_close_matches(model.lower().rpartition("/")[2], short, n=3, cutoff=0.5)
    hint = f"; the closest known names are {', '.join(short[name] for name in close)}" if close else ""
    raise ValueError(
        f"model is {model!r}, which is not known{hint}. For any other model give its folder or its config.json"
    )
