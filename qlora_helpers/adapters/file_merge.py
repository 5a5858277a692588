"""Merge an adapter into 16-bit weights from file to file, with one weight at a time in memory."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_helpers.adapters.files import CONFIG, WEIGHTS, WrongBase, describe, same_name
from qlora_helpers.models.loading import name_in
from qlora_helpers.safe_folders import put_back, whole_folder

__all__ = ["merge_files"]

# options of a LoraConfig with which a merge is more than W + B A alpha / r
_NOT_PLAIN = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
)


def merge_files(base: str | Path, adapter: str | Path, folder: str | Path, overwrite: bool = False) -> Path:
    """Merge into the original 16-bit weights from file to file, with one weight at a time in memory.

    The base's folder is copied, and each weight that the adapter changes is overwritten in the copy. W + B A alpha / r is
    computed in float32 and rounded once to the base's own dtype. `merge(adapter, "16bit")` in the cpu gear, rounded to that
    dtype, is bit-identical; a GPU sums in another order.

    Args:
        base: the folder of the 16-bit model, with its safetensors files.
        adapter: the folder of a plain LoRA adapter.
        folder: appears complete or not at all; an existing one is kept.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        FileNotFoundError: `base` has no safetensors files.
        ValueError: the adapter belongs to another base (`adapters.files.WrongBase`), is not plain LoRA, or changes a weight that
            the base does not have in this shape.
    """
    base, adapter = Path(base), put_back(adapter)
    files, found = sorted(base.glob("*.safetensors")), describe(adapter)
    if not files:
        raise FileNotFoundError(f"base={str(base)!r} has no safetensors files: pass the folder of a 16-bit model")
    if not same_name(found.base, name_in(base)):
        raise WrongBase(f"the adapter in {adapter} was trained on {found.base!r}, and base is {name_in(base)!r}")
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    if extras := [name for name in _NOT_PLAIN if config.get(name)]:
        raise ValueError(f"adapter={str(adapter)!r} has {', '.join(extras)} set: merge it with merge() instead")
    pairs = _pairs(load_file(adapter / WEIGHTS))
    with whole_folder(folder, overwrite) as part:
        for path in sorted(base.iterdir()):
            if path.is_file():
                shutil.copyfile(path, part / path.name)
        for path in files:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key in pairs]  # noqa: SIM118 - the file cannot be iterated over
                for key in keys:
                    a, b = pairs.pop(key)
                    weight = file.get_tensor(key)
                    if weight.shape != (b.shape[0], a.shape[1]):
                        raise ValueError(
                            f"{key} has the shape {tuple(weight.shape)} in {path}, but the adapter is for another shape"
                        )
                    delta = (b.float() @ a.float()) * (found.alpha / found.rank)
                    _overwrite(part / path.name, key, (weight.float() + delta).to(weight.dtype))
        if pairs:
            raise ValueError(
                f"the adapter changes {len(pairs)} weights that {base} does not have, such as {min(pairs)}"
            )
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


def _pairs(weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """LoRA's A [rank, in] and B [out, rank], by the name of the weight that they change."""
    return {
        key.removeprefix("base_model.model.").replace(".lora_A.", "."): (
            a,
            weights[key.replace(".lora_A.", ".lora_B.")],
        )
        for key, a in weights.items()
        if ".lora_A." in key
    }
