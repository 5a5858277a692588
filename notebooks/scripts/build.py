"""Build every edition of every lesson from its one source, and execute it.

    python -m notebooks.scripts.build                 # all lessons
    python -m notebooks.scripts.build 02 04           # some of them
    python -m notebooks.scripts.build --no-execute 02 # texts only; refused if the code has changed since then
    python -m notebooks.scripts.build --set-up        # as --no-execute, after running the Colab editions' set-up cell

A source is `notebooks/source/NN_title.py` in jupytext's percent format. Three editions are built from it:

- `notebooks/NN_title.ipynb`, for learners: without the cells tagged `solution`;
- `notebooks/solutions/NN_title.ipynb`: without the cells tagged `exercise`, so with the solutions instead;
- `colab/NN_title.ipynb`: the learners' edition after a badge and a set-up cell.

Each has the lesson's quiz, if there is one (see `quiz_cells.py`). A lesson is executed once for all three, in one kernel
(see `running.py`); the Colab edition's set-up cell has its own kernel. This script also writes the tables of README.md and teaching/README.md.
`{{seconds}}` and `{{gigabytes}}` in a source stand for what the lesson took when it was last executed, including its
solutions; the figures are kept in `notebooks/scripts/timings.json`.
"""

import argparse
import copy
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jupytext
import matplotlib
import nbformat
from nbclient import NotebookClient

from data.scripts.markdown_tables import fill
from data.scripts.measure import memory_errors, real_model, speed
from notebooks.scripts import ROOT, quiz_cells
from notebooks.scripts.running import code_cells, has_tag, in_one_kernel, peak_bytes
from qlora_helpers import suggestions
from qlora_helpers.course import diagrams
from qlora_helpers.units import GIB
from teaching.scripts import guide

SOURCES = ROOT / "notebooks" / "source"
TIMINGS = ROOT / "notebooks" / "scripts" / "timings.json"
EDITIONS = {"learner": ROOT / "notebooks", "solutions": ROOT / "notebooks" / "solutions", "colab": ROOT / "colab"}
MAP = "course_map.svg"  # beside the lessons
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
WIDGET = "application/vnd.jupyter.widget-view+json"


# The set-up cell is no part of a lesson: Colab shows its title and JupyterLab three dots, until its code is asked for.
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}


def lessons() -> list[str]:
    """The names of all lessons, such as `01_memory_maths`, in order."""
    return sorted(path.stem for path in SOURCES.glob("[0-9][0-9]_*.py"))


def repository_and_version() -> tuple[str, str]:
    """The course's `owner/name` on GitHub, empty if it has none, and its version, whose tag the Colab editions take."""
    repository = json.loads((ROOT / "colab" / "repository.json").read_text(encoding="utf-8"))["github"]
    return repository, tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def links_for_colab(text: str) -> str:
    """A lesson's text with links that work in Colab, where a notebook stands alone: to other lessons in Colab, else to GitHub.

    Without a repository there is nothing to link to: links stay as they are, which is right beside the course's files.
    """
    repository, version = repository_and_version()
    if not repository:
        return text
    text = text.replace("](../", f"](https://github.com/{repository}/blob/v{version}/")
    lesson = rf"\]\(((?:{'|'.join(lessons())})\.ipynb)"
    return re.sub(lesson, rf"](https://colab.research.google.com/github/{repository}/blob/v{version}/colab/\1", text)


def colab_cells(name: str) -> list:
    """The badge and the set-up cell at the top of a lesson's Colab edition."""
    repository, version = repository_and_version()
    link, how = f"github/{repository}/blob/main/colab/{name}.ipynb", ""
    if not repository:  # there is nothing to link to: use Colab's upload page
        link = "#upload=true"
        how = "\n\nUpload this notebook there, and the course's `qlora-course.zip` beside it (in Colab: the folder at the left)."
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/{link})"
    set_up = (ROOT / "colab" / "setup_cell.py").read_text(encoding="utf-8").rstrip()
    set_up = set_up.replace("GITHUB_REPOSITORY", repository).replace("COURSE_VERSION", version)
    return [
        nbformat.v4.new_markdown_cell(badge + how),
        nbformat.v4.new_code_cell(set_up, metadata={"tags": ["setup"]}),
    ]


