"""The alt texts of the lessons' figures, by their numbers: figure 2.1 is the first of lesson 2.

They lie in `alt_texts/02.json` and so on, away from the code that draws the figures. A figure that is one of the
course's diagrams names it, `{"3.1": {"diagram": "two_levels"}}`; the diagrams' texts are in `alt_texts/diagrams.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

__all__ = ["FOLDER", "alt_text", "is_number", "texts_of_lesson"]

FOLDER = Path(__file__).with_name("alt_texts")


def is_number(text: str) -> bool:
    """Whether a text is the number of a figure, such as "2.1", and nothing else."""
    return re.fullmatch(r"[1-9]\d?\.[1-9]\d?", text) is not None


def _read(name: str) -> dict:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def texts_of_lesson(lesson: int) -> dict[str, str]:
    """The alt texts of a lesson's figures by their numbers, in order; none if the lesson has no file of them.

    Raises:
        ValueError: an entry is neither a text nor one of the diagrams.
    """
    diagrams = _read("diagrams")
    texts = {}
    for number, entry in _read(f"{lesson:02d}").items():
        text = diagrams.get(entry.get("diagram")) if isinstance(entry, dict) else entry
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"alt_texts/{lesson:02d}.json: {number!r} is {entry!r}, and must be a text or a diagram's name"
            )
        texts[number] = text
    return texts


def alt_text(number: str) -> str:
    """The alt text of a lesson's figure.

    Raises:
        ValueError: there is none for this number.
    """
    lesson = int(number.partition(".")[0])
    texts = texts_of_lesson(lesson)
    if number not in texts:
        known = ", ".join(texts) or "none"
        raise ValueError(
            f"figure {number}: it has no alt text in qlora_helpers/course/alt_texts/{lesson:02d}.json, which has {known}. "
            "Say there in words what it shows, or pass alt="
        )
    return texts[number]
