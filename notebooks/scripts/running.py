"""How the editions of a lesson run in one kernel, and how much memory a kernel takes. For the build and the tests."""

import sys
from pathlib import Path

import psutil
from nbformat import NotebookNode


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_tag(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def in_one_kernel(
    learner: list[NotebookNode], solved: list[NotebookNode]
) -> list[tuple[tuple[str, ...], NotebookNode]]:
    """The order in which one kernel runs the code cells of the learner's and the solved edition: (editions, cell).

    At an exercise, the learner's cell comes first, followed by the cell that checks the answer; then the solution,
    followed by the same check. All other cells are for both editions.

    Args:
        learner, solved: the code cells of the two editions of one lesson, built or stored.

    Raises:
        ValueError: a cell is in only one edition, and is neither an exercise nor a solution.
    """
    both, runs = ("learner", "solutions"), []
    place = {"exercise": [], "solution": []}
    mine, theirs = iter(learner), iter(solved)
    for cell in mine:
        if has_tag(cell, "exercise"):
            place["exercise"].append(cell)
            continue
        other = next(theirs, None)
        while other and has_tag(other, "solution"):
            place["solution"].append(other)
            other = next(theirs, None)
        if other is None or other.source != cell.source:
            raise ValueError(f"neither an exercise nor a solution, but in one edition only: {cell.source[:60]!r}")
        if any(place.values()):
            runs += [(("learner",), found) for found in (*place["exercise"], cell)]
            runs += [(("solutions",), found) for found in (*place["solution"], other)]
            place = {"exercise": [], "solution": []}
        else:
            runs.append((both, other))
    if left := [*place["exercise"], *place["solution"], *theirs]:
        raise ValueError(f"no cell after it checks it: {left[0].source[:60]!r}")
    return runs


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held so far, in bytes: its peak resident set.

    macOS does not report this for another process; there it is what the process holds now.
    """
    if sys.platform == "linux":
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024  # Linux counts in KiB
    memory = psutil.Process(pid).memory_info()
    return getattr(memory, "peak_wset", memory.rss)  # Windows has the first
