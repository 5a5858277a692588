"""Before class: is this machine ready, and do the lessons give the results here that they show?

    make preflight              # all lessons
    make preflight LESSON=03    # one of them

Each lesson is compared with its source, then run by nbval as learners get it: every cell must run, and the output of each
cell with the tag nbval-check-output must be what the notebook stores. One row per lesson shows the result.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

from qlora_helpers.commands import doctor
from qlora_helpers.paths import COURSE
from qlora_helpers.streams import take_any_character

__all__ = ["CannotStart", "add_arguments", "chosen", "command", "differences", "preflight", "run_lessons"]

SHOWN = ("Python", "torch", "memory", "GPU", "gear")  # which of the doctor's facts are printed
NOTEBOOKS = COURSE / "notebooks"
NEEDED = {"pytest": "pytest", "nbval": "nbval", "xdist": "pytest-xdist", "jupytext": "jupytext", "nbformat": "nbformat"}
NOT_CHECKED = (
    "Not checked: figures (only that they are drawn), cells that are not compared (they only have to run), values in brackets "
    "such as (measured 0.91), which differ between machines, the solved and the Colab editions, the helpers' own tests, what "
    "runs on a GPU (the lessons run in the cpu gear here). For these there are make test, make test-all and make test-colab."
)


UNREADABLE = "is not a readable notebook"


class CannotStart(ValueError):
    """The lessons cannot be run at all; the message says why, and the cure."""


def chosen(lessons: list[str]) -> list[str]:
    """The names of the lessons that are chosen by number or name; all if none is chosen.

    Raises:
        CannotStart: this is not a copy of the repository, a package is missing, or there is no such lesson.
    """
    if not (COURSE / "conftest.py").exists() or not NOTEBOOKS.is_dir():
        raise CannotStart(f"{COURSE} is not a copy of the course's repository: run this in one")
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise CannotStart(f"not installed: {', '.join(missing)}. Run  pip install -r requirements.txt")
    there = sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    names = [name for name in there if not lessons or name in lessons or name[:2] in {n.zfill(2) for n in lessons}]
    known = {part for name in there for part in (name, name[:2], name[:2].lstrip("0"))}
    if wrong := [lesson for lesson in lessons if lesson not in known]:
        raise CannotStart(f"LESSON={' '.join(wrong)}: there is no such lesson. There are {', '.join(there)}")
    return names


def differences(name: str) -> list[str]:
    """How a learner's notebook differs from what its source gives, in words: text, code, tags; and what was never run."""
    sys.path[:0] = [str(COURSE)]  # it can be run from any folder
    try:
        from notebooks.scripts import build
    finally:
        del sys.path[0]
    import nbformat

    path = NOTEBOOKS / f"{name}.ipynb"
    try:
        stored = nbformat.read(path, as_version=4).cells
    except Exception as error:  # an incomplete download, or conflict markers of a merge
        return [f"{path.name} {UNREADABLE}: {str(error).splitlines()[0]}"]
    if not (build.SOURCES / f"{name}.py").exists():
        return [f"its source {build.SOURCES.name}/{name}.py is not here, so the text cannot be compared with it"]
    given = build.build_edition(name, "learner", json.loads(build.TIMINGS.read_text(encoding="utf-8"))).cells
    found = []
    if len(stored) != len(given):
        found.append(f"it has {len(stored)} cells, and its source {len(given)}")
    for number, (mine, theirs) in enumerate(zip(stored, given, strict=False), start=1):
        place = f"cell {number}" if mine.cell_type == "markdown" else f"cell [{mine.execution_count}]"
        if mine.cell_type != theirs.cell_type:
            found.append(f"{place} is {mine.cell_type}, and {theirs.cell_type} in its source")
            break
        lines, others = mine.source.splitlines(), theirs.source.splitlines()
        for line, other in zip(lines + [""] * len(others), others + [""] * len(lines), strict=False):
            if line != other:
                said, of = _around(line, other)
                found.append(
                    f"{place} ({'text' if mine.cell_type == 'markdown' else 'code'}) says {said!r}, its source {of!r}"
                )
                break
        if mine.metadata.get("tags", []) != theirs.metadata.get("tags", []):
            found.append(
                f"{place}: its tags are {mine.metadata.get('tags', [])}, in its source {theirs.metadata.get('tags', [])}"
            )
        if mine.cell_type == "code" and mine.execution_count is None:
            found.append(f"cell {number} was never executed, so its output is not compared: {mine.source[:40]!r}")
    return found


def _around(line: str, other: str, room: int = 24) -> tuple[str, str]:
    """Two lines that differ, cut down to where they do."""
    start = _alike(line, other)
    end = _alike(line[start:][::-1], other[start:][::-1])

    def cut(text: str) -> str:
        first, last = max(0, start - room), min(len(text), len(text) - end + room)
        return ("…" if first else "") + text[first:last] + ("…" if last < len(text) else "")

    return cut(line), cut(other)


