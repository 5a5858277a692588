"""Where the files that ship with the course are."""

import os
from pathlib import Path

__all__ = ["COURSE", "data_path"]

COURSE = Path(__file__).resolve().parents[1]  # the repository; for an installed copy, the folder of installed packages


def data_path(*parts: str) -> Path:
    """The path of a file or folder in the course's `data/`, such as `data_path("chats", "train.jsonl")`.

    It is searched for in the folder that QLORA_DATA names; if that is not set, in the `data/` beside this package, in
    the working folder, and in the folders above that.

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
        f"{file} is neither in {places[0]} nor above the working folder: run from a copy of the course's repository, "
        "or set QLORA_DATA to its data folder"
    )
