"""Where the files that ship with the course lie, and where its runs go."""

import os
from pathlib import Path


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


def new_run_folder(name: str) -> Path:
    """Make a new folder `name-1`, `name-2`, … for a run, in the folder that QLORA_RUNS names, else in `runs/`.

    Nothing is overwritten: the first number that is free is taken. `runs/` lies beside the course's `data/`.
    """
    runs = Path(os.environ.get("QLORA_RUNS") or data_path().parent / "runs")
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
