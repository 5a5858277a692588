"""The models that are known by name (`models.json`), and the shape of any other from its config."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.memory import names
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.assumed import assumed_in_words
from qlora_helpers.memory.names import Found
from qlora_helpers.memory.saved_format import SavedFormat, saved_format
from qlora_helpers.memory.shape import FAMILIES, ModelShape, config_and_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "TABLE",
    "find_shape",
    "known_config",
    "known_models",
    "known_sizes",
    "longest_stated",
    "predicted_models",
    "resolve",
]

TABLE = Path(__file__).with_name("models.json")
_HEADS = {"lm_head", "embed_out"}  # never in 4 bits, whether a config lists them or not


@cache
def _table() -> dict[str, dict]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@cache
def _same() -> dict[str, str]:
    """For each name that has no config of its own, the model whose config is taken."""
    file = _table()
    return file["aliases"] | _finetunes()


@cache
def _finetunes() -> dict[str, str]:
    return {name: entry["of"] for name, entry in _table()["finetunes"].items()}


@cache
def known_models() -> dict[str, dict]:
    """The config of each model that is known by its Hub name, aliases included."""
    models = _table()["models"]
    return models | {name: models[of] for name, of in _same().items()}


@cache
def known_sizes() -> dict[str, int]:
    """The number of parameters of each known model, as transformers' model of its config has them."""
    evidence = _table()["evidence"]
    return {name: evidence[_same().get(name, name)]["parameters"] for name in known_models()}


def predicted_models() -> dict[str, dict]:
    """Those of the known models whose family `ModelShape` knows."""
    return {name: config for name, config in known_models().items() if config["model_type"] in FAMILIES}


def longest_stated(config: dict) -> int | None:
    """The longest sequence that a config states, of its text part if it has several; None if it states none."""
    text = config.get("text_config", config)
    return text.get("max_position_embeddings", text.get("n_positions"))


@cache
def resolve(model: str) -> Found:
    """The known model that a name means, and what was assumed to find it.

    Args:
        model: a Hub name, with or without its owner, in any case, also with spaces; one of a quantised copy, such as
            "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"; or an address such as "https://huggingface.co/Qwen/Qwen3-8B".

    Returns:
        the name as the Hub spells it, and one sentence for each assumption, such as that an instruction-tuned model has
        the layers of its base.

    Raises:
        ValueError: no such model is known; the message names those of its family that are closest, and how to get the
            config of any other.
    """
    asked = names.address(model)
    found = names.look_up(asked, tuple(known_models()), _finetunes())
    if found is None:
        raise names.unknown(asked, tuple(known_models()))
    return found


def known_config(model: str) -> dict:
    """The config of a known model: those fields of its `config.json` that decide how many parameters it has.

    Args:
        model: a name as `resolve` takes it.

    Raises:
        ValueError: no such model is known.
    """
    return dict(known_models()[resolve(model).name])


def find_shape(model: ModelShape | AnyShape | PretrainedConfig | dict | str | Path) -> ModelShape | AnyShape:
    """The shape of a model, with its name set, and with what was assumed to find it.

    Args:
        model: a name such as "Qwen/Qwen2.5-7B", as `resolve` takes it; or what `ModelShape.from_config` takes: a folder,
            a config.json, a dict or a transformers config. A folder that has a config.json takes precedence over a Hub
            name, as in transformers. A shape is returned unchanged.

    Returns:
        a `ModelShape` of a family whose layers are written out here; for any other that transformers can build, an
        `AnyShape`.

    Raises:
        ValueError: the model is not known, or its family neither here nor in the installed transformers; or its config
            makes no sense.
        FileNotFoundError: there is no such config.json.
    """
    if isinstance(model, ModelShape | AnyShape):
        return model
    if isinstance(model, str) and not _is_path(model):
        found = resolve(model)
        return replace(_shape_of(known_models()[found.name]), name=found.name, assumed=found.assumed)
    config, folder = config_and_name(model)
    saved = saved_format(config)
    skip = saved.stays if saved and saved.is_loaded_here else None
    shape = _shape_of(config, skip)
    stated = config.get("_name_or_path")
    name = folder or getattr(model, "name_or_path", "") or (stated if isinstance(stated, str) else "")
    return replace(shape, name=name or f"a {shape.model_type} model", assumed=_assumed(config, saved))


def _shape_of(config: dict, skip: tuple[str, ...] | None = None) -> ModelShape | AnyShape:
    family = config.get("model_type")
    only_the_head = not skip or set(skip) <= _HEADS
    if only_the_head and isinstance(family, str) and family in FAMILIES:
        return ModelShape.from_config(config)
    return AnyShape.from_config(config, skip=skip)


def _assumed(config: dict, saved: SavedFormat | None) -> tuple[str, ...]:
    """What a config leaves out, and what its weights are saved in, in sentences."""
    said = (assumed_in_words(config), "" if saved is None else str(saved))
    return tuple(sentence for sentence in said if sentence)


def _is_path(model: str) -> bool:
    if names.is_address(model):
        return False
    # A folder that merely has a model's name, such as one for its checkpoints, is not the path of a model.
    named = Path(model)
    try:
        return model.endswith(".json") or (named / "config.json").is_file() or (named.is_dir() and not _is_known(model))
    except OSError:  # too long to be the name of a file
        return False


def _is_known(model: str) -> bool:
    return names.look_up(model, tuple(known_models()), _finetunes()) is not None
