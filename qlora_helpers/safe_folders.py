"""Folders that appear complete or not at all, even if the process is killed while it writes them.

A folder is written under a temporary name and then renamed. Between the two renames that replace an old folder, the
name does not exist for a moment; after a kill just then, `put_back` gives the old folder its name back. Temporary names
are hidden, unique and end in `.qlora-new` or `.qlora-old`. What other names hold is never touched, and what a kill left
is removed only by the next one who writes the same folder.
"""

from __future__ import annotations

import errno
import re
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qlora_helpers.folder_locks import FolderInUse, locked
from qlora_helpers.validation import switch

__all__ = ["KNOWN_FOLDERS", "probe_writing", "put_back", "whole_folder"]

NEW, OLD = ".qlora-new", ".qlora-old"
# in a model's folder, by transformers; in any folder, by JupyterLab and the Hub's client
KNOWN_FOLDERS = ("additional_chat_templates", ".ipynb_checkpoints", ".cache")
PATIENCE = 5  # seconds for a writer to finish its two renames


def probe_writing(folder: Path) -> None:
    """Write a temporary file into a folder, and delete it at once.

    Raises:
        OSError: writing is not allowed there, or the disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * 4096)
        file.flush()


@contextmanager
def whole_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder that appears complete or not at all.

    Yields a new folder beside it to write into, which gets the name `folder` when the block ends without an error. An
    old folder stays until then. Only one process at a time writes a folder. What the disk itself loses, such as in a power
    cut, is not prevented.

    Raises:
        FileExistsError: `folder` is a file; or it holds files, and `overwrite` is not set; or it holds another folder, as
            no saved model or adapter does.
        ValueError: `folder` is the working folder, or one above it, and so cannot be replaced; or `overwrite` is neither
            True nor False.
        FolderInUse: another process is writing it (`qlora_helpers.folder_locks`).
        OSError: nothing can be written beside `folder`.
    """
    said, folder, overwrite = f"folder={str(folder)!r}", _real(Path(folder)), switch("overwrite", overwrite)
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{said} is the folder you are in, or one above it: name one below it")
    with ExitStack() as lock:
        with _explained(said):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.enter_context(locked(folder))
        put_back(folder)
        _check_replaceable(folder, overwrite, said)
        for left in _left_by_a_kill(folder, NEW) + _left_by_a_kill(folder, OLD):
            _remove(left)
        part = _temporary(folder, NEW)
        with _explained(said):
            part.mkdir()
        try:
            with _full_disk_explained(folder, said):
                yield part
            _check_replaceable(folder, overwrite, said)  # something may have appeared there meanwhile
            _swap(folder, part)
        except BaseException:
            if part.exists():
                shutil.rmtree(part)
            raise


def put_back(folder: str | Path) -> Path:
    """If a kill has left an old folder without its name, give it back. Nothing else is touched.

    Returns:
        The folder as it was given.

    Raises:
        FolderInUse: the name is still missing, and another process is writing the folder.
    """
    given, folder, until = Path(folder), _real(Path(folder)), time.monotonic() + PATIENCE
    while not folder.exists() and (old := _left_by_a_kill(folder, OLD)):
        try:
            with locked(folder):
                if not folder.exists() and old[0].exists():
                    old[0].rename(folder)
        except FolderInUse:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    return given


def _real(folder: Path) -> Path:
    return folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder


@contextmanager
def _explained(said: str) -> Iterator[None]:
    """Say which argument names a place where nothing can be written, and what to do."""
    try:
        yield
    except FolderInUse:
        raise
    except OSError as error:
        raise type(error)(
            f"{said} cannot be written to ({error.strerror}): name a folder of your own; set QLORA_RUNS for new runs"
        ) from error


@contextmanager
def _full_disk_explained(folder: Path, said: str) -> Iterator[None]:
    """Say what to do when the disk is full; safetensors and torch have errors of their own for it."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder.parent).free
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise OSError(
            f"{said} could not be written: its disk is full, with {free / 1e6:.0f} MB left. Free some space, or name a "
            "folder on another disk"
        ) from error


def _check_replaceable(folder: Path, overwrite: bool, said: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{said} is a file: name a new folder")
    held = sorted(folder.iterdir())
    if held and not overwrite:
        raise FileExistsError(f"{said} is there already: name a new one, or pass overwrite=True")
    if inner := [path.name for path in held if path.is_dir() and path.name not in KNOWN_FOLDERS]:
        raise FileExistsError(
            f"{said} holds the folder {inner[0]!r}, as no saved model or adapter does, so it is not replaced: name a new one"
        )


def _temporary(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{kind}")


def _left_by_a_kill(folder: Path, kind: str) -> list[Path]:
    """The temporary folders of one kind that were made for this folder."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}{re.escape(kind)}")
    beside = folder.parent.iterdir() if folder.name and folder.parent.is_dir() else ()
    return [path for path in beside if pattern.fullmatch(path.name)]


def _swap(folder: Path, part: Path) -> None:
    """Give the new folder its name, and remove the old one."""
    old = _temporary(folder, OLD) if folder.exists() else None
    if old:
        folder.rename(old)
    try:
        part.rename(folder)
    except BaseException:
        if old:
            old.rename(folder)
        raise
    if old:
        left = _temporary(folder, NEW)  # from now on it is not one to put back
        old.rename(left)
        _remove(left)


def _remove(left: Path) -> None:
    try:
        shutil.rmtree(left)
    except OSError as error:  # what was to be written is there: this is no reason to fail
        warnings.warn(f"{left} is no longer needed but cannot be removed ({error.strerror})", stacklevel=4)
