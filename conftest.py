"""How pytest runs this course: one thread each, no network, notebooks through nbval, the longest first.

Hooks for notebooks must be here: pytest uses a `tests/conftest.py` only for files in `tests/`.
`tests/project/test_hooks.py` runs a course of two small lessons with this file and checks the effect of each hook.
"""

import difflib
import gc
import os
import re
import shutil
import signal
import tempfile
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
from jupyter_client.provisioning import local_provisioner
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError, find_comment_markers, find_metadata_tags

from notebooks.scripts import forking
from notebooks.scripts.running import code_cells, in_one_kernel, peak_bytes
from qlora_helpers.course.check_lines import compared

ROOT = Path(__file__).resolve().parent

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with more threads than cores are several times slower
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that tries to use the network fails at once

# Longest first, so that both workers finish together. (`--no-loadscope-reorder` keeps pytest-xdist from re-sorting.)
FIRST = (
    "test_together", "test_sharded", "04_qlora_run", "test_site", "test_lesson_figures", "10_your_own_data", "08_stability", "06_adapters", "07_does_it", "02_nf4_vs_int4", "test_quality",
    "test_shipped_model", "test_checkpoints", "test_run", "09_out_of_memory", "05_will_it_fit", "01_memory_maths", "test_shipped_data",
    "test_layers", "test_hooks", "test_preflight", "test_troubleshooting", "test_measure_out_of_memory",
)  # fmt: skip

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def pytest_addoption(parser):
    parser.addoption(
        "--everything",
        action="store_true",
        help="also the learners' editions, each as it is, and the tests marked `everything`; without it, "
        "each lesson runs once: the solved edition, with the learner's unsolved exercises in the same kernel",
    )
    parser.addoption(
        "--real",
        action="store_true",
        help="the tests of a real model, which `make test-real` fetches into the cache before",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "everything: takes long; runs only with --everything")
    # A shell's background job ignores Ctrl+C, and so would every run that a test starts in order to interrupt it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # once, not in every worker; the workers inherit the environment
        for choice in ("QLORA_GEAR", "QLORA_MODEL", "QLORA_DATA"):  # a teacher's own settings would reach every kernel
            os.environ.pop(choice, None)
        os.environ["QLORA_RUNS"] = tempfile.mkdtemp(prefix="qlora-runs-")
        if not config.getoption("real"):  # whether a model was fetched here changes no other test
            os.environ["QLORA_CACHE"] = str(Path(os.environ["QLORA_RUNS"], "cache"))
    config.course_runs = os.environ["QLORA_RUNS"]


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.course_runs)


# ---- Notebooks


class Cell(IPyNbCell):
    """A cell whose failure is described in words: which lesson, which cell, the stored output and the new one."""

    def runtest(self):
        self.user_properties.append(("compared", bool(self.options["check"])))
        try:
            super().runtest()
        finally:
            if self.parent.kernel.is_alive():
                self.user_properties.append(("peak_bytes", peak_bytes(self.parent.kernel.km.provisioner.pid)))

    def sanitize(self, s):
        """nbval calls this with the stored and the new output before it compares them."""
        text = super().sanitize(s)
        return compared(text) if isinstance(text, str) else text

    def format_output_compare(self, key, left, right):
        """nbval calls this with the stored and the new output if they differ."""
        if not (isinstance(left, str) and isinstance(right, str)):
            left, right = repr(left), repr(right)
        lines = difflib.unified_diff(
            left.splitlines(), right.splitlines(), "stored in the notebook", "what the cell gives now", n=1, lineterm=""
        )
        self.comparison_traceback += list(lines)

    def fault(self, error: BaseException) -> str:
        """One line: the cell by Jupyter's count, the line in it or in its output, and what is wrong."""
        cell = f"cell [{self.cell.execution_count}]{' (the unsolved exercise)' if self.unsolved else ''}"
        if not isinstance(error, NbCellError):
            return f"{cell}: {type(error).__name__}: {error}"
        lines = COLOURS.sub("", error.inner_traceback or "").strip().splitlines()
        stored = [line[1:] for line in lines if re.match(r"-(?!--)", line)]
        now = [line[1:] for line in lines if re.match(r"\+(?!\+\+)", line)]
        if str(error) == "Cell outputs differ" and (stored or now):
            return f"{cell}: the notebook stores {(stored or ['nothing'])[0]!r}, the cell now gives {(now or ['nothing'])[0]!r}"
        at = re.search(r"Cell In\[\d+\], line (\d+)", "\n".join(lines))
        return f"{cell}{f', line {at[1]}' if at else ''}: {lines[-1] if lines else error}"

    def repr_failure(self, excinfo):
        error = excinfo.value
        text = [f"{self.parent.path.relative_to(self.config.rootpath).as_posix()}, {self.fault(error)}"]
        if isinstance(error, NbCellError):
            text += [
                "",
                *(f"    {line}" for line in error.source.splitlines()),
                "",
                error.inner_traceback or str(error),
            ]
        return "\n".join(text)


