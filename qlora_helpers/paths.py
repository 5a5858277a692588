"""Where the files that ship with the course lie."""

import os
from pathlib import Path

COURSE = Path(__file__).resolve().parents[1]  # the repository; of an installed copy, where packages lie


def data_path(*parts: str) -> Path:
    """The path of a file or folder in the course's `data/`, such as `data_path("chats", "train.jsonl")`.

    Looked for in the folder that QLORA_DATA names, else beside this package, else above the working folder.

    Raises:
        FileNotFoundError: there is no such file in any of these places.
    """
    named = os.environ.get("QLORA_DATA")
    here = Path.cwd()
    places = [Path(named)] if named else [folder / "data" for folder in (COURSE, here, *here.parents)]
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
