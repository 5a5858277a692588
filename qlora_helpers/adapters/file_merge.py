"""Merge an adapter into 16-bit weights from file to file, with one weight at a time in memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_helpers.adapters.files import WEIGHTS, check_base, describe, read_adapter_config
from qlora_helpers.adapters.lora_options import PLAIN, check_options
from qlora_helpers.models.fingerprint import fingerprint, weight_files
from qlora_helpers.models.folder_config import read_config, saved_in_4_bits
from qlora_helpers.models.loading import name_in
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.tensor_files import misfit
from qlora_helpers.safe_folders import put_back, whole_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["Change", "adapted_on_meta", "changes_of", "merge_files"]

# initialisations of A and B that leave the base's weights as they are; PiSSA and others subtract B A from them
_BASE_IS_KEPT = (True, False, "gaussian", "orthogonal", "eva")
_DTYPES = ("BF16", "F16", "F32")  # as safetensors writes them
# the same weights in other formats: a copy of them would be the base, unmerged, in the folder of the merged model
_OTHER_FORMATS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"}


def merge_files(base: str | Path, adapter: str | Path, folder: str | Path, overwrite: bool = False) -> Path:
    """Merge into the original 16-bit weights from file to file, with one weight at a time in memory.

    The base's folder is copied, and each weight that the adapter changes is overwritten in the copy. W + B A alpha / r
    (with rsLoRA, alpha / sqrt(r)) is computed in float32 and rounded once to the base's own dtype. In the cpu gear,
    `merge(adapter, "16bit")`, rounded to that dtype, is bit-identical; a GPU sums in another order.

    Which tensors the adapter must have, and the scale of each layer, are PEFT's own: its layers are made on tensors
    without memory. A second copy of the base's weights in another format (.bin, .gguf) is left out.

    Args:
        base: the folder of the 16-bit model, with its safetensors files.
        adapter: the folder of an adapter of plain LoRA on linear layers; ranks and alphas may differ by layer.
        folder: appears complete or not at all; an existing one is kept.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        FileNotFoundError: `base` has no safetensors files, or no config.json.
        ValueError: the adapter belongs to another base (`adapters.files.WrongBase`), or is more than plain LoRA, or its
            file lacks a tensor, has one too many or one of another shape; or the base is quantised, or has not these
            weights.
    """
    base, adapter = put_back(base), put_back(adapter)
    found, config = describe(adapter), read_adapter_config(adapter)
    files = weight_files(base)
    if not files:
        raise FileNotFoundError(f"base={str(base)!r} has no safetensors files: pass the folder of a 16-bit model")
    base_config = read_config(base, str(base), argument="base")
    if saved := saved_in_4_bits(base_config, str(base), argument="base"):
        raise ValueError(
            f"base={str(base)!r} was saved in 4 bits ({saved}): pass the 16-bit model that it was made from"
        )
    check_base(found, adapter, name_in(base), fingerprint(base))
    _check_plain(f"adapter={str(adapter)!r}", config)
    changes = changes_of(base, base_config, adapter)
    _check_weights(base, files, changes)
    with whole_folder(folder, overwrite) as part:
        for path in sorted(base.iterdir()):
            if path.is_dir() and path.name == "additional_chat_templates":  # of the tokenizer
                shutil.copytree(path, part / path.name)
            if path.is_file() and (path in files or not _OTHER_FORMATS.intersection(path.suffixes)):
                shutil.copyfile(path, part / path.name)
        for path in files:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key in changes]  # noqa: SIM118 - the file cannot be iterated over
                for key in keys:
                    change, weight = changes.pop(key), file.get_tensor(key)
                    delta = (change.b.float() @ change.a.float()) * change.scale
                    _overwrite(part / path.name, key, (weight.float() + delta).to(weight.dtype))
    return Path(folder)


def _overwrite(path: Path, key: str, value: torch.Tensor) -> None:
    """Overwrite a tensor in a safetensors file with values of the same shape and dtype.

    The file consists of the length of its header in 8 bytes, the header as JSON with the offsets of each tensor, and
    the data (huggingface.co/docs/safetensors, "Format").
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[key]["data_offsets"]
        data = value.contiguous().flatten().view(torch.uint8).numpy()
        if end - begin != data.nbytes:
            raise ValueError(f"{key} takes {end - begin} bytes in {path}, but its new value takes {data.nbytes}")
        file.seek(8 + length + begin)
        file.write(data)


