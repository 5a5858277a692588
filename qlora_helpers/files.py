"""Where the files that ship with the course lie, and where its runs go."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OLD = ".being-replaced"  # behind the name of a folder while a new one takes its place; not .old, which may be a user's own
DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts it


def data_path(*parts: str) -> Path:
    """The path of a file or folder in the course's `data/`, such as `data_path("chats", "train.jsonl")`.

    Looked for in the folder that QLORA_DATA names, else beside this package, else above the working folder.

    Raises:
        FileNotFoundError: there is no such file in any of these places.
    """
    named = os.environ.get("QLORA_DATA")
    here = Path.cwd()
    places = (
        [Path(named)] if named else [folder / "data" for folder in (Path(__file__).parents[1], here, *here.parents)]
    )
    for place in places:
        if place.joinpath(*parts).exists():
            return place.joinpath(*parts)
    file = f"data/{'/'.join(parts)}"
    if named:
        raise FileNotFoundError(
            f"{file} is not in QLORA_DATA={named!r}: set it to the course's data folder, or unset it"
        )
    raise FileNotFoundError(
        f"{file} is not in {places[0]} nor above the working folder: run from a copy of the course's repository, or set "
        "QLORA_DATA to its data folder"
    )


def runs_folder() -> Path:
    """Where runs go: the folder that QLORA_RUNS names, else Google Drive if it is mounted, else beside `data/`."""
    if named := os.environ.get("QLORA_RUNS"):
        return Path(named)
    if DRIVE.is_dir():
        return DRIVE / "qlora-runs"
    return data_path().parent / "runs"


def probe_writing(folder: Path) -> None:
    """Write a file into a folder, which is gone at once.

    Raises:
        OSError: that is not allowed there, or its disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * 4096)
        file.flush()


def new_run_folder(name: str) -> Path:
    """Make a new folder `name-1`, `name-2`, … for a run. Nothing is overwritten: the first number that is free is taken.

    It lies in the folder that QLORA_RUNS names; else in Google Drive, if Colab has mounted it; else in the course's `runs/`.

    Raises:
        ValueError: `name` is no name of a folder.
        OSError: the folder cannot be made.
    """
    _check_name(name)
    runs = runs_folder()
    try:
        runs.mkdir(parents=True, exist_ok=True)
        number = 1
        while (runs / f"{name}-{number}").exists() or not _made(runs / f"{name}-{number}"):
            number += 1
    except OSError as error:
        named = f"QLORA_RUNS={str(runs)!r}" if os.environ.get("QLORA_RUNS") else f"{runs}, where runs go,"
        raise type(error)(
            f"{named} cannot be written to ({error.strerror}): set QLORA_RUNS to a folder of your own"
        ) from error
    return runs / f"{name}-{number}"


def _check_name(name: str) -> None:
    if not name or Path(name).name != name:
        raise ValueError(f"name={name!r}: pass the plain name of a folder, such as 'lesson-04'")


def _made(folder: Path) -> bool:
    """Make a folder; false if another process was quicker."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def unfinished_run_folder(name: str) -> Path:
    """The newest folder of this name whose run was begun and not finished; a new one if there is none.

    Raises:
        ValueError: `name` is no name of a folder.
        OSError: the folder cannot be made.
    """
    _check_name(name)
    begun = [path for path in runs_folder().glob(f"{name}-*") if path.name.removeprefix(f"{name}-").isdigit()]
    for folder in sorted(begun, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (folder / "run.json").exists() and not any([*folder.glob("adapter/*"), *folder.glob("model/*")]):
            return folder
    return new_run_folder(name)


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
