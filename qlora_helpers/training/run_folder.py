"""Where runs go, what a run's folder holds, and whether a run may begin or go on there.

It needs no library, so it is asked before any is loaded.

A folder is a run's if it has a record, `run.json`, as `qlora_helpers.training.run.train` writes it. Nothing else is renamed,
removed or written into.
"""

import errno
import json
import os
import shutil
import time
from pathlib import Path

from qlora_helpers.paths import data_path
from qlora_helpers.safe_folders import probe_writing

DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts it
RECORD = "run.json"  # what a run was begun with
# by the method: the folder of what a finished run has trained
RESULT = {"qlora": "adapter", "lora": "adapter", "full": "model"}
RUN_BYTES = 50 * 10**6  # a run of the shipped model writes 8 MB
_IN_EVERY_RECORD = {"steps", "chats", "model", "compute_dtype"}
_CURE = "name a new or an empty folder"


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def trainer_state(checkpoint: Path) -> dict | None:
    """The trainer's state in a checkpoint; None if it was cut off, since this file is written last."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def steps_saved(folder: Path) -> int:
    """Optimizer steps behind the newest checkpoint of a folder that was written to its end; 0 if there is none."""
    states = map(trainer_state, numbered_checkpoints(folder))
    return next((state["global_step"] for state in states if state), 0)


def read_record(folder: Path) -> dict | None:
    """What the run in a folder was begun with; None if the folder holds no run of this course."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) and record.keys() >= _IN_EVERY_RECORD else None


def is_finished(folder: Path) -> bool:
    """Whether what the run trained is there in whole."""
    return any(any((folder / result).glob("*")) for result in set(RESULT.values()))


def check_output(folder: Path, name: str = "--output") -> dict | None:
    """Whether a run may be in a folder: a new one, an empty one, or one that holds a run. Makes the folder.

    Args:
        folder: where the run shall go.
        name: of the argument that named it, for the error.

    Returns:
        The record of the run that is there; None if none is.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: it holds files, and no run of this course.
        OSError: it cannot be made or written into, or its disk is full.
    """
    said = f"{name}={str(folder)!r}"
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(f"{said} is a link to {os.readlink(folder)}, which is not there: {_CURE}")
    try:
        record = read_record(folder)
        held = (
            sorted(path.name for path in folder.iterdir() if path.name != f"{RECORD}.part") if folder.is_dir() else []
        )
    except OSError as error:
        raise type(error)(f"{said} cannot be read ({error.strerror}): {_CURE}") from error
    if record is None and held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise FileExistsError(f"{said} holds {held[0]!r}{more} and no run of this course: {_CURE}")
    make(folder, name)
    free = shutil.disk_usage(folder).free
    if free < RUN_BYTES:
        raise OSError(
            f"{said}: its disk has {free / 1e6:.0f} MB left, and a run needs {RUN_BYTES / 1e6:.0f} MB. Free some, or name a "
            "folder on another disk"
        )
    return record


def make(folder: Path, name: str) -> None:
    """Make a folder for a run, if it is not there, and make sure that it can be written into.

    Args:
        folder: where the run shall go.
        name: of the argument that named it, for the error.

    Raises:
        NotADirectoryError: it is a file.
        OSError: it cannot be made or written into.
    """
    said = f"{name}={str(folder)!r}"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{said} is a file: {_CURE}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe_writing(folder)
    except OSError as error:
        raise type(error)(f"{said} cannot be written to ({error.strerror}): name a folder of your own") from error


def move_aside(folder: Path, name: str = "--output") -> Path:
    """Rename the folder of a run after the time of its last change, so that a new run overwrites nothing.

    Raises:
        ValueError: it holds no run of this course; or it is a link, the working folder or a folder above that.
    """
    said = f"{name}={str(folder)!r}"
    if read_record(folder) is None:
        raise ValueError(f"{said} holds no run of this course, so it is not renamed: {_CURE}")
    if folder.is_symlink():
        raise ValueError(
            f"{said} is a link to {folder.resolve()}, which holds a run. It is not renamed: {_CURE}, or go on with --resume"
        )
    whole = folder.resolve()
    if whole in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(
            f"{said} is the folder you are in, or one above it, and holds a run. It is not renamed: {_CURE}, or go on with "
            "--resume"
        )
    stamp = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(whole.stat().st_mtime))
    target, number = whole.with_name(f"{whole.name}-until-{stamp}"), 2
    while target.exists():
        target = whole.with_name(f"{whole.name}-until-{stamp}-{number}")
        number += 1
    try:
        whole.rename(target)
    except OSError as error:
        raise type(error)(
            f"{said} holds a run that cannot be moved aside ({error.strerror or errno.errorcode[error.errno]}): {_CURE}, or "
            "go on with --resume"
        ) from error
    return folder.with_name(target.name) if folder.name not in ("", "..") else target


def runs_folder() -> Path:
    """Where runs go: the folder that QLORA_RUNS names, else Google Drive if it is mounted, else `runs/`.

    That is in the course's folder; in the working folder if the package is used without the course.
    """
    if named := os.environ.get("QLORA_RUNS"):
        return Path(named)
    if DRIVE.is_dir():
        return DRIVE / "qlora-runs"
    try:
        return data_path().parent / "runs"
    except FileNotFoundError:
        return Path("runs").absolute()


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
