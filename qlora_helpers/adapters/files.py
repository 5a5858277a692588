"""Adapters as files: what is in them, saved and loaded without loss, several of them on one base.

An adapter is the difference that a run has learned to one base model. On another base it is noise, and nothing in PEFT
notices. So an adapter that is saved here carries its base's name, and is refused by a base of another one.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open

from qlora_helpers.models.loading import name_of
from qlora_helpers.safe_folders import settle, whole_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class WrongBase(ValueError):
    """An adapter was to be loaded onto another base than the one that it was trained on; the message names both."""


@dataclass(frozen=True)
class AdapterFiles:
    """What lies in an adapter's folder.

    Attributes:
        base: the name of the model that it was trained on.
        rank, alpha: of LoRA.
        modules: the layers that it changes, by the last part of their names.
        parameters: how many numbers it holds.
        bytes: the size of its weights on disk, header included.
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
    folder = settle(folder)
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
    """A base's name in a config that PEFT wrote by itself: a name of the Hub, or the path of a folder on some machine."""
    path = Path(said)
    is_path = path.is_absolute() or said.startswith(".") or len(path.parts) > 2
    return path.name if is_path else said


def same_name(one: str, other: str) -> bool:
    """Whether two names can be of one model. A copy in a folder of one's own has no owner: then the rest of it decides."""
    if "/" in one and "/" in other:
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def save_adapter(model: PeftModel, folder: str | Path, name: str = "default", overwrite: bool = False) -> Path:
    """Save one adapter of a model, with its base's name.

    Args:
        folder: appears in whole or not at all; one that is there is kept.
        name: of the adapter in the model.
        overwrite: replace a folder that is there. It stays until the new one is whole.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        KeyError: the model has no adapter `name`.
    """
    if name not in model.peft_config:
        raise KeyError(f"name={name!r}: this model's adapters are {', '.join(sorted(model.peft_config))}")
    # where PEFT looks whether the vocabulary has grown; a name alone would be looked up on the Hub
    model.peft_config[name].base_model_name_or_path = model.config.name_or_path
    with whole_folder(folder, overwrite) as part:
        PeftModel.save_pretrained(model, part, selected_adapters=[name])
        if (part / name).is_dir():  # where PEFT puts every adapter but the one named "default"
            for file in (part / name).iterdir():
                file.rename(part / file.name)
            (part / name).rmdir()
        (part / "README.md").unlink()  # a card of placeholders
        # PEFT writes the base's path on this machine, which says nothing on another one
        config = json.loads((part / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = name_of(model)
        # what is off is PEFT's default: left out, since an older PEFT warns of each key that it does not know
        config = {key: value for key, value in config.items() if value or key == "init_lora_weights"}
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def load_adapter(model, folder: str | Path, name: str = "default") -> PeftModel:
    """Put an adapter onto its base, beside others if the model has some; it becomes the active one.

    Args:
        model: the base from `load_model`, in 4 bit or not, or a model with other adapters of the same base.
        name: under which the adapter is kept, for `model.set_adapter(name)`.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        WrongBase: the adapter was trained on another model.
        ValueError: the model has an adapter of this name already, or no module can have this name.
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
