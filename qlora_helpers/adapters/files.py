"""Adapters as files: read what is in them, save and load them without loss, and put several on one base.

An adapter is the change that a run has learned for one base model. On another base it is noise, and PEFT does not
notice. So an adapter saved here carries the name of its base, and is not loaded onto a base of another name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from safetensors import safe_open

from qlora_helpers.models.loading import name_of
from qlora_helpers.safe_folders import put_back, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "AdapterFiles",
    "WrongBase",
    "describe",
    "load_adapter",
    "same_name",
    "save_adapter",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class WrongBase(ValueError):
    """An adapter was trained on another base than this one; the message names both."""


@dataclass(frozen=True)
class AdapterFiles:
    """What is in an adapter's folder.

    Attributes:
        base: the name of the model it was trained on.
        rank, alpha: of LoRA.
        modules: the layers it changes, by the last part of their names.
        parameters: how many it has.
        bytes: the size of its weights file, header included.
    """

    base: str
    rank: int
    alpha: float
    modules: tuple[str, ...]
    parameters: int
    bytes: int


def describe(folder: str | Path) -> AdapterFiles:
    """Read an adapter's files without loading it.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
    """
    folder = put_back(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder={str(folder)!r} has no {name}: it is not the folder of an adapter")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    modules, parameters = set(), 0
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = file.keys()  # the file itself cannot be iterated over
        for key in keys:
            parameters += math.prod(file.get_slice(key).get_shape())
            modules.add(key.split(".lora_")[0].rpartition(".")[2])
    return AdapterFiles(
        base=_base_name(config["base_model_name_or_path"]),
        rank=config["r"],
        alpha=config["lora_alpha"],
        modules=tuple(sorted(modules)),
        parameters=parameters,
        bytes=(folder / WEIGHTS).stat().st_size,
    )


def _base_name(said: str) -> str:
    """The base's name in a config that PEFT wrote: a name on the Hub, or the path of a folder on some machine."""
    path = Path(said)
    is_path = path.is_absolute() or said.startswith(".") or len(path.parts) > 2
    return path.name if is_path else said


def same_name(one: str, other: str) -> bool:
    """Whether two names can mean the same model. A local copy has no owner in its name: then the rest decides."""
    if "/" in one and "/" in other:
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def save_adapter(model: PeftModel, folder: str | Path, name: str = "default", overwrite: bool = False) -> Path:
    """Save one adapter of a model, with the name of its base.

    Args:
        folder: appears complete or not at all; an existing one is kept.
        name: of the adapter in the model.
        overwrite: replace an existing folder. It stays until the new one is complete.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        KeyError: the model has no adapter `name`.
    """
    if name not in model.peft_config:
        raise KeyError(f"name={name!r}: this model's adapters are {', '.join(sorted(model.peft_config))}")
    # PEFT checks there whether the vocabulary has grown; it would look up a bare name on the Hub
    model.peft_config[name].base_model_name_or_path = model.config.name_or_path
    with whole_folder(folder, overwrite) as part:
        PeftModel.save_pretrained(model, part, selected_adapters=[name])
        if (part / name).is_dir():  # where PEFT puts every adapter but the one named "default"
            for file in (part / name).iterdir():
                file.rename(part / file.name)
            (part / name).rmdir()
        (part / "README.md").unlink()  # a model card full of placeholders
        # PEFT writes the base's path on this machine, which means nothing on another one
        config = json.loads((part / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = name_of(model)
        # an option that is off is PEFT's default: left out, since an older PEFT warns about each key it does not know
        config = {key: value for key, value in config.items() if value or key == "init_lora_weights"}
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def load_adapter(model: PreTrainedModel | PeftModel, folder: str | Path, name: str = "default") -> PeftModel:
    """Load an adapter onto its base, next to any others; it becomes the active one.

    Args:
        model: the base from `load_model`, in 4 bits or not, or a model with other adapters of the same base.
        name: under which the adapter is kept, for `model.set_adapter(name)`.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        WrongBase: the adapter was trained on another model.
        ValueError: the model already has an adapter of this name, or torch does not allow the name.
    """
    if not name or "." in name or hasattr(torch.nn.ModuleDict(), name):  # PEFT keeps adapters in a ModuleDict
        raise ValueError(f"name={name!r} is one that torch uses itself: choose another")
    found, base = describe(folder), name_of(model)
    if not same_name(found.base, base):
        raise WrongBase(
            f"the adapter in {folder} was trained on {found.base!r}, and this model is {base!r}: load {found.base!r} instead"
        )
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
    if name in model.peft_config:
        raise ValueError(
            f"name={name!r}: the model has an adapter of this name. Choose another, or delete_adapter first"
        )
    model.load_adapter(folder, adapter_name=name)
    model.set_adapter(name)
    return model.eval()
