"""How much of an adapter's change is in the weights of a merged folder, read from the files, one weight at a time.

A merge is meant to add B A scale to a weight W. What it has really added, M - W, is projected onto what it should have
added: 1 if all of it is there, 0 if nothing is. What rounding and quantisation add besides is not along B A, and falls out
of the projection, the better the larger the weight is. A merge into 4 bits rounds small changes away (lesson 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors import safe_open

from qlora_helpers.adapters.file_merge import changes_of
from qlora_helpers.models.fingerprint import weight_files
from qlora_helpers.models.folder_config import read_config
from qlora_helpers.validation import one_of

__all__ = ["Survival", "survival"]


@dataclass(frozen=True)
class Survival:
    """How much of an adapter's change is in merged weights.

    Attributes:
        share: of all layers together: the sum of (M - W) · (B A scale) over the sum of |B A scale|².
        least: of the layer that has kept least.
        layer: that layer's name.
        layers: how many the adapter changes.
        into: "16bit" if the merged weights lie nearer to the original ones with the change, "4bit" if nearer to the
            quantised ones with it.
    """

    share: float
    least: float
    layer: str
    layers: int
    into: str


def survival(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    quantization: str | None = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Survival:
    """Look for an adapter's change in the weights of a merged model.

    W is either the weight in the base's files, or that weight quantised and decoded: whichever fits the merged weights
    better, taken over all layers.

    Args:
        base: the folder of the base, in 16 bits or saved in 4.
        adapter: the folder of an adapter of plain LoRA.
        merged: the folder of the merged model, in 16 bits or saved in 4.
        quantization, double_quant, dtype: how the base was loaded for training; None if it was not quantised.

    Raises:
        ValueError: the adapter is more than plain LoRA, or does not fit the base; it changes nothing; or the merged folder
            lacks a weight of it, or has it in another shape.
    """
    if quantization is not None:
        one_of("quantization", quantization, ("nf4", "fp4"), otherwise="None")
    changes = changes_of(Path(base), read_config(base, str(base), argument="base"), Path(adapter))
    before, after = _Weights(Path(base), "base"), _Weights(Path(merged), "merged")
    kept: dict[str, dict[str, float]] = {"16bit": {}, "4bit": {}}
    left, wished = {"16bit": 0.0, "4bit": 0.0}, {}
    for name, change in changes.items():
        delta = (change.b.float() @ change.a.float()) * change.scale
        original, now = before.weight(name, delta.shape), after.weight(name, delta.shape)
        wished[name] = delta.square().sum(dtype=torch.float64).item()
        starts = {"16bit": original}
        if quantization and not before.is_quantised(name):
            starts["4bit"] = _rounded(original.to(dtype), quantization, double_quant)
        for into, start in starts.items():
            added = now - start
            kept[into][name] = (added * delta).sum(dtype=torch.float64).item()
            left[into] += (added - delta).square().sum(dtype=torch.float64).item()
    if not sum(wished.values()):
        raise ValueError(
            f"adapter={str(adapter)!r} changes nothing, since B A is zero in every layer: take a trained one"
        )
    into = "4bit" if kept["4bit"] and left["4bit"] < left["16bit"] else "16bit"
    shares = {name: kept[into][name] / size for name, size in wished.items() if size}
    layer = min(shares, key=shares.__getitem__)
    share = sum(kept[into].values()) / sum(wished.values())
    return Survival(share, shares[layer], layer.removesuffix(".weight"), len(changes), into)


def _rounded(weight: torch.Tensor, quantization: str, double_quant: bool) -> torch.Tensor:
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type=quantization
    )
    return bnb.functional.dequantize_4bit(packed, state).float()


class _Weights:
    """The weights in a model's folder, in float32; those that bitsandbytes packed in 4 bits are decoded."""

    def __init__(self, folder: Path, argument: str):
        self.said = f"{argument}={str(folder)!r}"
        self.places: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                self.places |= dict.fromkeys(file.keys(), path)
        if not self.places:
            raise ValueError(f"{self.said} has no *.safetensors files: pass the folder of a model")

    def is_quantised(self, name: str) -> bool:
        return f"{name}.absmax" in self.places

    def weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        if name not in self.places:
            raise ValueError(
                f"{self.said} has no weight {name}, which the adapter changes: is it a merge into this base?"
            )
        found = self._read(name)
        if self.is_quantised(name):
            of_state = {key: self._read(key) for key in self.places if key.startswith(f"{name}.")}
            state = bnb.functional.QuantState.from_dict(of_state, device=torch.device("cpu"))
            found = bnb.functional.dequantize_4bit(found, state)
        if found.shape != shape:
            raise ValueError(
                f"{self.said} has {name} in the shape {tuple(found.shape)}, and the adapter is for {tuple(shape)}: is it a "
                "merge into this base?"
            )
        return found.float()

    def _read(self, key: str) -> torch.Tensor:
        with safe_open(self.places[key], framework="pt") as file:
            return file.get_tensor(key)
