"""The GPUs that people fine-tune on: usable memory, compute capability, and what the CUDA libraries take."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qlora_helpers import validation
from qlora_helpers.units import GIB, MIB

__all__ = ["CONTEXT_BYTES", "GPU", "TABLE", "find_gpu", "known_gpus", "measured_gpu"]

# torch gives each thread that runs matrix products a cuBLAS workspace: 32 MiB on Hopper, 8.125 MiB elsewhere
# (aten/src/ATen/cuda/CUDABlas.cpp, default_cublas_workspace_config). The forward and backward passes are two threads.
WORKSPACE_HOPPER, WORKSPACE = 32 * MIB, 8_519_680
# The CUDA context with the kernels and libraries that a run loads, measured on an H200 (data/measured/h200_peaks.json):
# what the card shows as used, less what torch reserved, for runs without paged states. Not measured on other cards.
CONTEXT_BYTES = 804_061_184

TABLE = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class GPU:
    """A card.

    Args:
        usable_bytes: what torch reports as its total memory.
        compute_capability: such as (7, 5) for a T4.
        workspace_bytes: of cuBLAS, for both threads.
    """

    name: str
    usable_bytes: int
    compute_capability: tuple[int, int]
    workspace_bytes: int

    @property
    def context_bytes(self) -> int:
        return CONTEXT_BYTES


@cache
def _entries() -> dict[str, dict]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@cache
def _table() -> dict[str, GPU]:
    table = {}
    for key, entry in _entries().items():
        gpu = measured_gpu(entry["name"], int(entry["usable_gib"] * GIB), tuple(entry["compute_capability"]))
        for name in (key, entry["name"], *entry.get("aliases", ())):
            table.setdefault(_plain(name), gpu)
    return table


def measured_gpu(name: str, usable_bytes: int, compute_capability: tuple[int, int]) -> GPU:
    """A GPU as torch describes it, whether the table knows it or not.

    Args:
        usable_bytes: what torch reports as its total memory.
        compute_capability: such as (7, 5) for a T4.
    """
    workspace = 2 * (WORKSPACE_HOPPER if compute_capability[0] == 9 else WORKSPACE)
    return GPU(name, usable_bytes, compute_capability, workspace)


def known_gpus() -> dict[str, GPU]:
    """The GPUs of `gpus.json` by their short names."""
    return {key: find_gpu(key) for key in _entries()}


def _plain(name: str) -> str:
    """A name without its optional words: "NVIDIA GeForce RTX 4090" and "4090" are the same GPU."""
    words = re.sub(r"nvidia|geforce|tesla|quadro|rtx|gb\b", " ", name.lower())
    return "".join(c for c in words if c.isalnum())


def find_gpu(gpu: str | GPU) -> GPU:
    """A GPU by its short name, such as "t4" or "a100-80".

    Raises:
        ValueError: no GPU is known by this name.
    """
    if isinstance(gpu, GPU):
        return gpu
    found = _table().get(_plain(str(gpu)))
    if found is None:
        near = [key for key in known_gpus() if key.startswith(_plain(str(gpu)) or "-")] or difflib.get_close_matches(
            str(gpu), known_gpus(), 2
        )
        meant = f" (perhaps {' or '.join(near)})" if near else ""
        raise validation.refuse("gpu", gpu, f"known GPUs are {', '.join(known_gpus())}{meant}")
    return found
