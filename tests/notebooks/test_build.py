"""The build refuses stale outputs and lost places."""

import copy
import importlib.metadata
import json
import shutil
import sys

import nbformat
import pytest

from data.scripts.markdown_tables import fill
from notebooks.scripts import build
from qlora_helpers.course.quiz import marking

code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def notebook(*cells) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=list(cells))


ONE = notebook(text("# One"), code("a = 1"), code("print(a)"))


@pytest.mark.parametrize(
    "changed",
    [
        notebook(code("a = 2"), code("print(a)")),
        notebook(code("print(a)"), code("a = 1")),
        notebook(code("a = 1\nprint(a)")),
        notebook(code("a = 1"), code("print(a)"), code("")),
        notebook(code("a = 1"), text("print(a)")),
    ],
    ids=["a digit", "the order", "one cell of two", "a cell more", "code made text"],
)
def test_other_code_has_another_hash(changed):
    assert build.code_hash(changed) != build.code_hash(ONE)


def test_text_tags_and_outputs_are_not_in_the_hash():
    same = notebook(text("# Uno"), code("a = 1", metadata={"tags": ["x"]}), code("print(a)", execution_count=2))
    same.cells[2].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    assert build.code_hash(same) == build.code_hash(ONE)


def executed() -> nbformat.NotebookNode:
    made = copy.deepcopy(ONE)
    made.cells[2].outputs, made.cells[2].execution_count = [nbformat.v4.new_output("stream", text="1\n")], 2
    made.metadata["course"] = {"executed_code": build.code_hash(ONE), "versions": {"torch": "2"}}
    return made


def test_outputs_are_taken_over_under_a_new_text():
    fresh = notebook(text("# Another title"), code("a = 1"), code("print(a)"))
    taken = build.outputs_into(fresh, executed())
    assert taken.cells[0].source == "# Another title"
    assert (taken.cells[2].outputs[0].text, taken.cells[2].execution_count) == ("1\n", 2)
    assert taken.metadata.course == executed().metadata.course


def test_outputs_of_other_code_are_refused():
    fresh = notebook(text("# One"), code("a = 2"), code("print(a)"))
    with pytest.raises(ValueError, match="the code has changed since the outputs were made"):
        build.outputs_into(fresh, executed())
    never_run = executed()
    del never_run.metadata["course"]
    with pytest.raises(ValueError, match="the code has changed since the outputs were made"):
        build.outputs_into(copy.deepcopy(ONE), never_run)


SHOWS_A_BAR = """from IPython.display import display
display({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Writing shards:   0%|   | 0/1 [00:00<?, ?it/s]"}, raw=True)"""
SHOWS_A_SLIDER = """from IPython.display import display
display({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox(children=(IntSlider(),))"}, raw=True)"""


def test_a_progress_bar_that_would_stay_on_a_learner_s_page_is_refused(tmp_path):
    plain = code(SHOWS_A_BAR, metadata={"tags": ["plain-run"]})
    build.execute(notebook(code(SHOWS_A_SLIDER), plain), tmp_path, with_bars=False)
    build.execute(notebook(code(SHOWS_A_BAR)), tmp_path)
    with pytest.raises(
        ValueError, match=r"^progress bars that would stay on the page: 'Writing shards' in the cell 'from IPy"
    ):
        build.execute(notebook(code(SHOWS_A_BAR)), tmp_path, with_bars=False)


@pytest.fixture
def small_course(tmp_path, monkeypatch):
    """A course of one lesson, built and marked as executed, instead of the real one."""
    source, timings = tmp_path / "source", tmp_path / "timings.json"
    source.mkdir()
    (source / "01_one.py").write_text("# %% [markdown]\n# Takes {{seconds}} seconds\n\n# %%\na = 1\n")
    timings.write_text(json.dumps({"01_one": {"seconds": 5, "gigabytes": 0.1}}))
    (tmp_path / "README.md").write_text("<!-- lessons -->\n<!-- end of lessons -->\n")
    editions = {edition: tmp_path / edition for edition in build.EDITIONS}
    for folder in editions.values():
        folder.mkdir()
    for name in ("repository.json", "setup_cell.py"):
        shutil.copy(build.ROOT / "colab" / name, tmp_path / "colab" / name)
    shutil.copy(build.ROOT / "pyproject.toml", tmp_path)
    for name, value in {"ROOT": tmp_path, "SOURCES": source, "TIMINGS": timings, "EDITIONS": editions}.items():
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(marking, "FOLDER", tmp_path)  # it has no quiz
    monkeypatch.setattr(build.guide, "fill_page", lambda: None)
    monkeypatch.setattr(build, "readme_tables", lambda: {"lessons": "| a table |"})
    for edition, folder in editions.items():
        made = build.build_edition("01_one", edition, {})
        made.metadata["course"] = {"executed_code": build.code_hash(made), "versions": {}}
        nbformat.write(made, folder / "01_one.ipynb")
    return tmp_path


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
    build.main()


def test_new_texts_are_taken_over_without_running_anything(small_course, monkeypatch):
    monkeypatch.setattr(build, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("it started to execute"))
    call(monkeypatch, "--no-execute")
    for edition in build.EDITIONS:
        assert "Takes 5 seconds" in (small_course / edition / "01_one.ipynb").read_text()
    assert (small_course / "README.md").read_text() == "<!-- lessons -->\n| a table |\n<!-- end of lessons -->\n"
    assert (small_course / "learner" / build.MAP).read_text().startswith("<?xml")


