"""Change the package in small ways, one at a time, and see whether the tests notice.

    make mutants      # 200 changes; a run that was stopped is continued by the same command

cosmic-ray makes the changes: another operator, a number one up or down, a condition turned round, a loop that does not
run, an error that is not caught. A place of the code is drawn first and then one of its changes, so that what has eleven
variants is not drawn eleven times as often. A draw depends on the place's own line alone: if other lines change, the
rest of the sample stays.

Each change is made in a copy of the course in a temporary folder and meets the tests of its own module first, then those
quick test files that import the module. The tests run in a fork of this process, which has imported the libraries but
not the package. The list is kept in data/measured/mutants.csv; its last column is written by hand and stays.
"""

import argparse
import contextlib
import csv
import difflib
import gc
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT

SEED = 0
COUNT = 200
LIST = ROOT / "data" / "measured" / "mutants.csv"
STATE = ROOT / ".mutants"  # what a stopped run has done so far
# By the processor time of tests without a mutant, which does not depend on other work: which files are quick, and how long
# the others of one mutant may take.
QUICK, SECONDS_OF_OTHER_TESTS = 12, 90
WITHOUT = ("gpu", "notebooks", "colab")  # rooms whose tests need a GPU, or start kernels
LIBRARIES = (
    "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "matplotlib.pyplot", "ipywidgets",
    "nbformat", "nbval.plugin", "jupyter_client", "scipy.stats",
)  # fmt: skip
COLUMNS = ("module", "line", "operator", "was", "becomes", "outcome", "by", "note")
# `is` for `==` is no change for small numbers and interned texts.
NO_CHANGE = re.compile(r"ReplaceComparisonOperator_(Eq_Is|NotEq_IsNot|Is_Eq|IsNot_NotEq)$")


class Mutant(NamedTuple):
    """One change of one module."""

    module: str  # its file, from the root of the repository
    line: int
    operator: str
    was: str
    becomes: str
    code: str  # of the whole file

    @property
    def identity(self) -> str:
        return " | ".join((self.module, self.operator, self.was, self.becomes))


# ---- The changes


def in_an_annotation(node) -> bool:
    """Whether a node of parso's tree is part of a type: `int | None` is not computed."""
    while node.parent is not None:
        parent = node.parent
        children = parent.children
        if parent.type in ("tfpdef", "annassign") and children.index(node) in (1, 2) and children[0] is not node:
            return True
        if parent.type == "funcdef" and children[children.index(node) - 1] == "->":
            return True
        node = parent
    return False


def places(source: str, operators: dict) -> Iterator[tuple[tuple[int, int], str, list[tuple[str, int]]]]:
    """(where, family, variants) of each place that can be changed; a variant is an operator and its occurrence."""
    from cosmic_ray.ast import ast_nodes, get_ast

    found, seen = {}, Counter()
    for node in ast_nodes(get_ast(source)):
        for name, operator in operators.items():
            for start, _ in operator.mutation_positions(node):
                if not in_an_annotation(node):
                    found.setdefault((start, name.split("_")[0]), []).append((name, seen[name]))
                seen[name] += 1
    for (start, family), variants in found.items():
        yield start, family, variants


