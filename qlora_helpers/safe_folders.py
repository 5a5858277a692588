"""Folders that are there in whole or not at all, whatever happens while they are written."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OLD = ".being-replaced"  # behind the name of a folder while a new one takes its place; not .old, which may be a user's own


def probe_writing(folder: Path) -> None:
    """Write a file into a folder, which is gone at once.

    Raises:
        OSError: that is not allowed there, or its disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * 4096)
        file.flush()


@contextmanager
def whole_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder that will be there in whole or not at all, whatever happens in between.

    Yields a new folder beside it to write into; it gets its name when the block has ended without an error. An old folder
    stays until then, and is put back by `settle` if the process is killed between the two renames.

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
            shutil.rmtree(part)  # a kill came while it was written
        part.mkdir(parents=True)
    except OSError as error:
        raise type(error)(
            f"{said} cannot be written to ({error.strerror}): name a folder of your own; set QLORA_RUNS for those of new runs"
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
    """Finish what a kill has cut off while `whole_folder` replaced a folder: the old one comes back, or is removed.

    Returns:
        The folder; of a link, the one that it leads to.
    """
    folder = Path(folder)
    if folder.is_symlink() or folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:  # the root of a disk, which nothing replaces
        return folder
    old = folder.with_name(f"{folder.name}{OLD}")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    return folder
