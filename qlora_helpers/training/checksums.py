"""The checksums of a checkpoint: they are written last, and tell later whether all of it is there and unchanged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["CHECKSUMS", "changed_files", "optimizer_states", "write_checksums", "written_whole"]

CHECKSUMS = "checksums.json"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_checksums(checkpoint: Path, optimizer_states: int) -> None:
    """Write the sha256 of each file in a checkpoint; a kill leaves the list complete or missing.

    Args:
        optimizer_states: for how many tensors the optimizer has a state.
    """
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != CHECKSUMS)
    said = {"files": {path.name: _sha256(path) for path in files}, "optimizer_states": optimizer_states}
    part = checkpoint / f"{CHECKSUMS}.part"
    part.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    os.replace(part, checkpoint / CHECKSUMS)


def written_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / CHECKSUMS).is_file()


def _said(checkpoint: Path) -> dict[str, Any] | None:
    """What is written there; None if it is damaged."""
    try:
        said = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        return said if isinstance(said["files"], dict) and isinstance(said["optimizer_states"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def changed_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that are missing or not as they were written; the list itself if that is damaged."""
    if (said := _said(checkpoint)) is None:
        return [CHECKSUMS]
    return [
        name
        for name, wanted in said["files"].items()
        if not (checkpoint / name).is_file() or _sha256(checkpoint / name) != wanted
    ]


def optimizer_states(checkpoint: Path) -> int | None:
    """For how many tensors the optimizer had a state; None if the checkpoint has no checksums."""
    return _said(checkpoint)["optimizer_states"] if written_whole(checkpoint) else None
