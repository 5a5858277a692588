"""A lesson as one Markdown page: its text, code and stored outputs, each solution folded below its exercise.

The page is made of two editions of the lesson: the learners' one and the solved one. They have the same cells, except
that where one has an exercise the other has its solution, and that the checks after it say something else.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_HEADING = re.compile(r"^#{1,6} ", re.M)


def _tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def _text(value: str | list[str]) -> str:
    """nbformat stores a text as one string or as its lines."""
    return value if isinstance(value, str) else "".join(value)


def fenced(content: str, opening: str, *options: str) -> str:
    """A directive around any content: its fence is longer than each row of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join(
        [
            f"{fence}{{{opening.partition(' ')[0]}}}{opening[len(opening.partition(' ')[0]) :]}",
            *options,
            "",
            content.rstrip("\n"),
            fence,
        ]
    )


def code(cell: dict) -> str:
    """The code of a cell, for reading."""
    source = _text(cell["source"])
    language = "text" if re.search(r"^[!%]", source, re.M) else "python"  # a shell's or a notebook's own command
    return fenced(source, f"code-block {language}", ":class: cell-code")


def outputs(cell: dict) -> list[str]:
    """What a cell printed and showed, in order.

    Raises:
        ValueError: an output of a kind that no lesson has had so far.
    """
    parts: list[tuple[str, str]] = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        if output["output_type"] == "stream":
            kind, content = "printed", _ANSI.sub("", _text(output["text"]))
        elif "text/html" in data:
            kind, content = "shown", _text(data["text/html"])
        elif "text/plain" in data and not any(name.startswith("image/") for name in data):
            kind, content = "result", _text(data["text/plain"])
        else:
            raise ValueError(
                f"an output of the kind {', '.join(data) or output['output_type']} in the cell that begins with "
                f"{_text(cell['source'])[:60]!r}: pages have text and HTML; show figures with plots.show"
            )
        if parts and kind == parts[-1][0] == "printed":  # one text, which may be stored in pieces of any size
            content = parts.pop()[1] + content
        parts.append((kind, content))
    return [
        fenced(f'<div class="cell-shown">\n{content.strip()}\n</div>', "raw html")
        if kind == "shown"
        else fenced(content.strip("\n"), "code-block text", ":class: cell-output")
        for kind, content in parts
        if content.strip()
    ]


def paired(learner: list[dict], solved: list[dict]) -> Iterator[tuple[dict | None, dict | None]]:
    """The cells of both editions side by side; an exercise has None beside it, and so has a solution.

    Raises:
        ValueError: the editions differ in more than exercises and solutions.
    """
    mine, theirs = iter(learner), iter(solved)
    one, other = next(mine, None), next(theirs, None)
    while one or other:
        if one and "exercise" in _tags(one):
            yield one, None
            one = next(mine, None)
        elif other and "solution" in _tags(other):
            yield None, other
            other = next(theirs, None)
        else:
            same = one and other and one["cell_type"] == other["cell_type"]
            if not same or (one["cell_type"] == "code" and _text(one["source"]) != _text(other["source"])):
                source = _text((one or other)["source"])
                raise ValueError(
                    f"the learners' and the solved edition differ at the cell {source[:60]!r}: run make notebooks"
                )
            yield one, other
            one, other = next(mine, None), next(theirs, None)


def page(learner: list[dict], solved: list[dict]) -> str:
    """The Markdown of a lesson's page, from the cells of both editions."""
    parts: list[str] = []
    solution: list[str] = []

    def close() -> None:
        if solution:
            parts.append(fenced("\n\n".join(solution), "solution"))
            solution.clear()

    for one, other in paired(learner, solved):
        if one is None:
            solution.append(code(other) if other["cell_type"] == "code" else _text(other["source"]))
            solution += outputs(other) if other["cell_type"] == "code" else []
            continue
        if (other is None and solution) or (one["cell_type"] == "markdown" and _HEADING.search(_text(one["source"]))):
            close()
        if one["cell_type"] == "markdown":
            parts.append(_text(one["source"]))
        elif one["cell_type"] == "code":
            shown = outputs(one)
            parts += [code(one), *shown]
            if solution and other and (after := outputs(other)) != shown:
                solution += after
    close()
    return "\n\n".join(parts) + "\n"


def read(path: Path) -> list[dict]:
    """The cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]
