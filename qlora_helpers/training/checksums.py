"""The checksums of a checkpoint: they are written last, and tell later whether all of it is there and unchanged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qlora_helpers.json_files import read_json_if_whole, write_json

__all__ = ["CHECKSUMS", "changed_files", "count_of_states", "write_checksums", "written_by", "written_whole"]

CHECKSUMS = "checksums.json"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_checksums(checkpoint: Path, optimizer_states: int, processes: int = 1, sharding: str | None = None) -> None:
    """Write the sha256 of each file in a checkpoint; a kill leaves the list complete or missing.

    Args:
        optimizer_states: for how many tensors the optimizer has a state.
        processes, sharding: of the run that writes it, as in `qlora_helpers.launch`.
    """
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != CHECKSUMS)
    said: dict[str, Any] = {"files": {path.name: _sha256(path) for path in files}, "optimizer_states": optimizer_states}
    if processes > 1:
        said["processes"] = processes
    if sharding:
        said["sharding"] = sharding
    write_json(checkpoint / CHECKSUMS, said)


def written_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / CHECKSUMS).is_file()


def _read(checkpoint: Path) -> dict[str, Any] | None:
    """What is written there; None if it is damaged."""
    said = read_json_if_whole(checkpoint / CHECKSUMS) or {}
    is_ours = isinstance(said.get("files"), dict) and isinstance(said.get("optimizer_states"), int)
    return said if is_ours else None


def written_by(checkpoint: Path) -> tuple[int, str | None]:
    """By how many processes a checkpoint was written, and how they sharded the model, if they did."""
    said = (_read(checkpoint) if written_whole(checkpoint) else None) or {}
    return said.get("processes", 1), said.get("sharding")


def changed_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that are missing or not as they were written; the list itself if that is damaged."""
    if (said := _read(checkpoint)) is None:
        return [CHECKSUMS]
    return [
        name
        for name, wanted in said["files"].items()
        if not (checkpoint / name).is_file() or _sha256(checkpoint / name) != wanted
    ]


def count_of_states(checkpoint: Path) -> int | None:
    """For how many tensors the optimizer had a state; None if the checkpoint has no checksums."""
    return _read(checkpoint)["optimizer_states"] if written_whole(checkpoint) else None
