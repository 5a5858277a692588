"""Where runs are stored, what a run's folder holds, and whether a run may start or resume there.

Torch is not needed for this, so it is checked before the libraries are loaded.

A folder belongs to a run if it has a record, `run.json`, as `qlora_helpers.training.run.train` writes it. No other
folder with files in it is renamed, removed or written into.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_helpers.folder_locks import LOCK_INSIDE, FolderInUse, in_use
from qlora_helpers.json_files import read_json, read_json_if_whole
from qlora_helpers.paths import data_path
from qlora_helpers.safe_folders import probe_writing
from qlora_helpers.training.checksums import written_whole

__all__ = [
    "RECORD",
    "RESULT",
    "brought_up_to_date",
    "check_movable",
    "check_output",
    "complete_checkpoints",
    "gone_if_refused",
    "is_finished",
    "make_run_folder",
    "move_aside",
    "new_run_folder",
    "numbered_checkpoints",
    "read_record",
    "refuse_foreign",
    "runs_folder",
    "step_of",
    "steps_saved",
    "trainer_state",
    "unfinished_run_folder",
]

DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts it
RECORD = "run.json"  # what a run was begun with
# by method: the folder of what a finished run has trained
RESULT = {"qlora": "adapter", "lora": "adapter", "full": "model"}
RUN_BYTES = 50 * 10**6  # a run of the shipped model writes 8 MB
# what every run did before these became settings: an older record lacks them
BEFORE_IT_WAS_A_SETTING = {"method": "lora", "schedule": "linear", "max_grad_norm": 1.0}
_IN_EVERY_RECORD = {"steps", "chats", "model", "compute_dtype"}
# what is left of a run that was killed before it had begun
_NOTHING = re.compile(rf"{re.escape(LOCK_INSIDE)}|{RECORD}\.part|\.{RECORD}\.[0-9a-f]{{8}}\.qlora-new")
_CURE = "name a new or an empty folder"


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done at a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, complete or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """The trainer's state in a checkpoint; None if it is missing, cut off, or something else."""
    return read_json_if_whole(checkpoint / "trainer_state.json")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to the end, newest first.

    A checkpoint ends with its checksums. Those of older versions of this package ended with the trainer's state; the
    record of such a run does not say what it ran on.
    """
    checksums = "environment" in (read_record(folder) or {})
    return [
        path
        for path in numbered_checkpoints(folder)
        if written_whole(path) or not (checksums or trainer_state(path) is None)
    ]


def steps_saved(folder: Path) -> int:
    """The optimizer steps done at the newest complete checkpoint in a folder; 0 if there is none."""
    return next(map(step_of, complete_checkpoints(folder)), 0)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder was begun with; None if the folder holds no run of this course."""
    try:
        record = read_json(folder / RECORD)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    return brought_up_to_date(record) if record.keys() >= _IN_EVERY_RECORD else None


def brought_up_to_date(record: dict[str, Any]) -> dict[str, Any]:
    """A record that an older version of this package may have written, as this version would write it."""
    record = BEFORE_IT_WAS_A_SETTING | record
    if record["method"] == "lora" and record.get("quantization", "none") != "none":
        record["method"] = "qlora"  # older versions used one word for both
    return record


def is_finished(folder: Path) -> bool:
    """Whether the run has saved what it trained."""
    return any(any((folder / result).glob("*")) for result in set(RESULT.values()))


def check_output(folder: Path, name: str = "--output") -> dict[str, Any] | None:
    """Make sure that a run may use a folder: a new one, an empty one, or one that holds a run. Creates the folder.

    Args:
        folder: the folder for the run.
        name: of the argument, for the error.

    Returns:
        The record of the run in it; None if there is none.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: it holds files, but no run of this course.
        OSError: it cannot be created or written to, or its disk is full.
    """
    said = f"{name}={str(folder)!r}"
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(f"{said} is a link to {os.readlink(folder)}, which does not exist: {_CURE}")
    record = refuse_foreign(folder, name)
    make_run_folder(folder, name)
    free = shutil.disk_usage(folder).free
    if free < RUN_BYTES:
        raise OSError(
            f"{said}: its disk has {free / 1e6:.0f} MB left, and a run needs {RUN_BYTES / 1e6:.0f} MB. Free some "
            "space, or name a folder on another disk"
        )
    return record


