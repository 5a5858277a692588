"""Where the files that ship with the course lie, and where its runs go."""

import os
from pathlib import Path

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
    raise FileNotFoundError(
        f"data/{'/'.join(parts)} is not in {places[0]}{'' if named else ' nor above the working folder'}: "
        "run from a copy of the course's repository, or set QLORA_DATA to its data folder"
    )


def _runs() -> Path:
    """Where runs go: the folder that QLORA_RUNS names, else Google Drive if it is mounted, else beside `data/`."""
    if named := os.environ.get("QLORA_RUNS"):
        return Path(named)
    if DRIVE.is_dir():
        return DRIVE / "qlora-runs"
    return data_path().parent / "runs"


def new_run_folder(name: str) -> Path:
    """Make a new folder `name-1`, `name-2`, … for a run. Nothing is overwritten: the first number that is free is taken.

    It lies in the folder that QLORA_RUNS names; else in Google Drive, if Colab has mounted it; else in the course's `runs/`.
    """
    runs = _runs()
    runs.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = runs / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def unfinished_run_folder(name: str) -> Path:
    """The newest folder of this name whose run was begun and not finished; a new one if there is none."""
    begun = [path for path in _runs().glob(f"{name}-*") if path.name.removeprefix(f"{name}-").isdigit()]
    for folder in sorted(begun, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (folder / "run.json").exists() and not any((folder / "adapter").glob("*")):
            return folder
    return new_run_folder(name)