def test_new_code_is_not_taken_over_without_running_it(small_course, monkeypatch):
    (small_course / "source" / "01_one.py").write_text("# %%\na = 2\n")
    before = {edition: (small_course / edition / "01_one.ipynb").read_bytes() for edition in build.EDITIONS}
    with pytest.raises(ValueError, match="build without --no-execute"):
        call(monkeypatch, "--no-execute")
    assert {edition: (small_course / edition / "01_one.ipynb").read_bytes() for edition in build.EDITIONS} == before


WITH_LINKS = """# %% [markdown]
# A [block](../GLOSSARY.md#block), [lesson 1](01_one.ipynb), [a page](https://example.org/../x), [a part](#part)
"""


def built_with_links(small_course, repository: str) -> dict[str, str]:
    """The text of each edition of a lesson with links, in a course with this repository."""
    (small_course / "source" / "01_one.py").write_text(WITH_LINKS)
    (small_course / "colab" / "repository.json").write_text(json.dumps({"github": repository}))
    return {edition: build.build_edition("01_one", edition, {}).cells[-1].source for edition in build.EDITIONS}


def test_links_of_a_colab_edition_lead_out_of_colab_s_empty_folder(small_course):
    version = importlib.metadata.version("qlora-helpers")
    text = built_with_links(small_course, "someone/course")["colab"]
    assert f"[block](https://github.com/someone/course/blob/v{version}/GLOSSARY.md#block)" in text
    lesson = f"https://colab.research.google.com/github/someone/course/blob/v{version}/colab/01_one.ipynb"
    assert f"[lesson 1]({lesson})" in text
    assert "[a page](https://example.org/../x), [a part](#part)" in text


def test_links_within_the_course_s_files_are_relative(small_course):
    texts = built_with_links(small_course, "someone/course") | {"none": built_with_links(small_course, "")["colab"]}
    for edition, up in (("learner", "../"), ("solutions", "../../"), ("none", "../")):
        assert f"[block]({up}GLOSSARY.md#block), [lesson 1](01_one.ipynb)" in texts[edition]


@pytest.fixture
def new_set_up(small_course, monkeypatch):
    """The small course with a changed set-up cell, and a stand-in for what executes it."""

    def execute(notebook, folder):
        assert len(notebook.cells) == 1 and folder == small_course / "colab"
        notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text=notebook.cells[0].source)]

    (small_course / "colab" / "setup_cell.py").write_text("set_up = 'GITHUB_REPOSITORY' or 'COURSE_VERSION'\n")
    monkeypatch.setattr(build, "execute", execute)
    return small_course


def test_the_set_up_cell_alone_is_run_anew(new_set_up, monkeypatch):
    with pytest.raises(ValueError, match="build without --no-execute"):
        call(monkeypatch, "--no-execute")
    before = {edition: (new_set_up / edition / "01_one.ipynb").read_bytes() for edition in ("learner", "solutions")}
    monkeypatch.setattr(build, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("it started to execute lessons"))
    call(monkeypatch, "--set-up")
    made = nbformat.read(new_set_up / "colab" / "01_one.ipynb", as_version=4)
    source = f"set_up = '' or '{importlib.metadata.version('qlora-helpers')}'"
    assert made.cells[1].source == made.cells[1].outputs[0].text == source
    assert made.metadata.course.executed_code == build.code_hash(made)
    for edition, old in before.items():
        assert (
            nbformat.reads(old.decode(), 4).cells[1] == nbformat.read(new_set_up / edition / "01_one.ipynb", 4).cells[1]
        )


def test_a_new_set_up_cell_is_not_put_above_stale_outputs(new_set_up, monkeypatch):
    path = new_set_up / "colab" / "01_one.ipynb"
    edited = path.read_text().replace("a = 1", "a = 2")
    path.write_text(edited)
    with pytest.raises(ValueError, match="lesson 01_one has been edited since it was executed"):
        call(monkeypatch, "--set-up")
    (new_set_up / "source" / "01_one.py").write_text("# %%\na = 3\n")
    path.write_text(edited.replace("a = 2", "a = 1"))
    with pytest.raises(ValueError, match="the code has changed"):
        call(monkeypatch, "--set-up")


def test_a_lesson_that_is_not_there_is_named(small_course, monkeypatch):
    with pytest.raises(SystemExit, match="no lesson 44: there are 01_one"):
        call(monkeypatch, "--no-execute", "44")


# The places in Markdown files

PAGE = "before\n<!-- a -->\nold\n<!-- end of a -->\nbetween\n<!-- b -->\n<!-- end of b -->\nafter\n"


def test_each_table_comes_into_its_place_and_the_rest_stays():
    once = fill(PAGE, {"b": "| 2 |", "a": "| 1 |"})
    assert once == (
        "before\n<!-- a -->\n| 1 |\n<!-- end of a -->\nbetween\n<!-- b -->\n| 2 |\n<!-- end of b -->\nafter\n"
    )
    assert fill(once, {"a": "| 1 |"}) == once
    assert fill(PAGE, {}) == PAGE


@pytest.mark.parametrize("lost", ["<!-- a -->", "<!-- end of a -->"])
def test_a_lost_place_is_named(lost):
    with pytest.raises(ValueError, match=r"no place <!-- a --> … <!-- end of a --> in the text: put it back"):
        fill(PAGE.replace(lost, ""), {"a": "| 1 |"})
