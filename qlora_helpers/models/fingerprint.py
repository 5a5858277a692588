"""A fingerprint of a model's weights, to tell two models of one name apart.

A name says little: a folder can be given any, and a model on the Hub gets new commits. Hashing 16 GB takes a minute or
more. So each tensor's name, dtype and shape go into one SHA-256, with all bytes of a small tensor, and evenly spaced
pieces of a large one. Training changes nearly every value of the weights that it trains, so pieces are enough to
notice it; a single value changed on purpose can be missed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from qlora_helpers.json_files import read_json
from qlora_helpers.validation import refuse

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["fingerprint", "fingerprint_of", "weight_files"]

WHOLE = 2**20  # bytes; a tensor of up to this size is hashed whole: all of the shipped model, and every norm
PIECES, PIECE = 32, 2**13  # of a larger tensor, this many pieces of this many bytes

# the attribute of a loaded model, since its folder may be gone when an adapter is saved; None once weights are merged
KEPT = "base_fingerprint"


def fingerprint(folder: str | Path) -> str:
    """The fingerprint of the weights in a model's folder; an 8B model takes about a second.

    It does not depend on the folder's name, on how the tensors are spread over safetensors files, or on what else lies
    in the folder. The same weights in another dtype, or saved in 4 bits, are other tensors and have another fingerprint.

    Returns:
        "sha256:" and 64 hexadecimal digits.

    Raises:
        ValueError: `folder` has no weights, or a damaged safetensors file.
    """
    folder = Path(folder)
    parts = sorted(part for path in weight_files(folder) for part in _tensors(path))
    if not parts:  # without safetensors transformers loads .bin files: each counts as one large tensor
        parts = [(path.name, "bin", "", path, 0, path.stat().st_size) for path in sorted(folder.glob("*.bin"))]
    if not parts:
        raise refuse("folder", str(folder), "has no *.safetensors files: pass the folder of a model")
    digest = hashlib.sha256()
    for name, dtype, shape, path, begin, end in parts:
        digest.update(json.dumps([name, dtype, shape, end - begin]).encode())
        with path.open("rb") as file:
            _add(digest, file, begin, end)
    return f"sha256:{digest.hexdigest()}"


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder, which may hold the same weights a second time.

    Raises:
        ValueError: the index is damaged, or names a file that is not there.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse("folder", str(folder), f"its {index.name} is damaged: fetch or copy it again") from error
    if missing := [path.name for path in files if not path.is_file()]:
        raise refuse("folder", str(folder), f"has no {missing[0]}, which its index names: fetch or copy it again")
    return files


def fingerprint_of(model: PreTrainedModel | PeftModel) -> str | None:
    """The fingerprint of the files that a model, or the base of its adapters, was loaded from.

    Returns:
        None if that is not known: the model was not made by `load_model`, and its config names no folder of weights.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if hasattr(base, KEPT):
        return getattr(base, KEPT)
    folder = Path(base.config.name_or_path)
    is_known = bool(base.config.name_or_path) and (weight_files(folder) or list(folder.glob("*.bin")))
    return fingerprint(folder) if is_known else None


def _tensors(path: Path) -> list[tuple[str, str, str, Path, int, int]]:
    """(name, dtype, shape, file, first byte, byte after the last) of each tensor, from a safetensors file's header."""
    with path.open("rb") as file:
        start = 8 + (length := int.from_bytes(file.read(8), "little"))
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
            return [
                (name, row["dtype"], str(row["shape"]), path, *(start + offset for offset in row["data_offsets"]))
                for name, row in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise refuse("folder", str(path.parent), f"{path.name} is damaged: fetch or copy it again") from error


def _add(digest: hashlib._Hash, file: BinaryIO, begin: int, end: int) -> None:
    """All bytes of a small tensor; of a large one its first, its last and evenly spaced pieces."""
    size = end - begin
    if size <= WHOLE:
        places, length = [begin], size
    else:
        places, length = [begin + (size - PIECE) * number // (PIECES - 1) for number in range(PIECES)], PIECE
    for place in places:
        file.seek(place)
        digest.update(file.read(length))
