"""Every edition of every lesson is built from its source, executed with the pinned versions, and really checked."""

import copy
import json
import re

import nbformat
import pytest
from nbval.plugin import coalesce_streams

from conftest import Notebook
from notebooks.scripts import build
from notebooks.scripts.running import code_cells, has_tag, in_one_kernel
from qlora_helpers.course.check_lines import compared
from tests import ROOT
from tests.support.images import alt_texts

NOTEBOOKS = [(name, edition) for name in build.lessons() for edition in build.EDITIONS]

every_notebook = pytest.mark.parametrize(("name", "edition"), NOTEBOOKS)
every_lesson = pytest.mark.parametrize("name", build.lessons())


def stored(name: str, edition: str) -> nbformat.NotebookNode:
    return nbformat.read(build.EDITIONS[edition] / f"{name}.ipynb", as_version=4)


def output_text(notebook) -> str:
    """Everything that the cells printed; no figures."""
    return "\n".join(o.text for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "stream")


@every_notebook
def test_an_edition_is_what_its_source_gives(name, edition):
    def essence(notebook):
        return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]

    built = build.build_edition(name, edition, json.loads(build.TIMINGS.read_text()))
    assert essence(stored(name, edition)) == essence(built), "run: make notebooks"


def test_no_edition_is_left_over_from_a_lesson_that_is_gone():
    for folder in build.EDITIONS.values():
        assert {path.stem for path in folder.glob("*.ipynb")} == set(build.lessons())


@every_notebook
def test_all_cells_were_executed_and_nothing_went_wrong(name, edition):
    notebook = stored(name, edition)
    for cell in code_cells(notebook):
        assert cell.execution_count is not None, f"never executed, so never compared: {cell.source[:60]}"
        for output in cell.outputs:
            assert output.output_type != "error", cell.source[:60]
            assert output.get("name") != "stderr", f"a message that a learner would see: {output.text[:200]}"
            assert build.WIDGET not in output.get("data", {}), "a stored widget has no state to show"
    assert "widgets" not in notebook.metadata


@every_notebook
def test_outputs_belong_to_this_code_and_to_the_pinned_versions(name, edition):
    notebook = stored(name, edition)
    assert notebook.metadata.course.executed_code == build.code_hash(notebook)
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))
    assert notebook.metadata.course.versions.keys() == set(build.PACKAGES)
    for package, version in notebook.metadata.course.versions.items():
        assert version.partition("+")[0] == pins[package], package


@every_notebook
def test_at_least_three_cells_are_compared(name, edition):
    compared = [c for c in code_cells(stored(name, edition)) if "nbval-check-output" in c.metadata.get("tags", [])]
    assert len([cell for cell in compared if cell.outputs]) >= 3


@every_notebook
def test_changing_one_digit_of_a_compared_output_goes_red(name, edition, request):
    """The comparison of conftest.py, with the stored outputs as the run and a mutated copy as the reference."""
    path = build.EDITIONS[edition] / f"{name}.ipynb"
    file = Notebook.from_parent(request.session, path=path)
    mutated = 0
    for item in file.collect():
        if not item.options["check"]:
            continue
        ran = coalesce_streams(item.cell.outputs)
        assert item.compare_outputs(ran, copy.deepcopy(ran))
        for number, output in enumerate(ran):
            digit = re.search(r"\d", output.get("text", ""))
            if digit is None:
                continue
            reference = copy.deepcopy(ran)
            at = digit.start()
            reference[number].text = output.text[:at] + str((int(digit.group()) + 1) % 10) + output.text[at + 1 :]
            assert not item.compare_outputs(ran, reference), f"a wrong digit passed: {item.cell.source[:60]}"
            mutated += 1
    assert mutated >= 3


def shown(cell) -> list:
    """What is compared in a cell: its streams, each in one piece, and the data that is not an image."""
    made = coalesce_streams(copy.deepcopy(cell.outputs))
    texts = [compared(output.get("text", "")) for output in made]
    return [text or {k: v for k, v in o.data.items() if "image" not in k} for text, o in zip(texts, made, strict=True)]