def sample(count: int, seed: int) -> list[Mutant]:
    """Draw `count` mutants of the package."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    operators = {
        name: provider[name]() for name in provider if not provider[name].arguments() and not NO_CHANGE.match(name)
    }
    drawn = []
    for path in sorted((ROOT / "qlora_helpers").rglob("*.py")):
        module, source, seen = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"), Counter()
        for (line, column), family, variants in places(source, operators):
            text = source.splitlines()[line - 1]
            place = (module, family, text.strip(), column - len(text) + len(text.lstrip()))
            seen[place] += 1
            draw = random.Random(f"{seed} {place} {seen[place]}")
            drawn.append((draw.random(), module, source, line, *draw.choice(variants)))
    print(f"{len(drawn)} places in the package, {count} are drawn with seed {seed}", flush=True)
    mutants = []
    for _, module, source, line, name, occurrence in sorted(drawn, key=lambda one: one[0]):
        code = mutate_code(source, operators[name], occurrence)
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                compile(code, module, "exec")
        except SyntaxError:
            continue
        changes = list(difflib.ndiff(source.splitlines(), code.splitlines()))
        was, becomes = (
            next((text for one in changes if one.startswith(sign) and (text := " ".join(one[2:].split()))), "")
            for sign in "-+"
        )
        mutants.append(Mutant(module, line, name, was, becomes, code))
        if len(mutants) == count:
            break
    return mutants


# ---- Running tests in a fork


class First:
    """A pytest plugin: the first test, or file, that failed."""

    failed = ""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed = self.failed or report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def in_the_fork(copy: Path, files: list[str], result: Path) -> None:
    """Run the tests of `copy` here, as a fresh process in that folder would; write what came out to `result`."""
    os.setsid()  # what it starts ends with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "notebooks", "data", "qlora_helpers")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(place for place in sys.path if place and Path(place).resolve() != ROOT)]
    sys.dont_write_bytecode = True
    temporary = result.with_suffix(".tmp")
    temporary.mkdir(exist_ok=True)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary)}
    tempfile.tempdir = None
    first = First()
    code = pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={temporary / 'pytest'}", *files], plugins=[first]
    )
    imported = [name for name in sys.modules if name.split(".")[0] == "qlora_helpers"]
    result.write_text(json.dumps({"code": int(code), "failed": first.failed, "imported": imported}))


def run_tests(copy: Path, files: list[str], limit: float) -> dict:
    """Run test files in a fork of this process for at most `limit` seconds. Without "code" in the answer, it hung."""
    result = copy.with_suffix(".json")
    result.unlink(missing_ok=True)
    begun = time.monotonic()
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            in_the_fork(copy, files, result)
        finally:
            os._exit(1)
    try:
        ended, used = 0, None
        while not ended and time.monotonic() < begun + limit:
            time.sleep(0.02)
            ended, _, used = os.wait4(child, os.WNOHANG)
        hung = not ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    if hung:
        os.waitpid(child, 0)
    shutil.rmtree(result.with_suffix(".tmp"), ignore_errors=True)
    seconds = {"seconds": round(time.monotonic() - begun, 1), "processor": round(used.ru_utime + used.ru_stime, 1)}
    if result.exists():
        return json.loads(result.read_text()) | seconds
    return seconds if hung else {"code": -1, "failed": "the process died", "imported": []} | seconds


def make_copy(copy: Path) -> None:
    """The files of the course as they are now, committed or not."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in names:
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)


