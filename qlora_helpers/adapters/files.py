"""Adapters as files: read what is in them, save and load them without loss, and put several on one base.

An adapter is the change that a run has learned for one base model. On another base it is noise, and PEFT does not
notice. So an adapter saved here carries the name of its base and a fingerprint of its weights (in `base.json`, a file
that PEFT does not look at), and is not loaded onto another one. Without a fingerprint, the name alone decides.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError

from qlora_helpers.adapters.lora_options import DEFAULTS
from qlora_helpers.json_files import read_json
from qlora_helpers.models.fingerprint import fingerprint_of
from qlora_helpers.models.loading import name_in, name_of
from qlora_helpers.models.tensor_files import misfit, shapes_in
from qlora_helpers.safe_folders import put_back, whole_folder
from qlora_helpers.validation import number, refuse, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BASE_FILE",
    "CONFIG",
    "WEIGHTS",
    "AdapterFiles",
    "WrongBase",
    "check_base",
    "describe",
    "load_adapter",
    "read_adapter_config",
    "same_name",
    "save_adapter",
]

CONFIG, WEIGHTS, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "base.json"


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
        fingerprint: of the base's weights (`qlora_helpers.models.fingerprint`), or None if the adapter has none, as one
            saved by plain PEFT.
    """

    base: str
    rank: int
    alpha: float
    modules: tuple[str, ...]
    parameters: int
    bytes: int
    fingerprint: str | None = None