@every_lesson
def test_the_editions_differ_in_nothing_but_the_exercises(name):
    """This is why `make test` can run a lesson once, instead of the three editions separately."""
    learner, solved, colab = (code_cells(stored(name, edition)) for edition in ("learner", "solutions", "colab"))
    runs = in_one_kernel(learner, solved)
    alone = {id(cell) for who, cell in runs if who == ("learner",)}
    of_learner = [cell for cell in learner if id(cell) not in alone]
    of_both = [cell for who, cell in runs if len(who) == 2]
    assert sum(has_tag(cell, "exercise") for cell in learner) >= 2 and len(of_both) >= 10
    for one, other in (*zip(of_learner, of_both, strict=True), *zip(learner, colab[1:], strict=True)):
        assert one.source == other.source
        if has_tag(one, "nbval-check-output"):
            assert shown(one) == shown(other), one.source[:80]


@every_lesson
def test_the_package_comes_before_torch_so_that_its_threads_wait_asleep(name):
    """JupyterLab started without `make lab` has no OMP_WAIT_POLICY: the package sets it, if it is imported first."""
    code = "\n".join(cell.source for cell in code_cells(stored(name, "learner")))
    imported = re.findall(
        r"^(?:import|from) (qlora_helpers|torch|transformers|bitsandbytes|peft|trl|datasets)\b", code, re.M
    )
    assert imported[0] == "qlora_helpers"


@every_notebook
def test_every_image_has_alt_text(name, edition):
    notebook = stored(name, edition)
    alts = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            assert not any(kind.startswith("image/") for kind in data), (
                "show figures with plots.show, which sets alt text"
            )
            alts += alt_texts(data.get("text/html", ""))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            alts += alt_texts(cell.source)
            alts += re.findall(r"!\[([^\]]*)\]", cell.source)
    assert alts
    assert all(len(alt) >= 10 for alt in alts)


def test_links_to_other_files_resolve():
    links = [
        (build.EDITIONS[edition], target)
        for name, edition in NOTEBOOKS
        for cell in stored(name, edition).cells
        if cell.cell_type == "markdown"
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", cell.source)
        if not target.startswith("http")
    ]
    assert len(links) >= len(NOTEBOOKS)
    for folder, target in links:
        assert (folder / target).resolve().exists(), (folder.name, target)


@every_lesson
def test_a_lesson_is_built_as_all_lessons_are(name):
    cells = stored(name, "learner").cells
    text = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert text[0].startswith(f"# {int(name[:2])} · ")
    assert "You will" in text[0]
    assert re.search(r"Takes about \d+ seconds and [\d.]+ GB", text[0]), "time and memory come from the build"
    assert text[-1].startswith("## You have")
    exercises = [cell for cell in cells if "exercise" in cell.metadata.get("tags", [])]
    solutions = [cell for cell in stored(name, "solutions").cells if "solution" in cell.metadata.get("tags", [])]
    assert len(exercises) == len(solutions) >= 2
    assert all(len(cell.source.splitlines()) <= 25 for cell in code_cells(stored(name, "learner")))


@every_lesson
def test_exercises_are_unsolved_for_learners_and_right_in_the_solutions(name):
    unsolved, solved = output_text(stored(name, "learner")), output_text(stored(name, "solutions"))
    count = len(re.findall(r"^○ .*not solved yet", unsolved, re.M))
    assert count >= 2
    assert len(re.findall(r"^✓ .*: right!", solved, re.M)) == count
    assert "not solved yet" not in solved


@every_lesson
def test_the_set_up_cell_shows_its_title_and_no_code(name):
    cell = code_cells(stored(name, "colab"))[0]
    assert cell.source.startswith("# @title Set-up") and cell.metadata["cellView"] == "form"
    assert cell.metadata["jupyter"]["source_hidden"] is True


@every_lesson
def test_colab_starts_a_t4_and_adds_nothing_but_badge_and_set_up(name):
    learner, colab = stored(name, "learner"), stored(name, "colab")
    assert colab.metadata.accelerator == "GPU"
    assert colab.metadata.colab.gpuType == "T4"
    assert "colab-badge.svg" in colab.cells[0].source
    assert [cell.source for cell in colab.cells[2:]] == [cell.source for cell in learner.cells]
