"""JSON files that hold one object: written whole or not at all, and read with a reason if they are damaged."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

__all__ = ["read_json", "read_json_if_whole", "write_json"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no object; the message says why, as in "is damaged (Expecting value: …)".
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def read_json_if_whole(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file is missing, damaged, or something else."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file; a kill leaves it complete, or as it was."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.qlora-new")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
