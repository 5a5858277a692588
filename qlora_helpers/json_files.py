"""Files that are written whole or not at all: JSON with one object, read with a reason if it is damaged; text; any new file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["new_file", "read_json", "read_json_if_whole", "write_json", "write_new", "write_whole"]


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
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, content: str) -> None:
    """Write a text file in UTF-8; a kill leaves it complete, or as it was."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.qlora-new")
    try:
        part.write_text(content, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file under a name that is free, for a writer that wants a path; a kill leaves it complete, or not there.

    Yields the path of a temporary file beside it, not there yet, which gets the name `path` when the block ends without an
    error.

    Raises:
        FileExistsError: there is something under this name.
        OSError: it cannot be written.
    """
    there = f"path={str(path)!r} is there already: name a new file"
    if os.path.lexists(path):
        raise FileExistsError(there)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.qlora-new")
    try:
        yield part
        try:
            os.link(part, path)  # unlike a renaming, it fails if something has appeared there meanwhile
        except FileExistsError as error:
            raise FileExistsError(there) from error
        except OSError:  # a disk without hard links, such as a memory stick
            part.rename(path)
    except FileExistsError:
        raise
    except OSError as error:
        raise type(error)(
            f"path={str(path)!r} cannot be written ({error.strerror}): name a file in a folder of yours"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_new(path: Path, content: Iterable[bytes]) -> None:
    """Write a file under a name that is free; a kill leaves it complete, or not there.

    Raises:
        FileExistsError: there is something under this name.
        OSError: it cannot be written.
    """
    with new_file(path) as part, part.open("xb") as file:
        file.writelines(content)