def _alike(one: str, other: str) -> int:
    """How many characters two texts share at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Table:
    """A pytest plugin that prints a row for each lesson as soon as its last cell has run."""

    def __init__(self, faults: dict[str, list[str]], out):
        self.faults, self.out = faults, out
        self.cells, self.done = Counter(), Counter()
        self.compared, self.seconds, self.peak = Counter(), Counter(), Counter()
        self.ok: dict[str, bool] = {}
        self.failed: dict[str, list[str]] = {name: [] for name in faults}

    def count(self, ids: list[str]) -> None:
        self.cells = Counter(self.lesson(nodeid) for nodeid in ids)

    def lesson(self, nodeid: str) -> str:
        return Path(nodeid.partition("::")[0]).stem

    def pytest_collection_finish(self, session):
        if session.items:
            self.count([item.nodeid for item in session.items])

    def pytest_collectreport(self, report):
        if report.failed and report.nodeid.endswith(".ipynb"):
            self.failed[self.lesson(report.nodeid)].append(str(report.longrepr).strip().splitlines()[-1])

    def pytest_runtest_logreport(self, report):
        name, said = self.lesson(report.nodeid), dict(report.user_properties)
        self.seconds[name] += report.duration
        self.compared[name] += report.when == "call" and said.get("compared", False)
        self.peak[name] = max(self.peak[name], said.get("peak_bytes", 0))
        if report.failed:
            self.failed.setdefault(name, []).append(
                said.get("fault") or f"{report.when}: {report.longreprtext.strip().splitlines()[-1]}"
            )
        if report.when == "teardown":
            self.done[name] += 1
            if self.done[name] == self.cells[name]:
                self.row(name)

    def row(self, name: str) -> None:
        failed = [*self.faults.get(name, []), *self.failed.get(name, [])]
        self.ok[name] = not failed and self.done[name] == self.cells[name] > 0
        if not self.ok[name] and not failed:
            failed = [f"{self.done[name]} of its {self.cells[name]} cells ran"]
        mark = "✓" if self.ok[name] else "✗"
        counts = f"{self.cells[name]:6}{self.compared[name]:10}{self.seconds[name]:9.0f}{self.peak[name] / 1e9:9.2f}"
        print(f"{mark} {name:28}{counts}", file=self.out)
        for fault in failed[:4]:
            print(f"    lesson {name[:2]}, {fault}", file=self.out)
        if len(failed) > 4:
            print(f"    … and {len(failed) - 4} more, most likely because of these", file=self.out)
        self.out.flush()


class _TableOfWorkers(_Table):
    """The same if workers run the lessons: they collect, so they know how many cells there are."""

    def pytest_xdist_node_collection_finished(self, node, ids):
        self.count(ids)


def run_lessons(names: list[str], out: TextIO | None = None) -> bool:
    """Run the lessons through nbval, two at a time, and print the table. Returns whether all is as it should be."""
    import pytest

    if out is None:
        stdout = sys.stdout
        out = os.fdopen(os.dup(stdout.fileno()), "w", encoding=stdout.encoding, errors=stdout.errors)
    faults = {name: differences(name) for name in names}
    several = len(names) > 1
    table = (_TableOfWorkers if several else _Table)(faults, out)
    print(f"\n  {'lesson':28}{'cells':>6}{'compared':>10}{'seconds':>9}{'peak GB':>9}", file=out, flush=True)
    readable = [name for name in names if not any(UNREADABLE in fault for fault in faults[name])]
    paths = [str(NOTEBOOKS / f"{name}.ipynb") for name in readable]
    arguments = ["--rootdir", str(COURSE), "-c", str(COURSE / "pyproject.toml"), "-p", "no:cacheprovider", *paths]
    with (
        tempfile.NamedTemporaryFile("w", prefix="preflight-", suffix=".log", delete=False, encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = pytest.main([*arguments, *(["-n", "2"] if several else [])], plugins=[table]) if readable else 1
    for name in names:
        if name not in table.ok:
            table.row(name)
    good = code == 0 and all(table.ok.values())
    if good:
        Path(log.name).unlink()
    else:
        print(f"\nThe whole output: {log.name}", file=out, flush=True)
    return good


def preflight(lessons: list[str]) -> int:
    """The exit code: 0 if the machine is ready and the lessons hold, 1 if not, 2 if they could not be run."""
    started = time.perf_counter()
    try:
        names = chosen(lessons)
    except CannotStart as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = doctor.examine()
    print("This machine: " + ", ".join(f"{name} {value}" for name, value in report.facts if name in SHOWN))
    for finding in report.findings:
        print(finding)
    good = run_lessons(names) and not report.problems
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    verdict = "✓ ready" if good else "✗ not ready"
    print(f"\n{verdict}: {len(names)} lesson{'s' * (len(names) > 1)} in {minutes} min {seconds} s.\n{NOT_CHECKED}")
    return 0 if good else 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help="numbers of lessons, such as 03; all by default")


def command(args: argparse.Namespace) -> int:
    """Check the machine and the lessons: 0 if all is ready."""
    return preflight(args.lessons)


if __name__ == "__main__":  # so that it runs even if another command's module is broken
    take_any_character()
    sys.exit(preflight(sys.argv[1:]))
