"""Folders that appear complete or not at all, whatever happens while they are written."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["probe_writing", "settle", "whole_folder"]

OLD = ".being-replaced"  # suffix of a folder while a new one replaces it; not .old, which a user may have used


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
    """Write a folder that appears complete or not at all, whatever happens in between.

    Yields a new folder beside it to write into, which gets the name `folder` when the block ends without an error. An
    old folder stays until then; if the process is killed between the two renames, `settle` puts it back.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        ValueError: `folder` is the working folder, or one above it, and so cannot be replaced.
        OSError: nothing can be written beside `folder`.
    """
    said, folder = f"folder={str(folder)!r}", settle(folder)
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{said} is the folder you are in, or one above it: name one below it")
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}{OLD}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise FileExistsError(f"{said} is there already: name a new one, or pass overwrite=True")
    try:
        if part.exists():
            shutil.rmtree(part)  # left by a kill
        part.mkdir(parents=True)
    except OSError as error:
        raise type(error)(
            f"{said} cannot be written to ({error.strerror}): name a folder of your own; set QLORA_RUNS for new runs"
        ) from error
    try:
        yield part
    except BaseException:
        shutil.rmtree(part)
        raise
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    settle(folder)


def settle(folder: str | Path) -> Path:
    """Clean up after a kill inside `whole_folder`: put the old folder back, or remove it if the new one is there.

    Returns:
        The folder; for a link, its target.
    """
    folder = Path(folder)
    if folder.is_symlink() or folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:  # the root of a disk, which cannot be replaced
        return folder
    old = folder.with_name(f"{folder.name}{OLD}")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    return folder
