"""What an instructor sees before class: a course of small lessons, each but the first with one fault."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pytest

from notebooks.scripts import build
from qlora_helpers.commands import doctor, preflight
from qlora_helpers.course import quiz
from tests import ROOT

SOURCE = """# %% [markdown]
# # A small lesson
# A block has 64 values, and each of them 4 bits.

# %%
from qlora_helpers.training.spikes import find_spikes

find_spikes([])

# %% tags=["nbval-check-output"]
bits = 64 * 4
print(f"{bits} bits in a block")

# %%
bits + 1
"""


def write_lesson(course: Path, name: str) -> Path:
    (course / "notebooks" / "source" / f"{name}.py").write_text(SOURCE)
    timings = course / "notebooks" / "scripts" / "timings.json"
    rows = json.loads(timings.read_text()) if timings.exists() else {}
    timings.write_text(json.dumps(rows | {name: {"seconds": 5, "gigabytes": 0.1}}))
    notebook = jupytext.reads(SOURCE, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.NotebookNode({"tags": cell.metadata.tags} if "tags" in cell.metadata else {})
        if cell.cell_type == "code":
            cell.execution_count = number
    checked = notebook.cells[2]
    checked.outputs = [nbformat.v4.new_output("stream", name="stdout", text="256 bits in a block\n")]
    path = course / "notebooks" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def call(course: Path, *lessons: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "QLORA"))}
    environment["PYTHONPATH"] = str(course)
    command = [sys.executable, "-m", "qlora_helpers.commands.preflight", *lessons]
    return subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    (folder / "notebooks" / "source").mkdir(parents=True)
    (folder / "notebooks" / "scripts").mkdir()
    (folder / "teaching" / "scripts").mkdir(parents=True)
    for name in (
        "conftest.py",
        "pyproject.toml",
        "notebooks/scripts/__init__.py",
        "notebooks/scripts/build.py",
        "notebooks/scripts/running.py",
        "notebooks/scripts/forking.py",
        "notebooks/scripts/quiz_cells.py",
        "teaching/scripts/__init__.py",
        "teaching/scripts/guide.py",
    ):
        shutil.copy(ROOT / name, folder / name)
    no_quiz = shutil.ignore_patterns("__pycache__", "[01][0-9].json")
    shutil.copytree(ROOT / "qlora_helpers", folder / "qlora_helpers", ignore=no_quiz)
    (folder / "data").symlink_to(ROOT / "data")
    for name in ("01_good", "02_wrong_digit", "03_wrong_text", "04_broken_helper", "05_cut_off", "06_no_source"):
        write_lesson(folder, name)
    change(folder / "notebooks" / "02_wrong_digit.ipynb", "256 bits in", "255 bits in")
    change(folder / "notebooks" / "03_wrong_text.ipynb", "has 64 values", "has 128 values")
    change(
        folder / "qlora_helpers" / "training" / "spikes.py",
        "def find_spikes(losses: list[tuple[int, float]]) -> list[Spike]:\n",
        "def find_spikes(losses: list[tuple[int, float]]) -> list[Spike]:\n    raise RuntimeError('no')\n",
    )
    for name in ("01_good", "02_wrong_digit", "03_wrong_text", "06_no_source"):  # these do not use the broken helper
        for path in (folder / "notebooks" / f"{name}.ipynb", folder / "notebooks" / "source" / f"{name}.py"):
            change(path, "from qlora_helpers.training.spikes import find_spikes", "find_spikes = print")
    cut = folder / "notebooks" / "05_cut_off.ipynb"
    cut.write_text(cut.read_text()[:300])
    (folder / "notebooks" / "source" / "06_no_source.py").unlink()
    return folder


@pytest.fixture(scope="module")
def red(course):
    return call(course)


def test_a_good_lesson_is_green_alone(course):
    done = call(course, "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^✓ 01_good +3 +1 +\d+ +0\.\d\d$", done.stdout, re.M), done.stdout
    assert "✓ ready: 1 lesson in 0 min" in done.stdout
    assert "Not checked: figures" in done.stdout


def test_each_fault_is_red_and_named_with_lesson_and_cell(red):
    assert red.returncode == 1
    assert re.search(r"^✓ 01_good", red.stdout, re.M), red.stdout + red.stderr
    for lesson, fault in (
        (
            "02_wrong_digit",
            "lesson 02, cell [2]: the notebook stores '255 bits in a block', the cell now gives '256 bits in a block'",
        ),
        (
            "03_wrong_text",
            "lesson 03, cell 1 (text) says 'A block has 128 values, and each of the…', its source 'A block has 64 values",
        ),
        ("04_broken_helper", "lesson 04, cell [1], line 3: RuntimeError: no"),
        (
            "05_cut_off",
            "lesson 05, 05_cut_off.ipynb is not a readable notebook: Notebook does not appear to be JSON",
        ),
        ("06_no_source", "lesson 06, its source source/06_no_source.py is not here"),
    ):
        row = re.search(rf"^✗ {lesson} .*\n    (.*)", red.stdout, re.M)
        assert row and fault in row[1], red.stdout
    assert "✗ not ready: 6 lessons" in red.stdout


def test_the_whole_output_is_kept_when_something_fails(red):
    log = Path(re.search(r"The whole output: (\S+)", red.stdout)[1])
    assert "ZeroDivisionError" not in log.read_text() and "RuntimeError: no" in log.read_text()
    log.unlink()


def test_a_problem_of_the_machine_is_red(monkeypatch, capsys):
    report = doctor.Report()
    report.problem("the disk is full", "make room")
    monkeypatch.setattr(preflight.doctor, "examine", lambda: report)
    monkeypatch.setattr(preflight, "run_lessons", lambda names: True)
    assert preflight.preflight(["03"]) == 1
    said = capsys.readouterr().out
    assert "✗ the disk is full: make room" in said and "✗ not ready: 1 lesson" in said


def test_what_is_not_compared_is_named(course, monkeypatch):
    monkeypatch.setattr(preflight, "NOTEBOOKS", course / "notebooks")
    monkeypatch.setattr(build, "SOURCES", course / "notebooks" / "source")
    monkeypatch.setattr(build, "TIMINGS", course / "notebooks" / "scripts" / "timings.json")
    monkeypatch.setattr(quiz, "has_quiz", lambda lesson: False)  # the made-up lessons have none
    path = course / "notebooks" / "01_good.ipynb"
    assert preflight.differences("01_good") == []
    before = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].metadata.tags, notebook.cells[3].execution_count = [], None
    nbformat.write(notebook, path)
    said = preflight.differences("01_good")
    path.write_text(before)
    assert said == [
        "cell [2]: its tags are [], in its source ['nbval-check-output']",
        "cell 4 was never executed, so its output is not compared: 'bits + 1'",
    ]


def test_a_lesson_that_is_not_there_is_an_error():
    with pytest.raises(preflight.CannotStart, match=r"LESSON=44: there is no such lesson\. There are 01_memory_maths"):
        preflight.chosen(["44"])
    assert preflight.chosen(["3", "09"]) == ["03_double_quantisation", "09_out_of_memory"]


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(preflight.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(preflight.CannotStart, match=r"not installed: no-such-package\. Run  pip install -r"):
        preflight.chosen([])


@pytest.mark.parametrize("there", [(), ("conftest.py",), ("notebooks/",)], ids=str)
def test_what_is_not_a_copy_of_the_course_is_said(there, tmp_path, monkeypatch):
    for name in there:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    monkeypatch.setattr(preflight, "COURSE", tmp_path)
    monkeypatch.setattr(preflight, "NOTEBOOKS", tmp_path / "notebooks")
    with pytest.raises(preflight.CannotStart, match="is not a copy of the course's repository"):
        preflight.chosen([])


# ---- The rows, from what pytest tells of its tests


@pytest.fixture
def table():
    made = preflight._Table({"03_lesson": []}, io.StringIO())
    made.count(["notebooks/03_lesson.ipynb::Cell 1", "notebooks/03_lesson.ipynb::Cell 2"])
    return made


def told(table, cell, outcome="passed", said=(), seconds=2.0):
    for when in ("setup", "call", "teardown"):
        failed = outcome == "failed" and when == "call"
        table.pytest_runtest_logreport(
            SimpleNamespace(
                nodeid=f"notebooks/03_lesson.ipynb::{cell}", when=when, duration=seconds, failed=failed,
                user_properties=said, longreprtext="first line\nlast line\n",
            )
        )  # fmt: skip


def test_a_row_counts_cells_comparisons_seconds_and_the_peak(table):
    told(table, "Cell 1", said=[("compared", True), ("peak_bytes", 1_500_000_000)])
    assert table.out.getvalue() == ""
    told(table, "Cell 2", said=[("peak_bytes", 1_000_000_000)])
    assert table.out.getvalue() == f"✓ {'03_lesson':28}     2         1       12     1.50\n"
    assert table.ok == {"03_lesson": True}


def test_a_failure_without_words_is_the_last_line_of_its_report(table):
    told(table, "Cell 1", "failed")
    told(table, "Cell 2", "failed", said=[("fault", "cell [2]: no")])
    assert table.out.getvalue().splitlines()[1:] == [
        "    lesson 03, call: last line",
        "    lesson 03, cell [2]: no",
    ]
    assert table.ok == {"03_lesson": False}


def test_a_notebook_that_cannot_be_collected_is_a_fault_and_another_file_is_none(table):
    for nodeid, failed in (("notebooks/03_lesson.ipynb", True), ("conftest.py", True), ("03_lesson.ipynb", False)):
        table.pytest_collectreport(SimpleNamespace(nodeid=nodeid, failed=failed, longrepr="first\nlast\n"))
    assert table.failed == {"03_lesson": ["last"]}


def test_cells_that_did_not_run_are_counted_and_make_it_red(table):
    told(table, "Cell 1")
    table.row("03_lesson")
    assert table.ok == {"03_lesson": False}
    assert table.out.getvalue().splitlines()[1] == "    lesson 03, 1 of its 2 cells ran"


def test_more_than_four_faults_are_only_counted(table):
    table.faults["03_lesson"] = [f"fault {number}" for number in range(6)]
    table.row("03_lesson")
    said = table.out.getvalue().splitlines()
    assert len(said) == 6 and said[-1] == "    … and 2 more, most likely because of these"


@pytest.mark.parametrize(
    ("line", "other", "said"),
    [
        ("a block has 64 values", "a block has 65 values", ("a block has 64 values", "a block has 65 values")),
        ("x" * 40 + "1" + "y" * 40, "x" * 40 + "2" + "y" * 40, tuple(f"…{'x' * 24}{d}{'y' * 24}…" for d in "12")),
        ("same, and more", "same", ("same, and more", "same")),
    ],
)
def test_lines_are_cut_down_to_where_they_differ(line, other, said):
    assert preflight._around(line, other) == said