def build_edition(name: str, edition: str, timings: dict) -> nbformat.NotebookNode:
    """One edition of a lesson, without outputs."""
    source = jupytext.read(SOURCES / f"{name}.py")
    left_out = "exercise" if edition == "solutions" else "solution"
    cells = [cell for cell in source.cells if left_out not in cell.metadata.get("tags", [])]
    measured = timings.get(name, {"seconds": 0, "gigabytes": 0})
    for cell in cells:
        if cell.cell_type == "markdown":
            if edition == "solutions":  # one folder further down
                cell.source = cell.source.replace("](../", "](../../")
            if edition == "colab":
                cell.source = links_for_colab(cell.source)
            for key, value in measured.items():
                cell.source = cell.source.replace("{{" + key + "}}", str(value))
    cells = quiz_cells.put_in(cells, int(name[:2]), edition)
    if edition == "colab":
        cells = colab_cells(name) + cells
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.NotebookNode({"tags": list(tags)} if tags else {})
        if "setup" in (tags or ()):
            cell.metadata |= FOLDED
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if edition == "colab":
        metadata |= {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def _lesson_cells(notebook: nbformat.NotebookNode) -> list:
    """The code cells but for those of the quiz, which run by themselves."""
    return [cell for cell in code_cells(notebook) if not has_tag(cell, quiz_cells.TAG)]


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """A hash of all code but the quiz; it is stored right after execution, so stale outputs are noticed."""
    code = "\0".join(cell.source for cell in _lesson_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()


class _Client(NotebookClient):
    """A client without widgets: the first figure that a slider draws becomes an output of its cell.

    nbclient's own handling of a slider's output waits forever if the kernel's reply comes while it sends.
    """

    def handle_comm_msg(self, outs, msg, cell_index):
        pass


def progress_bars(notebook: nbformat.NotebookNode) -> list[str]:
    """The progress bars that learners would see, which are not stored, by cell; those of the plain run belong to it."""
    return [
        f"{output.data['text/plain'].partition(':')[0]!r} in the cell {cell.source[:60]!r}"
        for cell in code_cells(notebook)
        if not has_tag(cell, "plain-run")
        for output in cell.outputs
        if WIDGET in output.get("data", {}) and re.search(r"%\||/s\]", output.data.get("text/plain", ""))
    ]


def execute(notebook: nbformat.NotebookNode, folder: Path, with_bars: bool = True) -> dict:
    """Run all cells in `folder`; keep the outputs. Returns the seconds and the peak memory it took.

    Raises:
        ValueError: a cell shows a progress bar although `with_bars` is off: it would stay on the page as clutter.
    """
    client = _Client(
        notebook,
        timeout=900,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    started = time.perf_counter()
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        peak = peak_bytes(client.km.provisioner.pid)
    seconds = time.perf_counter() - started
    if not with_bars and (bars := progress_bars(notebook)):
        raise ValueError(
            f"progress bars that would stay on the page: {'; '.join(bars)}. Cure: load and save with the helpers, or "
            "transformers.utils.logging.disable_progress_bar()"
        )
    for cell in notebook.cells:
        # a stored widget has no state to show, so keep only its figure
        cell.outputs = (
            [o for o in cell.get("outputs", []) if WIDGET not in o.get("data", {})] if "outputs" in cell else []
        )
        if cell.cell_type != "code":
            del cell["outputs"]
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    notebook.metadata["course"] = {"executed_code": code_hash(notebook), "versions": versions}
    return {"seconds": max(5, 5 * round(seconds / 5)), "gigabytes": round(peak / 1e9, 1)}


def execute_all_editions(name: str) -> tuple[dict[str, nbformat.NotebookNode], dict]:
    """Run a lesson once, in one kernel, for all three editions; the Colab edition's set-up cell runs in its own kernel.

    Returns the editions by name, and the seconds and the peak memory that it took.
    """
    editions = {edition: build_edition(name, edition, {}) for edition in EDITIONS}
    runs = in_one_kernel(code_cells(editions["learner"]), code_cells(editions["solutions"]))
    lesson = nbformat.v4.new_notebook(cells=[copy.deepcopy(cell) for _, cell in runs])
    for number, cell in enumerate(lesson.cells):
        cell.id = f"run-{number:02d}"  # an exercise's check runs twice
    set_up = nbformat.v4.new_notebook(cells=[copy.deepcopy(code_cells(editions["colab"])[0])])
    with tempfile.TemporaryDirectory() as folder:  # a new one: a lesson continues an unfinished run that it finds
        os.environ["QLORA_RUNS"] = folder
        os.environ["QLORA_CACHE"] = str(Path(folder, "cache"))  # whether a model was fetched here shows in no output
        measured = execute(lesson, EDITIONS["learner"], with_bars=False)
        execute(set_up, EDITIONS["colab"])
    outputs = {
        edition: [cell.outputs for (who, _), cell in zip(runs, lesson.cells, strict=True) if edition in who]
        for edition in ("learner", "solutions")
    }
    outputs["colab"] = [set_up.cells[0].outputs, *outputs["learner"]]
    for edition, notebook in editions.items():
        for count, (cell, made) in enumerate(zip(code_cells(notebook), outputs[edition], strict=True), start=1):
            cell.outputs, cell.execution_count = copy.deepcopy(made), count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
        notebook.metadata["course"] = lesson.metadata.course | {"executed_code": code_hash(notebook)}
    return editions, measured


def _executed(name: str) -> tuple[str, dict[str, str], dict]:
    editions, measured = execute_all_editions(name)
    print(f"{name:26}{measured['seconds']:4} s {measured['gigabytes']:5} GB", flush=True)
    return name, {edition: nbformat.writes(notebook) for edition, notebook in editions.items()}, measured


def outputs_into(fresh: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Copy the outputs of an executed notebook into a freshly built one with the same code, and run its quiz.

    Raises:
        ValueError: the code differs, so the outputs would be stale.
    """
    if executed.metadata.get("course", {}).get("executed_code") != code_hash(fresh):
        raise ValueError("the code has changed since the outputs were made: build without --no-execute")
    for cell, old in zip(_lesson_cells(fresh), _lesson_cells(executed), strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    quiz_cells.run(fresh)
    fresh.metadata["course"] = executed.metadata["course"]
    return fresh


def renew_set_up(executed: dict[str, nbformat.NotebookNode]) -> None:
    """Give executed Colab editions today's set-up cell, which is the same in all, and its outputs of one new run.

    Args:
        executed: the editions by the names of their lessons.

    Raises:
        ValueError: the outputs of an edition are not of its code.
    """
    for name, notebook in executed.items():
        if notebook.metadata.get("course", {}).get("executed_code") != code_hash(notebook):
            raise ValueError(f"lesson {name} has been edited since it was executed: build without --set-up")
    set_up = nbformat.v4.new_notebook(cells=[colab_cells(next(iter(executed)))[1]])
    execute(set_up, EDITIONS["colab"])
    for notebook in executed.values():
        cell = code_cells(notebook)[0]
        cell.source, cell.outputs = set_up.cells[0].source, copy.deepcopy(set_up.cells[0].outputs)
        cell.metadata |= FOLDED
        notebook.metadata["course"]["executed_code"] = code_hash(notebook)


def readme_tables() -> dict[str, str]:
    """The generated parts of README.md, by the name of the place for each."""
    timings = json.loads(TIMINGS.read_text(encoding="utf-8"))
    table = ["| lesson | what you see | time | memory |", "|---|---|---|---|"]
    for name, summary in json.loads(
        (ROOT / "notebooks" / "scripts" / "lessons.json").read_text(encoding="utf-8")
    ).items():
        title = jupytext.read(SOURCES / f"{name}.py").cells[0].source.splitlines()[0].removeprefix("# ")
        time_, memory = timings[name]["seconds"], timings[name]["gigabytes"]
        table.append(f"| [{title}](notebooks/{name}.ipynb) | {summary} | {time_} s | {memory} GB |")
    scores = json.loads((ROOT / "data" / "tiny-llama" / "scores.json").read_text(encoding="utf-8"))
    before, after = scores["exact_match_before"], scores["exact_match_after"]
    results = [f"Exact match on {scores['test_chats']} test questions, greedy answers:\n"]
    results += ["| base | before | after the run |", "|---|---|---|"]
    for base, label in (
        ("NF4", "4 bit (NF4, double quantisation)"), ("16 bit", "unquantised"), ("shuffled", "weights shuffled")
    ):  # fmt: skip
        results.append(f"| {label} | {before[base] * 100:.1f} % | {after[base] * 100:.1f} % |")
    results.append(f"| none: always the commonest answer | | {scores['commonest_answer_rate'] * 100:.1f} % |")
    texts = ROOT / "qlora_helpers" / "course" / "alt_texts" / "diagrams.json"
    alt_texts = json.loads(texts.read_text(encoding="utf-8"))
    return {
        "lessons": "\n".join(table),
        "results": "\n".join(results),
        "real": real_model.markdown_table(),
        "commands": commands_table(),
        "course": f"![{alt_texts['course_map']}](notebooks/{MAP})",
        "map": map_table(),
        "t4": t4_table(),
        "memory": memory_errors.markdown_table(),
        "speed": speed.markdown_table(),
        "suggestions": suggestions_table(),
    }


def write_map(path: Path) -> None:
    """The map of the course as a picture for README.md: paths instead of letters, so that it looks the same everywhere."""
    with matplotlib.rc_context({"svg.hashsalt": "map", "svg.fonttype": "path"}):
        diagrams.course_map().savefig(path, metadata={"Date": None})


def suggestions_table() -> str:
    """The values to start from, with what each source says; what to change first; and the sources."""
    table = suggestions.read_table()
    lines = ["| setting | when | value | who says what |", "|---|---|---|---|"]
    for name, entries in table.items():
        if name not in ("sources", "first_changes"):
            for entry in entries:
                said = "<br>".join(f"**{one['source']}** {one['says']}" for one in entry["sources"])
                cells = (f"`{name}`", entry["when"], suggestions.shown(entry["value"]), said)
                lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "What to change first when it goes wrong:",
        "",
        "| what you see | change first | why |",
        "|---|---|---|",
    ]
    lines += [f"| {change.symptom} | {change.change} | {change.why} |" for change in suggestions.first_changes()]
    sources = (
        f"[{name}]({source['url']})" if source["url"].startswith("https:") else f"{name} ({source['url']})"
        for name, source in table["sources"].items()
    )
    return "\n".join([*lines, "", f"Sources: {', '.join(sources)}."])


# The modules that a lesson is about: what it shows, and not all that it uses.
HELPERS = {
    "01_memory_maths": ("memory/catalogue", "memory/prediction"),
    "02_nf4_vs_int4": ("quantize", "models/weights"),
    "03_double_quantisation": ("quantize",),
    "04_qlora_run": ("training/run", "training/trainer", "chats/files", "evaluation/answers"),
    "05_will_it_fit": ("memory/prediction", "memory/search", "memory/measurement", "models/in_4_bits"),
    "06_adapters_and_merging": ("adapters/files", "adapters/merge", "adapters/file_merge", "adapters/drift"),
    "07_does_it_cost_quality": ("statistics", "evaluation/answers"),
    "08_stability": ("training/spikes", "training/faulty_runs", "training/callbacks"),
    "09_out_of_memory": ("memory/out_of_memory", "memory/timeline", "memory/ladder", "memory/merge_memory"),
    "10_your_own_data": (
        "chats/files",
        "chats/report",
        "chats/lengths",
        "chats/split",
        "suggestions",
        "evaluation/scores",
        "evaluation/comparison",
        "evaluation/knowledge",
        "adapters/effect",
        "adapters/proven_merge",
        "adapters/gguf_export",
        "adapters/hops",
        "adapters/serving",
    ),
    "11_where_the_time_goes": ("memory/budget", "training/packing", "training/step_profile"),
    "12_past_one_gpu": ("memory/several",),
    "13_which_adapter": ("statistics",),
}


def map_table() -> str:
    """Where each lesson's source lies, and the modules that it is about, with their tests."""
    table = ["| lesson | source | helpers | tests |", "|---|---|---|---|"]
    for name, helpers in HELPERS.items():
        modules = [f"[{helper}](qlora_helpers/{helper}.py)" for helper in helpers]
        tests = []
        for helper in helpers:
            room, _, module = helper.rpartition("/")
            test = f"{room}/test_{module}.py".lstrip("/")
            tests.append(f"[{test.removesuffix('.py')}](tests/{test})")
        source = f"[{name}.py](notebooks/source/{name}.py)"
        table.append(f"| {int(name[:2])} | {source} | {', '.join(modules)} | {', '.join(tests)} |")
    return "\n".join(table)


COMMANDS = {
    "run": "the full QLoRA run, with a report",
    "preflight": "the machine; every lesson as learners get it: its text against its source, each cell run, outputs compared",
    "teaching": "slides, handouts and quizzes of all lessons from their stored outputs, and a zip for learners; LESSON=03 for one",
    "test": "ruff; every test of the helpers, the data and this project; each lesson once, with its exercises unsolved and solved",
    "test-all": "everything that `make test` covers; the learners' editions as they are, without AVX-512; long tests, the 16-bit and the shuffled control, 20 killed runs",
    "test-real": "a real model of 135 million parameters: fetched once, then its weights, tokens, template and a step in 4 bits",
    "test-colab": "the Colab editions and the troubleshooting page under Colab's versions, beside what else Colab has",
    "attack": "random inputs of every kind, kills at every file operation, tampered checkpoints, full disks",
    "mutants": "200 small changes of the helpers, one at a time, each of which their tests should notice",
    "notebooks LESSON=03": "one lesson built and executed anew, all editions; without LESSON all of them",
    "site": "the course as a website, from the stored outputs: pages, links and anchors checked",
}


def commands_table() -> str:
    """What each make command covers, and how long it took when `data/scripts/measure/commands.py` ran it.

    A time of fewer or more lessons than there are now says so.
    """
    measured = json.loads((ROOT / "data" / "measured" / "commands.json").read_text(encoding="utf-8"))
    table = ["| command | what it covers | time |", "|---|---|---|"]
    for command, covers in COMMANDS.items():
        rows = [row for row in measured["rows"] if row["command"] == command]
        newest = max((row.get("date", "") for row in rows), default="")
        rows = [row for row in rows if row.get("date", "") == newest]  # the course grows: older times are of less
        seconds = sorted(row["seconds"] for row in rows)
        if not seconds:
            raise ValueError(f"not measured: run  python -m data.scripts.measure.commands '{command}'")
        ends = [f"{s // 60} min {s % 60:02} s" if s >= 60 else f"{s} s" for s in (seconds[0], seconds[-1])]
        said = " ".join(text for row in rows for text in row["said"])
        other = sorted({int(number) for number in re.findall(r"(\d+) lessons", said)} - {len(lessons())})
        of = f" for {' or '.join(map(str, other))} lessons" if other else ""
        table.append(f"| `make {command}` | {covers} | {' to '.join(dict.fromkeys(ends))}{of} |")
    where = f"{measured['cores']} cores of an {measured['processor']}"
    return "\n".join([*table, "", f"Times are of {where} with nothing else to do, once the packages are installed."])


def t4_table() -> str:
    """The course's gears beside the articles' recipe, as `data/scripts/measure/t4_gear.py` measured them."""
    measured = json.loads((ROOT / "data" / "measured" / "t4_gear.json").read_text(encoding="utf-8"))
    rows = [row for row in measured["rows"] if row["what"] == "training"]
    by_size: dict = {}
    for row in rows:
        size = row["model"], "float16, as a T4" if row["gear"] == "t4" else "bfloat16", row["batch_size"], row["tokens"]
        result = row["outcome"]
        if result == "ran":
            result = f"{row['peak_allocated_bytes'] / GIB:.2f} GiB, {row['tokens_per_second']:,} tokens/s"
        by_size.setdefault(size, {})[row["who"]] = result
    table = [f"| on one {measured['gpu']} | | batch x tokens | the recipe | this course |", "|---|---|---|---|---|"]
    for (model, how, batch_size, tokens), results in by_size.items():
        table.append(f"| {model} | {how} | {batch_size} x {tokens:,} | {results['recipe']} | {results['ours']} |")
    return "\n".join(table)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two kernels with more threads than cores are several times slower
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="numbers of lessons, such as 02; all by default")
    parser.add_argument("--no-execute", action="store_true", help="update the texts, keep the outputs")
    parser.add_argument("--set-up", action="store_true", help="run only the Colab editions' set-up cell")
    args = parser.parse_args()
    names = [name for name in lessons() if not args.only or name[:2] in args.only]
    if not names:
        sys.exit(f"no lesson {' '.join(args.only)}: there are {', '.join(lessons())}")
    timings = json.loads(TIMINGS.read_text(encoding="utf-8")) if TIMINGS.exists() else {}
    done = {}
    if args.no_execute or args.set_up:
        for name in names:
            for edition, folder in EDITIONS.items():
                done[name, edition] = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        if args.set_up:
            renew_set_up({name: done[name, "colab"] for name in names})
    else:
        longest_first = sorted(names, key=lambda name: -timings.get(name, {"seconds": 0})["seconds"])
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for name, editions, timings[name] in pool.map(_executed, longest_first):
                done |= {(name, edition): nbformat.reads(text, as_version=4) for edition, text in editions.items()}
    TIMINGS.write_text(json.dumps(dict(sorted(timings.items())), indent=1) + "\n", encoding="utf-8")
    for (name, edition), executed in done.items():
        notebook = outputs_into(build_edition(name, edition, timings), executed)
        EDITIONS[edition].mkdir(exist_ok=True)
        nbformat.write(notebook, EDITIONS[edition] / f"{name}.ipynb")
    if set(timings) == set(lessons()):
        readme = ROOT / "README.md"
        readme.write_text(fill(readme.read_text(encoding="utf-8"), readme_tables()), encoding="utf-8")
        guide.fill_page()
        write_map(EDITIONS["learner"] / MAP)


if __name__ == "__main__":
    main()