class Notebook(IPyNbFile):
    """A notebook as it is: each cell is run, and the outputs of tagged cells are compared, but for what checks measured.

    Its runs have their own folder, since a lesson continues an unfinished run that it finds. Kernels see no GPU, since
    the stored outputs were made in the cpu gear. All but the solved editions run without AVX-512: the checked numbers
    must hold on such a processor, too.
    """

    def to_run(self) -> list[tuple[str, nbformat.NotebookNode]]:
        """(who the cell is for, cell) in the order in which they run."""
        self.nb = nbformat.read(self.path, as_version=4)
        return [("", cell) for cell in code_cells(self.nb)]

    def collect(self):
        for number, (who, cell) in enumerate(self.to_run()):
            options = defaultdict(bool, find_metadata_tags(cell.metadata))
            options.update(find_comment_markers(cell.source))
            options.setdefault("check", self.compare_outputs)
            name = f"Cell {cell.execution_count}{who}"
            item = Cell.from_parent(self, name=name, cell_num=number, cell=cell, options=options)
            item.unsolved = bool(who)
            yield item

    def start_kernel(self, patch: pytest.MonkeyPatch) -> None:
        super().setup()

    def setup(self):
        with pytest.MonkeyPatch.context() as patch:  # a kernel inherits the environment when it starts
            runs = Path(self.config.course_runs) / self.path.parent.name / self.path.stem
            patch.setenv("QLORA_RUNS", str(runs))
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # the stored outputs were made in the cpu gear
            if self.path.parent.name != "solutions":
                patch.setenv("ATEN_CPU_CAPABILITY", "avx2")
            self.start_kernel(patch)


class LessonOnce(Notebook):
    """The solved edition of a lesson; before each solution, the unsolved exercise is run in the same kernel.

    The kernel is forked from a process that has imported the libraries.
    """

    def to_run(self):
        solved = super().to_run()
        learner = nbformat.read(self.path.parents[1] / self.path.name, as_version=4)
        runs = in_one_kernel(code_cells(learner), [cell for _, cell in solved])
        return [("" if "solutions" in who else ", unsolved", cell) for who, cell in runs]

    def start_kernel(self, patch):
        if forking.AVAILABLE:
            patch.setattr(local_provisioner, "launch_kernel", forking.launch_kernel)
        super().start_kernel(patch)


def _everything(config) -> bool:
    return config.getoption("everything")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    """Collect each notebook as the options say; one named on the command line is run as it is."""
    found = yield
    if not any(isinstance(collector, IPyNbFile) for collector in found):
        return found
    config = parent.config
    named = {(config.invocation_params.dir / str(arg).partition("::")[0]).resolve() for arg in config.args}
    if file_path in named:
        return [Notebook.from_parent(parent, path=file_path)]
    if file_path.parent.name == "solutions":
        return [LessonOnce.from_parent(parent, path=file_path)]
    return [Notebook.from_parent(parent, path=file_path)] if _everything(config) else []


# ---- Which tests, in which order


def pytest_collection_modifyitems(config, items):
    if not _everything(config):
        left = [item for item in items if item.get_closest_marker("everything")]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)

    def place(item):
        return next((i for i, name in enumerate(FIRST) if item.path.name.startswith(name)), len(FIRST))

    items.sort(key=place)


def pytest_collection_finish(session):
    """Every `trainer.train()` collects garbage; it need not scan all imported objects each time."""
    gc.collect()
    gc.freeze()


# ---- Reports


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo and isinstance(item, Cell) and report.failed:
        report.user_properties.append(("fault", item.fault(call.excinfo.value)))
    return report


class _AtOnce:
    """Shows a failure when it happens, not after all tests."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.section(f"{report.nodeid} failed", sep="!")
            report.toterminal(self.terminal._tw)


def pytest_sessionstart(session):
    terminal = session.config.pluginmanager.getplugin("terminalreporter")
    if terminal and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_AtOnce(terminal))


def pytest_terminal_summary(terminalreporter, config):
    """Print the seconds and peak memory of each notebook; they are reported, not asserted."""
    seconds, peak = defaultdict(float), defaultdict(int)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if ".ipynb" in getattr(report, "nodeid", "") and hasattr(report, "duration"):
                name = report.nodeid.partition("::")[0]
                seconds[name] += report.duration
                peak[name] = max(peak[name], dict(report.user_properties).get("peak_bytes", 0))
    if seconds:
        terminalreporter.section("notebooks: seconds, peak GB")
        for name, duration in sorted(seconds.items(), key=lambda row: -row[1]):
            terminalreporter.write_line(f"{duration:7.1f}{peak[name] / 1e9:6.2f}  {name}")
        terminalreporter.write_line(f"{sum(seconds.values()):7.1f}        all, summed over the workers")
    cannot = sorted(
        text
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, text in getattr(report, "user_properties", ())
        if name == "cannot" and report.when == "call"
    )
    if cannot:
        terminalreporter.section("architectures of transformers whose memory cannot be predicted, and why")
        for text in cannot:
            terminalreporter.write_line(text)
    if not _everything(config):
        terminalreporter.write_line(
            "Each lesson ran once. --everything also runs the learners' editions as they are, and the tests marked `everything`."
        )
