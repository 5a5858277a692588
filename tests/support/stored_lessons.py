"""Small notebooks with the outputs that the checks of exercises and a quiz store."""

import json
from pathlib import Path

LINES = {
    "right": "✓ Exercise {}, {}: right!",
    "wrong": "✗ Exercise {}, {}: 4 is not right. Hint: Count first.",
    "open": "○ Exercise {}, {}: not solved yet. Replace the dots (...) in the cell above, run that cell, then run this one.",
}
TITLES = {1: "the bits in a code", 2: "a format of your own", 3: "a run: by hand"}


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def code(source: str, printed: str = "", count: int | None = None) -> dict:
    outputs = (
        [{"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}] if printed else []
    )
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": outputs, "execution_count": count}


def lesson(results=("right", "wrong", "open"), number: int = 2, quiz: str = "", made: str = "", **changed) -> dict:
    """A lesson's notebook; results are of its exercises in order, and a quiz has ✓, ✗ or ○ for each question.

    Args:
        made: the hash of the code that it was built with.
        changed: cells by their places, such as `c3=cell`; None removes one.
    """
    cells = [markdown(f"# {number} · NF4 against int4: which?\n\nYou will\n- see"), code("import torch", "", 1)]
    for place, result in enumerate(results, start=1):
        title = TITLES[place]
        cells += [
            markdown(f"Text.\n\n## Exercise {number}.{place}: {title}\n\n*Build · easy · about 5 minutes.* Write."),
            code("answer = ..." if result == "open" else "answer = 4", "", 2 * place),
            code("exercises.it.check(answer)", LINES.get(result, "").format(f"{number}.{place}", title), 2 * place + 1),
        ]
    if quiz:
        asked = "\n\n".join(f"**{number}.{place}** Which?\n\n- **a** this" for place in range(1, len(quiz) + 1))
        lines = "\n".join(f"{sign} Quiz {number}.{place}: said" for place, sign in enumerate(quiz, start=1))
        cells += [
            markdown("## Quiz"),
            markdown(asked),
            code("answers = {1: ...}", "", 20),
            code("mark(2, answers)", lines, 21),
        ]
    cells.append(markdown("## You have\n- seen"))
    for place, cell in changed.items():
        cells[int(place[1:])] = cell
    metadata = {"course": {"executed_code": made}} if made else {}
    return {"cells": [cell for cell in cells if cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def save(path: Path, notebook: dict | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook), encoding="utf-8")
    return path
