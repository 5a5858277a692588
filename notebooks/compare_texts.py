"""What the text of a stored notebook says otherwise than its source.

    python notebooks/compare_texts.py notebooks/03_double_quantisation.ipynb   # any edition; several at once

An instructor changes a notebook, and its source says something else: this names the cell and the words.
"""

import difflib
import json
import sys
from pathlib import Path

import nbformat

import build

MOST_WORDS = 12  # of a difference are shown


def _shown(words: list[str]) -> str:
    more = len(words) - MOST_WORDS
    return " ".join(words[:MOST_WORDS]) + (f" … ({more} words more)" if more > 0 else "") if words else "nothing"


def differences(path: str | Path) -> list[str]:
    """Compare the Markdown cells of one stored notebook with what its source gives.

    Args:
        path: a notebook of `notebooks/`, `notebooks/solutions/` or `colab/`, or a copy of one in another folder: a
            lesson's file name says which source it has. What lies elsewhere is taken to be a learners' edition.

    Returns:
        One line for each difference, such as "lesson 03, cell 7: the text says 0.3735, its source 0.3730". Cells are
        counted from 1, as one counts on the page. Empty if the texts are the same, but for line breaks.

    Raises:
        ValueError: no lesson has this file's name.
    """
    path = Path(path)
    if path.stem not in build.lessons():
        raise ValueError(f"path={str(path)!r}: no lesson has this name; there are {', '.join(build.lessons())}")
    edition = next((name for name, folder in build.EDITIONS.items() if folder == path.resolve().parent), "learner")
    timings = json.loads(build.TIMINGS.read_text(encoding="utf-8"))
    expected = build.build_edition(path.stem, edition, timings).cells
    found = nbformat.read(path, as_version=4).cells
    lesson = f"lesson {path.stem[:2]}"

    def texts(cells):
        return [(at, cell.source.split()) for at, cell in enumerate(cells, start=1) if cell.cell_type == "markdown"]

    mine, source = texts(found), texts(expected)
    if len(mine) != len(source):
        lines = [f"{lesson}: {len(mine)} text cells, and its source has {len(source)}"]
        known = {tuple(words) for _, words in source}
        return lines + [
            f"{lesson}, cell {at}: not in its source: {_shown(w)}" for at, w in mine if tuple(w) not in known
        ]
    lines = []
    for (at, words), (_, wanted) in zip(mine, source, strict=True):
        if words == wanted:
            continue
        for kind, a, b, c, d in difflib.SequenceMatcher(None, words, wanted, autojunk=False).get_opcodes():
            if kind != "equal":
                lines.append(
                    f"{lesson}, cell {at}: the text says {_shown(words[a:b])}, its source {_shown(wanted[c:d])}"
                )
    return lines


def main() -> None:
    found = [line for path in sys.argv[1:] for line in differences(path)]
    print("\n".join(found) if found else f"{len(sys.argv) - 1} notebooks: their texts are those of their sources")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