def refuse_foreign(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of the run in a folder; None if the folder is empty, or not there.

    Args:
        folder: the folder for the run.
        name: of the argument, for the error.

    Raises:
        FileExistsError: it holds files, but no run of this course.
        OSError: it cannot be read.
    """
    said = f"{name}={str(folder)!r}"
    try:
        record = read_record(folder)
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise type(error)(f"{said} cannot be read ({error.strerror}): {_CURE}") from error
    held = [name for name in names if not _NOTHING.fullmatch(name)]
    if record is None and held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise FileExistsError(f"{said} holds {held[0]!r}{more} but no run of this course: {_CURE}")
    return record


def make_run_folder(folder: Path, name: str) -> None:
    """Create a folder for a run, if it does not exist, and make sure that it can be written to.

    Args:
        folder: the folder for the run.
        name: of the argument, for the error.

    Raises:
        NotADirectoryError: it is a file.
        OSError: it cannot be created or written to.
    """
    said = f"{name}={str(folder)!r}"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{said} is a file: {_CURE}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe_writing(folder)
    except OSError as error:
        cure = (
            "free some space, or name a folder on another disk"
            if error.errno == errno.ENOSPC
            else "name a folder of your own"
        )
        raise type(error)(f"{said} cannot be written to ({error.strerror}): {cure}") from error


@contextmanager
def gone_if_refused(folder: Path) -> Iterator[None]:
    """If what is to happen in a folder fails, remove the folder and those above it, as far as they are new and empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except FolderInUse:  # it is another's
        raise
    except BaseException:
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        raise


def check_movable(folder: Path, name: str = "--output") -> Path:
    """Whether the folder of a run can be moved aside; returns where it really is.

    Raises:
        ValueError: it holds no run of this course; or it is a link, the working folder or a folder above that.
    """
    said = f"{name}={str(folder)!r}"
    if read_record(folder) is None:
        raise ValueError(f"{said} holds no run of this course, so it is not renamed: {_CURE}")
    if folder.is_symlink():
        raise ValueError(
            f"{said} is a link to {folder.resolve()}, which holds a run. It is not renamed: {_CURE}, or "
            "continue it with --resume"
        )
    whole = folder.resolve()
    if whole in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(
            f"{said} is the folder you are in, or one above it, and holds a run. It is not renamed: {_CURE}, or "
            "continue it with --resume"
        )
    return whole


def move_aside(folder: Path, name: str = "--output") -> Path:
    """Rename the folder of a run after the time of its last change, so that a new run overwrites nothing.

    Raises:
        ValueError: as `check_movable` does.
        OSError: it cannot be renamed.
    """
    said, whole = f"{name}={str(folder)!r}", check_movable(folder, name)
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
            "continue it with --resume"
        ) from error
    return folder.with_name(target.name) if folder.name not in ("", "..") else target


def runs_folder() -> Path:
    """The folder for runs: the one that QLORA_RUNS names, else Google Drive if it is mounted, else `runs/`.

    `runs/` is in the course's folder, or in the working folder if the package is used without the course.
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
    """Create a new folder `name-1`, `name-2`, … for a run. Nothing is overwritten: the first free number is used.

    It is in the folder that QLORA_RUNS names; else in Google Drive, if Colab has mounted it; else in the course's
    `runs/`.

    Raises:
        ValueError: `name` is not the name of a folder.
        OSError: the folder cannot be created.
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
    """Create a folder; False if another process was quicker."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def unfinished_run_folder(name: str) -> Path:
    """The newest folder of this name whose run was begun but not finished, and which no process is writing into.

    If there is none, a new one.

    Raises:
        ValueError: `name` is not the name of a folder.
        OSError: the folder cannot be created.
    """
    _check_name(name)
    begun = [path for path in runs_folder().glob(f"{name}-*") if path.name.removeprefix(f"{name}-").isdigit()]
    for folder in sorted(begun, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (folder / RECORD).exists() and not is_finished(folder) and not in_use(folder):
            return folder
    return new_run_folder(name)
