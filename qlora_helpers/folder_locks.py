"""One writer per folder: a lock that the operating system takes back when its holder ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["LOCK_INSIDE", "FolderInUse", "in_use", "locked"]

LOCK_INSIDE = ".lock"  # the lock's file where nothing can be written beside the folder


class FolderInUse(BlockingIOError):
    """Another process, or another thread of this one, is writing into a folder; the message says which."""


def _lock_file(folder: Path) -> Path:
    """Beside the folder, as it may be renamed or not be there yet; in it where nothing can be written beside it."""
    folder = folder.resolve()  # two spellings of a folder have one lock
    if folder.name and (os.access(folder.parent, os.W_OK) or not folder.is_dir()):
        return folder.with_name(f".{folder.name}.lock")
    return folder / LOCK_INSIDE


@contextmanager
def locked(folder: str | Path, name: str = "folder") -> Iterator[None]:
    """Be the only one who writes into a folder. The folder above it must exist.

    Whoever has the lock may take it again, so that a function that locks can call another one that does.

    Args:
        folder: it need not exist.
        name: of the argument, for the error.

    Raises:
        FolderInUse: somebody else has the lock.
        OSError: no lock can be created there.
    """
    from filelock import FileLock, Timeout  # only here: the doctor must run where nothing is installed

    file = _lock_file(Path(folder))
    lock = FileLock(file, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(
            f"{name}={str(folder)!r} is being written by {_holder(file)}: wait until that has ended, or name another folder"
        ) from None
    except OSError as error:
        raise type(error)(
            f"{name}={str(folder)!r} cannot be locked ({error.strerror or error}): name a folder of your own, on another disk"
        ) from error
    signed = False
    try:
        signed = lock.lock_counter == 1 and _sign(file)
        yield
    finally:
        try:
            if signed:  # filelock notices a file that was removed
                file.unlink(missing_ok=True)
        finally:
            lock.release()


def in_use(folder: str | Path) -> bool:
    """Whether somebody is writing into a folder just now."""
    try:
        with locked(folder):
            return False
    except FolderInUse:
        return True
    except OSError:  # nothing can be written there
        return False


def _this_process() -> dict[str, str | int]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv)[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _sign(file: Path) -> bool:
    """Write into the file of a lock who holds it, if it can be written into.

    Windows closes it to everybody, and removes it with the lock. Where a file system has no locks, filelock keeps notes
    of its own in it.
    """
    if os.name == "nt":
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    if text and not text.startswith('{"process": '):
        return False
    file.write_text(json.dumps(_this_process()), encoding="utf-8")
    return True


def _holder(file: Path) -> str:
    """Who has the lock, as far as the file tells."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # on Windows others cannot read it; or it was just made
        said = json.loads(file.read_text(encoding="utf-8"))
        return f"process {said['process']} on {said['host']} since {said['since']} ({said['command']})"
    return f"another process (if none is running any more, delete {file})"
