"""The tensors that a safetensors file has, held against those that it should have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

__all__ = ["misfit", "shapes_in"]


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, by its name; no tensor is read.

    Raises:
        safetensors.SafetensorError: the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no iterator


def misfit(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with the tensors of a file, to be said after its name; nothing if they are the wanted ones.

    Libraries load what fits, and pass over the rest.
    """
    if missing := sorted(wanted.keys() - found.keys()):
        return f"lacks tensors that its config asks for, such as {missing[0]}"
    if extra := sorted(found.keys() - wanted.keys()):
        return f"has tensors that its config has no place for on this base, such as {extra[0]}"
    for name, shape in found.items():
        if shape != wanted[name]:
            return f"has {name} in the shape {shape}, but its config (r, rank_pattern) and the base need {wanted[name]}"
    return ""