def describe(folder: str | Path) -> AdapterFiles:
    """Read a LoRA adapter's files without loading it.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        ValueError: a file is damaged, the adapter is not LoRA, its rank or alpha is no number, or it names no base.
    """
    folder = put_back(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder={str(folder)!r} has no {name}: it is not the folder of an adapter")
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise refuse(
            "folder", str(folder), f"has peft_type={config.get('peft_type')!r} in {CONFIG}: only LoRA is read here"
        )
    if not isinstance(said := config.get("base_model_name_or_path"), str) or not said:
        raise refuse("folder", str(folder), f"names no base: write base_model_name_or_path into its {CONFIG}")
    try:
        shapes = shapes_in(folder / WEIGHTS)
    except SafetensorError as error:
        raise refuse("folder", str(folder), f"its {WEIGHTS} is damaged ({error}): copy or save it again") from error
    for key, check in (("r", whole), ("lora_alpha", _number)):
        try:
            check(key, config.get(key, DEFAULTS[key]))
        except ValueError as error:
            raise refuse("folder", str(folder), f"its {CONFIG} says {error}") from error
    base = _read_json(folder, BASE_FILE) if (folder / BASE_FILE).is_file() else {}
    return AdapterFiles(
        base=_base_name(said),
        rank=config.get("r", DEFAULTS["r"]),
        alpha=config.get("lora_alpha", DEFAULTS["lora_alpha"]),
        modules=tuple(sorted({_module_name(key) for key in shapes})),
        parameters=sum(map(math.prod, shapes.values())),
        bytes=(folder / WEIGHTS).stat().st_size,
        fingerprint=base.get("fingerprint"),
    )


def _number(name: str, value: object) -> float:
    return number(name, value, at_least=-math.inf)


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """An adapter's adapter_config.json.

    Raises:
        ValueError: it is damaged.
    """
    return _read_json(Path(folder), CONFIG)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(folder / name)
    except ValueError as error:
        raise refuse("folder", str(folder), f"its {name} {error}: copy or save it again") from error


def _module_name(key: str) -> str:
    """The last part of the name of the layer that a tensor belongs to: it is followed by what PEFT put into the layer."""
    layer = re.split(r"\.(?:lora_|base_layer\b|modules_to_save\b|token_adapter\b|(?:weight|bias)$)", key)[0]
    return layer.rpartition(".")[2]


def _base_name(said: str) -> str:
    """The base's name in a config that PEFT wrote: a name on the Hub, or the path of a folder on some machine."""
    path = PureWindowsPath(said) if "\\" in said else PurePosixPath(said)
    is_path = path.is_absolute() or said.startswith(".") or len(path.parts) > 2
    return name_in(path) if is_path else path.as_posix()  # without a slash at its end


def same_name(one: str, other: str) -> bool:
    """Whether two names can mean the same model. A local copy has no owner in its name: then the rest decides."""
    if "/" in one and "/" in other:
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def check_base(found: AdapterFiles, folder: str | Path, name: str, fingerprint: str | None) -> None:
    """Hold what an adapter says of its base against a base.

    Args:
        found: from `describe`.
        folder: the adapter's, for the message.
        name, fingerprint: of the base. Equal fingerprints are enough; if one of them is None, the name decides.

    Raises:
        WrongBase: the name or the weights differ.
    """
    if found.fingerprint and found.fingerprint == fingerprint:
        return  # whatever the folder is called: on Kaggle it is a number
    if not same_name(found.base, name):
        raise WrongBase(
            f"the adapter in {folder} was trained on {found.base!r}, and this model is {name!r}: load {found.base!r} instead"
        )
    if found.fingerprint and fingerprint:
        raise WrongBase(
            f"the adapter in {folder} was trained on {found.base!r} with the weights {found.fingerprint}, and this "
            f"model has that name with the weights {fingerprint}: load the files that it was trained on. If you know that "
            f"they are one model, such as in 4 and in 16 bits, delete {BASE_FILE} in the adapter's folder"
        )


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    name: str = "default",
    overwrite: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Save one adapter of a model, with the name of its base and the fingerprint of the base's files.

    Args:
        folder: appears complete or not at all; an existing one is kept.
        name: of the adapter in the model.
        overwrite: replace an existing folder. It stays until the new one is complete.
        weights: the adapter's, by the names that they have in the model; by default they are taken from it. A sharded
            model has only a part of each.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        KeyError: the model has no adapter `name`.
    """
    if name not in model.peft_config:
        raise KeyError(f"name={name!r}: this model's adapters are {', '.join(sorted(model.peft_config))}")
    # PEFT checks there whether the vocabulary has grown; it would look up a bare name on the Hub
    model.peft_config[name].base_model_name_or_path = model.config.name_or_path
    with whole_folder(folder, overwrite) as part:
        PeftModel.save_pretrained(model, part, selected_adapters=[name], state_dict=weights)
        if (part / name).is_dir():  # where PEFT puts every adapter but the one named "default"
            for file in (part / name).iterdir():
                file.rename(part / file.name)
            (part / name).rmdir()
        (part / "README.md").unlink()  # a model card full of placeholders
        # PEFT writes the base's path on this machine, which means nothing on another one
        config = json.loads((part / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = name_of(model)
        # an option that is off, as it is by default, is left out: an older PEFT warns about each key it does not know
        config = {key: value for key, value in config.items() if value or key not in DEFAULTS or DEFAULTS[key] != value}
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if known := fingerprint_of(model):
            base = {"fingerprint": known, "name": name_of(model)}
            (part / BASE_FILE).write_text(json.dumps(base, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def load_adapter(model: PreTrainedModel | PeftModel, folder: str | Path, name: str = "default") -> PeftModel:
    """Load an adapter onto its base, next to any others; it becomes the active one.

    Args:
        model: the base from `load_model`, in 4 bits or not, or a model with other adapters of the same base.
        name: under which the adapter is kept, for `model.set_adapter(name)`.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        WrongBase: the adapter was trained on another model, or on other weights under this model's name.
        ValueError: a file of it is damaged, lacks a tensor, or has one too many or of another rank; it is not LoRA, or PEFT
            would draw a part of it anew; the model already has an adapter of this name, or torch does not allow the name.
    """
    if not name or "." in name or hasattr(torch.nn.ModuleDict(), name):  # PEFT keeps adapters in a ModuleDict
        raise ValueError(f"name={name!r} is one that torch uses itself: choose another")
    found = describe(folder)
    check_base(found, folder, name_of(model), fingerprint_of(model))
    start = read_adapter_config(folder).get("init_lora_weights")
    if isinstance(start, str) and start.startswith("pissa_niter"):
        raise refuse(
            "folder",
            str(folder),
            f"has init_lora_weights={start!r}: PEFT draws its start, which changes the base, anew at each load. Save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion",
        )
    _check_ranks(found, Path(folder))
    if not isinstance(model, PeftModel):
        loaded = PeftModel.from_pretrained(model, folder, adapter_name=name)
        if wrong := _not_loaded(loaded, folder, name):
            loaded.unload()
            raise refuse("folder", str(folder), wrong)
        return loaded.eval()
    if name in model.peft_config:
        raise ValueError(
            f"name={name!r}: the model has an adapter of this name. Choose another, or delete_adapter first"
        )
    model.load_adapter(folder, adapter_name=name)
    if wrong := _not_loaded(model, folder, name):
        model.delete_adapter(name)
        raise refuse("folder", str(folder), wrong)
    model.set_adapter(name)
    return model.eval()


def _check_ranks(found: AdapterFiles, folder: Path) -> None:
    """Hold the matrices against the rank in the config. PEFT notices it, too, but only when it has changed the base."""
    if read_adapter_config(folder).get("rank_pattern"):
        return  # PEFT knows which layer has which
    for key, shape in shapes_in(folder / WEIGHTS).items():
        if re.search(r"\.lora_(embedding_)?A\b", key) and shape[0] != found.rank:
            raise refuse(
                "folder",
                str(folder),
                f"{key} has the rank {shape[0]} in its {WEIGHTS}, and its {CONFIG} says r={found.rank}",
            )


def _not_loaded(model: PeftModel, folder: str | Path, name: str) -> str:
    """What PEFT did not find in the file, so that the layer has random values, or found and had no layer for."""
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wanted = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    found = {key: shape for key, shape in shapes_in(Path(folder) / WEIGHTS).items() if key in wanted or "lora_" in key}
    fault = misfit(found, wanted)
    return fault and f"its {WEIGHTS} {fault}"