def _check_plain(said: str, config: dict[str, Any]) -> None:
    """Refuse what is more than W + B A scale, by the name of the option."""
    check_options(said, config, PLAIN)
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise ValueError(f"{said} has task_type={task!r}: only adapters of a causal language model are merged")
    if (start := config.get("init_lora_weights", True)) not in _BASE_IS_KEPT:
        raise ValueError(
            f"{said} has init_lora_weights={start!r}, which changes the base's weights, too: save the adapter again with "
            "PEFT's path_initial_model_for_weight_conversion"
        )


@dataclass(frozen=True)
class Change:
    """What is added to one weight: B [out, rank] times A [rank, in], times the scale.

    Attributes:
        a, b: as the adapter's file has them.
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], as of the weight."""
        return self.b.shape[0], self.a.shape[1]


def changes_of(base: Path, base_config: dict[str, Any], adapter: Path) -> dict[str, Change]:
    """What an adapter of plain LoRA adds to each weight, by the weight's name in the base's files.

    Which tensors the adapter must have, and the scale of each layer, are PEFT's own: its layers are made on tensors without
    memory.

    Args:
        base, base_config: the base's folder, for messages, and its config.json.
        adapter: the adapter's folder.

    Raises:
        ValueError: transformers has no such model; the adapter changes more than linear layers; or its file is not what PEFT
            would load.
    """
    if (kind := base_config.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"base={str(base)!r} has model_type={kind!r}: transformers has no causal language model of that type"
        )
    model, adapted = adapted_on_meta(base_config, adapter)
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        if type(layer) is not lora.Linear or type(layer.get_base_layer()) is not torch.nn.Linear:
            raise ValueError(
                f"adapter={str(adapter)!r} changes {name}, which is no linear layer (target_modules): "
                "merge it with merge() instead"
            )
        if f"{name}.weight" in tied:
            raise ValueError(
                f"adapter={str(adapter)!r} changes {name} (target_modules), which shares its weight with the "
                "embedding: keep the adapter beside its base, with load_adapter"
            )
    tensors = load_file(adapter / WEIGHTS)
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if fault := misfit(_shapes(tensors), _shapes(wanted)):
        raise ValueError(f"adapter={str(adapter)!r}: its {WEIGHTS} {fault}")
    return {
        f"{name}.weight": Change(
            tensors[f"base_model.model.{name}.lora_A.weight"],
            tensors[f"base_model.model.{name}.lora_B.weight"],
            layer.scaling["default"],
        )
        for name, layer in layers.items()
    }


def adapted_on_meta(base_config: dict[str, Any], adapter: Path) -> tuple[PreTrainedModel, PeftModel]:
    """A base on tensors without memory, with the layers that PEFT makes for an adapter; their values are not loaded.

    Args:
        base_config: the base's config.json.
        adapter: the adapter's folder.

    Raises:
        ValueError: PEFT finds none of the layers that the adapter names (target_modules).
    """
    config = LoraConfig.from_pretrained(adapter)
    config.base_model_name_or_path, config.init_lora_weights = None, True  # the values come from the file
    model = meta_model(base_config)
    with torch.device("meta"):
        return model, get_peft_model(model, config)


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_weights(base: Path, files: list[Path], changes: dict[str, Change]) -> None:
    """Make sure, before anything is copied, that the base has each weight that is changed, as it must be."""
    left = dict(changes)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in left.keys() & set(file.keys()):
                change, part = left.pop(key), file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if shape != change.shape or dtype not in _DTYPES:
                    raise ValueError(
                        f"{key} has the shape {shape} in {dtype} in {path}, but the adapter is for {change.shape} in 16 or "
                        "32 bits"
                    )
    if left:
        raise ValueError(f"the adapter changes {len(left)} weights that {base} does not have, such as {min(left)}")