def in_slots(items: list, work: Callable, scratch: Path, jobs: int, done: Path) -> None:
    """`work(item, copy)` for each item, in `jobs` forks with a copy each; each result becomes a line of `done`."""
    fork = multiprocessing.get_context("fork")
    following = fork.Value("i", 0)
    us = os.getpid()

    def slot(copy: Path) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            while os.getppid() == us:  # if we were killed, nobody continues
                with following.get_lock():
                    number = following.value
                    following.value += 1
                if number >= len(items):
                    break
                row = work(items[number], copy)
                with done.open("a") as file:
                    file.write(json.dumps(row) + "\n")

    processes = [fork.Process(target=slot, args=(scratch / str(number),)) for number in range(jobs)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("A worker has died; the same command continues.")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- Which tests


def own_test(module: str) -> str:
    """The test file of a module: `qlora_helpers/memory/step.py` has `tests/memory/test_step.py`."""
    path = Path("tests", *Path(module).parts[1:])
    return path.with_name(f"test_{path.stem.strip('_')}.py").as_posix()


def test_files() -> list[str]:
    found = (ROOT / "tests").rglob("test_*.py")
    return sorted(
        path.relative_to(ROOT).as_posix() for path in found if path.relative_to(ROOT / "tests").parts[0] not in WITHOUT
    )


def try_file(file: str, copy: Path) -> dict:
    """How a test file does without a mutant."""
    return run_tests(copy, [file], 600) | {"file": file}


def others(module: str, copy: Path, usual: dict[str, dict]) -> list[str]:
    """The quick test files that import a module and are not its own: first those that name it, and those of its room."""
    own, dotted = own_test(module), module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package, _, name = dotted.rpartition(".")
    named = re.compile(rf"\b{re.escape(package)}(\.| import .*\b){name}\b")

    def order(file: str) -> tuple:
        in_its_room = Path(file).parent == Path(own).parent
        return not named.search((copy / file).read_text(encoding="utf-8")), not in_its_room, usual[file]["processor"]

    found, left = [], SECONDS_OF_OTHER_TESTS
    for file in sorted((file for file, row in usual.items() if dotted in row["imported"] and file != own), key=order):
        if usual[file]["processor"] <= min(QUICK, left):
            found.append(file)
            left -= usual[file]["processor"]
    return found


def judge(mutant: Mutant, copy: Path, usual: dict[str, dict]) -> dict:
    """Put a mutant into a copy and run its tests."""
    own = own_test(mutant.module)
    path = copy / mutant.module
    original = path.read_text(encoding="utf-8")
    row = {"identity": mutant.identity, "outcome": "survived", "by": ""}
    try:
        path.write_text(mutant.code, encoding="utf-8")
        for files, who in (
            ([own] if own in usual else [], "its own tests"),
            (others(mutant.module, copy, usual), "other tests"),
        ):
            if not files:
                continue
            ran = run_tests(copy, files, 30 + 4 * sum(usual[file]["seconds"] for file in files))
            if ran.get("code") != 0:
                row |= {"outcome": f"killed by {who}", "by": ran["failed"] if "code" in ran else "they did not end"}
                break
    finally:
        path.write_text(original, encoding="utf-8")
    print(f"{row['outcome']:22} {mutant.module}:{mutant.line}: {mutant.was} -> {mutant.becomes}", flush=True)
    return row


# ---- The list


def read_list() -> list[dict]:
    if not LIST.exists():
        return []
    text = [line for line in LIST.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(csv.DictReader(text))


def identity(row: dict) -> str:
    return " | ".join((row["module"], row["operator"], row["was"], row["becomes"]))


def write_list(mutants: list[Mutant], outcomes: dict[str, dict], seed: int) -> float:
    """Write the list, with the notes of the old one. Returns the share that was killed."""
    notes = {identity(row): row["note"] for row in read_list()}
    rows = [
        mutant._asdict() | outcomes[mutant.identity] | {"note": notes.get(mutant.identity, "")}
        for mutant in sorted(mutants, key=lambda one: (one.module, one.line))
    ]
    count = Counter(row["outcome"] for row in rows)
    killed = 1 - count["survived"] / len(rows)
    head = [
        f"make mutants: cosmic-ray {importlib.metadata.version('cosmic-ray')}, seed {seed}, {len(rows)} mutants",
        f"killed: {killed:.1%}; " + ", ".join(f"{name}: {number}" for name, number in sorted(count.items())),
    ]
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in head)
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    LIST.write_text(text.getvalue(), encoding="utf-8")
    for row in rows:
        if row["outcome"] == "survived":
            print(f"\n{row['module']}:{row['line']} {row['operator']}\n  - {row['was']}\n  + {row['becomes']}")
            print(f"  {row['note']}" if row["note"] else "  no note yet")
    print("", *head, f"The list: {LIST.relative_to(ROOT)}", sep="\n")
    return killed


def state_of_the_code() -> str:
    folders = (ROOT / "qlora_helpers", ROOT / "tests")
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in [ROOT / "conftest.py", *files])).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=2, help="how many mutants at a time, each on one thread")
    parser.add_argument("--survivors", action="store_true", help="believe the last list in what was killed")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    mutants = sample(args.count, args.seed)

    STATE.mkdir(exist_ok=True)
    usual_file, done_file, code_file = STATE / "usual.jsonl", STATE / "done.jsonl", STATE / "code"
    if not code_file.exists() or code_file.read_text() != state_of_the_code():
        usual_file.unlink(missing_ok=True)
        done_file.unlink(missing_ok=True)
        code_file.write_text(state_of_the_code())
    if args.survivors:
        known = [{"identity": identity(row), **row} for row in read_list() if row["outcome"] != "survived"]
        done_file.write_text("".join(json.dumps(row) + "\n" for row in [*lines(done_file), *known]))

    for library in LIBRARIES:
        __import__(library)
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        scratch = Path(folder)
        for number in range(args.jobs):
            make_copy(scratch / str(number))
        tried = {row["file"] for row in lines(usual_file)}
        untried = [file for file in test_files() if file not in tried]
        in_slots(untried, try_file, scratch, args.jobs, usual_file)
        usual = {row["file"]: row for row in lines(usual_file)}
        for file in [file for file, row in usual.items() if row.get("code") != 0]:
            print(f"{file} is left out: without a mutant, {usual[file].get('failed') or 'it has no test'}", flush=True)
            del usual[file]
        print(f"{len(usual)} test files, {time.monotonic() - begun:.0f} s so far", flush=True)
        judged = {row["identity"] for row in lines(done_file)}
        rest = [mutant for mutant in mutants if mutant.identity not in judged]
        in_slots(rest, lambda mutant, copy: judge(mutant, copy, usual), scratch, args.jobs, done_file)
    outcomes = {row["identity"]: {key: row[key] for key in ("outcome", "by")} for row in lines(done_file)}
    killed = write_list(mutants, outcomes, args.seed)
    shutil.rmtree(STATE)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{time.monotonic() - begun:.0f} s, {args.jobs} at a time; {used.ru_utime + used.ru_stime:.0f} s of processor time"
    )
    sys.exit(0 if killed >= 0.9 else 1)


if __name__ == "__main__":
    main()
