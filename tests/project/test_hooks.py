"""The effects of conftest.py, seen in the kernels and on the screen of somebody who runs the tests.

A course of two small lessons replaces the real one. Its cells record what they find; some of them are wrong.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from notebooks.scripts import forking
from tests import ROOT

LONG, SHORT = (
    "01_memory_maths",
    "04_qlora_run",
)  # the second comes first in conftest.py; xdist would start with the first

TELL = """import json, os, sys, time
from pathlib import Path
tells = Path(os.environ["TELLS"])
me = f"{Path.cwd().name}-LESSON-{len(list(tells.iterdir())):02d}"
found = dict(os.environ) | {"warm": "fractions" in sys.modules, "place": me}
if Path.cwd().name == "colab":
    import torch
    found["capability"] = torch.backends.cpu.get_cpu_capability()
_ = (tells / f"{me}.json").write_text(json.dumps(found))"""


# jsonschema would spend two seconds compiling a grammar for a format that notebooks do not use.
QUICK_PYTEST = "import sys; sys.modules['rfc3987_syntax'] = None; import pytest; sys.exit(pytest.main())"


def code(source: str, tag: str = "", prints: str = "", count: int = 0) -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []}, execution_count=count)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=prints)] if prints else []
    return cell


def write(path: Path, cells: list) -> None:
    for count, cell in enumerate(cells, start=1):
        cell.execution_count = count
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def lesson(course: Path, name: str, cells: int, stored: str = "value 0.25\n") -> None:
    """Three editions of a lesson with one exercise and a checked cell whose stored output is `stored`."""
    check, checked = "print('right' if answer == 4 else f'got {answer}')", "nbval-check-output"

    def edition(answer: list, says: str) -> list:
        first = [code(TELL.replace("LESSON", name)), code("print('value', 1 / 4)", checked, stored)]
        return [*first, *(code("2 + 2") for _ in range(cells)), *answer, code(check, checked, says)]

    for folder, answer, says in (
        ("notebooks", [code("answer = ...", "exercise")], "got Ellipsis\n"),
        ("notebooks/solutions", [code("answer = 4", "solution")], "right\n"),
        ("colab", [code("answer = ...", "exercise")], "got Ellipsis\n"),
    ):
        write(course / folder / f"{name}.ipynb", edition(answer, says))


class Ran:
    """One call of pytest in a small course, and what its cells recorded."""

    def __init__(self, course: Path, *arguments: str):
        tells = course / f"tells-{len(list(course.glob('tells-*')))}"
        tells.mkdir()
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "QLORA", "ATEN"))
        }
        environment |= {"TELLS": str(tells), "JUPYTER_PATH": str(course / "jupyter")}
        for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):  # conftest.py sets these
            environment.pop(name, None)
        command = [sys.executable, "-c", QUICK_PYTEST, "-p", "no:cacheprovider", "--color=no", *arguments]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: the tests start as a shell's background job does
        try:
            done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.code, self.output = done.returncode, done.stdout + done.stderr
        found = [json.loads(path.read_text()) for path in sorted(tells.iterdir(), key=lambda p: p.stem[-2:])]
        self.kernels = {tell["place"][:-3]: tell for tell in found}


def small_course(folder: Path) -> Path:
    (folder / "notebooks" / "scripts").mkdir(parents=True)
    scripts = [f"notebooks/scripts/{name}.py" for name in ("__init__", "running", "forking")]
    for name in ("conftest.py", "pyproject.toml", *scripts):
        shutil.copy(ROOT / name, folder / name)
    (folder / "notebooks" / "scripts" / "warm_libraries.py").write_text(
        "import fractions\n"
    )  # no kernel imports this on its own
    (folder / "tests").mkdir()
    (folder / "tests" / "test_marked.py").write_text(
        "import gc, os, signal\nimport pytest\n\n\n"
        "@pytest.mark.everything\ndef test_that_takes_long():\n    assert gc.get_freeze_count() > 0\n\n\n"
        "def test_that_is_short():\n    assert gc.get_freeze_count() > 0\n    assert 'ATEN_CPU_CAPABILITY' not in os.environ\n"
        "    assert os.environ['HF_HUB_OFFLINE'] == '1'\n"
        "    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n\n\n"
        "@pytest.mark.skip(reason='no such machine')\ndef test_elsewhere():\n    pass\n"
    )
    # a broken kernel that somebody has installed under the usual name
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["false"], "display_name": "Python 3", "language": "python"}))
    return folder


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = small_course(tmp_path_factory.mktemp("course"))
    lesson(folder, LONG, cells=6)
    lesson(folder, SHORT, cells=1)
    return folder


@pytest.fixture(scope="module")
def once(course):
    return Ran(course, "-n", "1", "-v")


@pytest.fixture(scope="module")
def everything(course):
    return Ran(course, "-v", "--everything")


@pytest.fixture(scope="module")
def of_colab(course):
    return Ran(course, "-q", "--everything", "colab")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = small_course(tmp_path_factory.mktemp("faulty"))
    lesson(folder, LONG, cells=1, stored="value 0.26\n")
    solved = folder / "notebooks" / "solutions" / f"{LONG}.ipynb"
    notebook = nbformat.read(solved, as_version=4)
    notebook.cells[2].source = "fine = 1\nbroken = fine / 0"
    learner = nbformat.read(folder / "notebooks" / f"{LONG}.ipynb", as_version=4)
    learner.cells[2].source = notebook.cells[2].source
    write(solved, notebook.cells)
    write(folder / "notebooks" / f"{LONG}.ipynb", learner.cells)
    lesson(folder, SHORT, cells=1)
    learner = folder / "notebooks" / f"{SHORT}.ipynb"
    learner.write_text(learner.read_text().replace("got Ellipsis", "got something else"))
    return Ran(folder, "-q", "notebooks")


def test_without_everything_each_lesson_runs_once_solved_and_unsolved(once):
    assert once.code == 0, once.output
    assert set(once.kernels) == {f"solutions-{LONG}", f"solutions-{SHORT}"}
    # tell, value, more cells, exercise and its check, solution and its check; one unmarked test
    assert re.search(rf"\b{2 * 6 + 6 + 1 + 1} passed", once.output)
    assert f"{SHORT}.ipynb::Cell 4, unsolved" in once.output
    assert "--everything also runs" in once.output


def test_why_a_test_was_skipped_is_said(once):
    assert re.search(r"^SKIPPED \[1\] tests/test_marked\.py:\d+: no such machine", once.output, re.M), once.output


def test_an_unsolved_exercise_is_compared_too(faulty):
    assert f"{SHORT}.ipynb, cell [5] (the unsolved exercise): the notebook stores 'got something else'" in faulty.output


def test_with_everything_the_learners_editions_run_as_they_are_besides(once, everything):
    assert everything.code == 0, everything.output
    learners = {f"notebooks-{LONG}", f"notebooks-{SHORT}"}
    assert set(everything.kernels) == {*once.kernels, *learners}
    here = everything.output
    assert f"solutions/{SHORT}.ipynb::Cell 4, unsolved" in here and f"notebooks/{SHORT}.ipynb::Cell 4 " in here
    unsolved = set(re.findall(r"\S+::Cell \d+, unsolved", here))
    assert unsolved == set(re.findall(r"\S+::Cell \d+, unsolved", once.output)) != set()
    assert re.search(rf"\b{(2 * 6 + 6 + 1) + (2 * 4 + 6 + 1) + 2} passed", here)


def test_a_notebook_that_is_named_runs_as_it_is(course):
    ran = Ran(course, f"notebooks/{SHORT}.ipynb", "-q")
    assert ran.code == 0 and set(ran.kernels) == {f"notebooks-{SHORT}"}, ran.output


def test_each_kernel_has_its_runs_in_a_folder_of_its_own_and_no_network(everything):
    folders = [kernel["QLORA_RUNS"] for kernel in everything.kernels.values()]
    assert len(set(folders)) == 4
    assert {Path(folder).name for folder in folders} == {LONG, SHORT}
    assert not any(Path(folder).exists() for folder in folders), "they are removed at the end"
    assert {kernel["CUDA_VISIBLE_DEVICES"] for kernel in everything.kernels.values()} == {""}
    assert {kernel["HF_HUB_OFFLINE"] for kernel in everything.kernels.values()} == {"1"}
    assert {kernel["OMP_NUM_THREADS"] for kernel in everything.kernels.values()} == {"1"}


def test_the_colab_editions_run_where_they_are_named(of_colab):
    assert of_colab.code == 0, of_colab.output
    assert set(of_colab.kernels) == {f"colab-{LONG}", f"colab-{SHORT}"}


def test_the_solved_editions_run_with_all_that_is_there_and_the_others_without_avx_512(everything, of_colab):
    for place, kernel in (everything.kernels | of_colab.kernels).items():
        solved, colab = place.startswith("solutions-"), place.startswith("colab-")
        assert kernel.get("ATEN_CPU_CAPABILITY") == (None if solved else "avx2"), place
        if torch.backends.cpu.get_cpu_capability().startswith("AVX"):  # an Arm processor has another value
            assert kernel.get("capability", "AVX2") == "AVX2", place
        assert ("capability" in kernel) == colab


def test_a_kernel_that_runs_a_lesson_once_has_the_libraries_and_others_are_fresh(once, everything):
    assert [kernel["warm"] for kernel in once.kernels.values()] == [forking.AVAILABLE] * 2
    for place, kernel in everything.kernels.items():
        assert kernel["warm"] == (forking.AVAILABLE and place.startswith("solutions-")), place
    assert all(kernel["JPY_PARENT_PID"] for kernel in once.kernels.values())


def test_the_longest_lesson_begins_also_under_xdist(once):
    assert list(once.kernels) == [f"solutions-{SHORT}", f"solutions-{LONG}"]


def test_seconds_and_peak_memory_are_shown(once):
    rows = re.findall(r"^ +(\d+\.\d) +(\d\.\d\d)  notebooks/solutions/(\S+)\.ipynb", once.output, re.M)
    assert {name for _, _, name in rows} == {LONG, SHORT}
    assert all(float(gigabytes) >= 0.03 for _, gigabytes, _ in rows)


def test_a_wrong_digit_is_told_in_words_and_which_of_the_two_is_stored(faulty):
    assert faulty.code == 1
    assert (
        f"notebooks/solutions/{LONG}.ipynb, cell [2]: the notebook stores 'value 0.26', the cell now gives 'value 0.25'"
    ) in faulty.output
    assert "--- stored in the notebook\n+++ what the cell gives now" in faulty.output


def test_an_error_is_told_with_its_line(faulty):
    assert f"notebooks/solutions/{LONG}.ipynb, cell [3], line 2: ZeroDivisionError: division by zero" in faulty.output


def checked(folder: Path, stored: str) -> Ran:
    """The run of a lesson whose cell prints the line of a check, with another line stored."""
    source = "print('✓ recall: at least 0.85 (measured 0.912)')"
    write(
        folder / "notebooks" / f"{SHORT}.ipynb",
        [code(TELL.replace("LESSON", SHORT)), code(source, "nbval-check-output", stored)],
    )
    return Ran(folder, "-q", f"notebooks/{SHORT}.ipynb")


def test_what_a_check_measured_is_not_compared_and_its_bound_is(tmp_path):
    folder = small_course(tmp_path)
    for same in ("✓ recall: at least 0.85 (measured 0.907)\n", "✓ recall: at least 0.85\n"):
        assert checked(folder, same).code == 0
    for other in ("✓ recall: at least 0.86 (measured 0.912)\n", "✗ recall: at least 0.85 (measured 0.912)\n"):
        ran = checked(folder, other)
        assert ran.code == 1 and "the cell now gives '✓ recall: at least 0.85'" in ran.output, ran.output


def test_a_failure_is_shown_when_it_happens(faulty):
    shown = faulty.output.index("cell [2]: the notebook stores")
    assert shown < faulty.output.index("ZeroDivisionError") < faulty.output.index("= FAILURES =")
