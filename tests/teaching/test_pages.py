"""Handouts and slides have all that the lessons have, need no network, and lead nowhere that is not there."""

import re
import shutil
import subprocess

import nbformat
import pytest

from notebooks.scripts import build
from notebooks.scripts.running import code_cells, has_tag
from qlora_helpers.course import quiz
from teaching.scripts import handouts, pages, slides
from tests.teaching.reading import read, squeezed

SMALL = "03_double_quantisation"
every_lesson = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == SMALL else pytest.mark.everything) for name in build.lessons()]
)


def lines_of(notebook: nbformat.NotebookNode) -> list[str]:
    """All lines of code and of what was printed."""
    cells = code_cells(notebook)
    texts = [cell.source for cell in cells]
    outputs = [output for cell in cells for output in cell.outputs]
    texts += [o.get("text") or ("" if "text/html" in o.get("data", {}) else o.data["text/plain"]) for o in outputs]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def alts_of(notebook: nbformat.NotebookNode) -> list[str]:
    rich = [o.get("data", {}).get("text/html", "") for cell in code_cells(notebook) for o in cell.outputs]
    return [alt for text in rich for alt in read(text).alts]


# ---- Handouts


@every_lesson
def test_a_handout_has_every_line_figure_and_alt_text_and_loads_nothing(name):
    lesson, made = pages.lesson(name), handouts.page(name)
    page = read(made)
    text = squeezed(page.text)
    assert page.loaded == [], "a handout is a single file"
    assert page.alts == alts_of(lesson) and all(page.alts)
    assert [line for line in lines_of(lesson) if squeezed(line) not in text] == []
    for cell in lesson.cells:
        if cell.cell_type == "markdown":
            for word in re.findall(r"[A-Za-z]{4,}", pages.linked(re.sub(r"\]\([^)]*\)", "]()", cell.source), ".html")):
                assert word in text, (word, cell.source[:60])
    assert '<html lang="en">' in made and f"<title>{lesson.metadata.title}</title>" in made
    assert "prefers-color-scheme: dark" in made and "<script" not in made


@every_lesson
def test_links_of_a_handout_lead_to_what_is_beside_it(name):
    lessons = {f"{other}{handouts.ENDING}" for other in build.lessons()} | {"glossary.html"}
    for link in read(handouts.page(name)).links:
        assert link.startswith(("https://", "#")) or link.partition("#")[0] in lessons, link


@pytest.mark.skipif(not (pages.ROOT / pages.GLOSSARY).exists(), reason="the repository has no glossary")
def test_the_glossary_has_the_places_to_which_lessons_link():
    places = read(handouts.glossary()).places
    linked = {
        link.partition("#")[2]
        for name in build.lessons()
        for cell in pages.with_links(pages.lesson(name), handouts.ENDING).cells
        if cell.cell_type == "markdown"
        for link in re.findall(r"\]\((glossary.html[^)]*)\)", cell.source)
    }
    assert "absmax" in places and linked - {""} <= set(places)


def test_links_are_made_to_fit():
    text = (
        "[lesson 2](02_nf4_vs_int4.ipynb), [a *card*](../data/tiny-llama/README.md), [x](https://x.org/a), ![y](z.png)"
    )
    assert pages.linked(text, ".html") == "[lesson 2](02_nf4_vs_int4.html), a *card*, [x](https://x.org/a), ![y](z.png)"
    assert pages.linked("[l](02_nf4_vs_int4.ipynb) `a[0](1)`", ".slides.html").startswith(
        "[l](02_nf4_vs_int4.slides.html)"
    )


def test_headings_have_the_places_that_github_gives_them():
    assert pages.anchors("<h1>A &amp; B</h1>") == '<h1 id="a--b">A &amp; B</h1>'
    assert '<h2 id="double-quantisation-2-bits">' in pages.anchors(
        '<h2 id="X">Double <em>quantisation</em>: 2 bits</h2>'
    )


# ---- Handouts on paper

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
on_paper = pytest.mark.skipif(
    not (CHROMIUM and shutil.which("pdftotext")),
    reason="printing needs Chromium, and pdftotext to read what was printed",
)


def printed(page: str, folder) -> str:
    """The text of a page as Chromium prints it."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    made = [CHROMIUM, *options, f"--print-to-pdf={folder / 'page.pdf'}", (folder / "page.html").as_uri()]
    subprocess.run(made, check=True, capture_output=True, timeout=120)
    ways = (["pdftotext", way, str(folder / "page.pdf"), "-"] for way in ("-layout", "-raw"))
    return "\n".join(subprocess.run(way, check=True, capture_output=True, encoding="utf-8").stdout for way in ways)


@on_paper
@pytest.mark.everything
@pytest.mark.parametrize("name", build.lessons())
def test_no_line_is_cut_off_in_print(name, tmp_path):
    text = squeezed(printed(handouts.page(name), tmp_path))
    assert [line for line in lines_of(pages.lesson(name)) if squeezed(line) not in text] == []


@on_paper
@pytest.mark.everything
def test_the_last_test_notices_lines_that_are_cut_off(tmp_path):
    page = handouts.page(SMALL)
    cut = page.replace("white-space: pre-wrap; overflow-wrap: anywhere; overflow: visible;", "overflow: hidden;")
    assert cut != page
    text = squeezed(printed(cut, tmp_path))
    assert any(squeezed(line) not in text for line in lines_of(pages.lesson(SMALL)))


# ---- Slides


@every_lesson
def test_slides_have_the_texts_figures_and_outputs_and_load_nothing(name):
    lesson, made = pages.lesson(name), slides.page(name)
    page = read(made)
    text = squeezed(page.text)
    assert page.loaded == [] and "unpkg" not in made and "Reveal.initialize" in made
    assert page.alts == alts_of(lesson)
    assert len(page.sections) == slides.count(name) >= 15
    headings = [
        line
        for cell in lesson.cells
        if cell.cell_type == "markdown"
        for line in re.findall(r"^##? (.+)$", cell.source, re.M)
    ]
    for heading in headings:
        assert squeezed(re.sub(r"[*`]", "", heading)) in text, heading
    in_exercise, left_out = False, 1  # the imports
    for cell in lesson.cells:
        in_exercise = cell.cell_type == "code" and (in_exercise or has_tag(cell, "exercise"))
        if cell.cell_type != "code" or in_exercise:
            continue
        if left_out:
            left_out -= 1
            continue
        for output in cell.outputs:
            assert squeezed(output.get("text", "")) in text, cell.source[:80]
        if not slides._is_figure(cell):
            assert squeezed(cell.source) in text, cell.source[:80]


@every_lesson
def test_the_answers_to_the_quiz_are_in_the_speakers_notes_only(name):
    page = read(slides.page(name))
    for question in quiz.read_quiz(name[:2]):
        asked = squeezed(f"{question.number} {question.text.replace('`', '')}")
        assert sum(asked in squeezed(section) for section in page.sections) == 1
        assert f"Right is {question.right.letter}." in page.notes
        for option in question.options:
            said = squeezed(option.says.replace("`", ""))
            assert said in squeezed(page.notes) and said not in squeezed(page.text)


def cell(kind: str, source: str, *tags: str, **more):
    make = nbformat.v4.new_markdown_cell if kind == "text" else nbformat.v4.new_code_cell
    return make(source, metadata={"tags": list(tags)} if tags else {}, **more)


FIGURE = nbformat.v4.new_output("display_data", data={"text/html": '<img alt="a line" src="data:,">'})


def kinds(*cells) -> list[tuple[str, str]]:
    marked = slides.marked(nbformat.v4.new_notebook(cells=list(cells)), 3)
    return [(made.metadata.slideshow.slide_type, made.source.splitlines()[0]) for made in marked.cells]


def test_headings_begin_columns_and_steps_begin_slides():
    assert kinds(
        cell("text", "# 1 · One\n\nYou will"),
        cell("code", "import torch"),
        cell("text", "## First\n\nIt is so:"),
        cell("code", "a = 1"),
        cell("text", "And so:"),
        cell("code", "b = 1"),
        cell("text", "Therefore.\n\n## Second\n\nNow:"),
        cell("code", "plot()", outputs=[FIGURE]),
    ) == [
        ("slide", "# 1 · One"), ("slide", "## First"), ("-", "a = 1"), ("subslide", "And so:"), ("-", "b = 1"),
        ("-", "Therefore."), ("slide", "## Second"), ("-", "plot()"),
    ]  # fmt: skip


def test_what_is_left_out_and_what_tags_change():
    assert kinds(
        cell("text", "# 1 · One"),
        cell("code", "import torch"),
        cell("text", "Not shown.", "no-slide"),
        cell("code", "a = 1"),
        cell("code", "b = 1", "new-slide"),
        cell("text", "## Exercise 1"),
        cell("code", "x = ...", "exercise"),
        cell("code", "check(x)", "nbval-check-output"),
        cell("text", "After it."),
        cell("code", "y = 1"),
    ) == [
        ("slide", "# 1 · One"), ("-", "a = 1"), ("subslide", "b = 1"), ("slide", "## Exercise 1"), ("-", "After it."), ("-", "y = 1"),
    ]  # fmt: skip


def test_a_full_slide_goes_on_with_the_next_one_under_the_heading_of_its_column():
    long = "\n".join(f"a = {n}" for n in range(20))
    cells = [
        cell("text", "# 1 · One"),
        cell("code", "import"),
        cell("text", "## Two"),
        cell("code", long),
        cell("code", long),
    ]
    marked = slides.marked(nbformat.v4.new_notebook(cells=cells), 3)
    assert [one.metadata.slideshow.slide_type for one in marked.cells] == ["slide", "slide", "-", "subslide"]
    assert marked.cells[-1].metadata.where == "Two" and "where" not in marked.cells[1].metadata


def test_the_lesson_itself_is_not_changed():
    lesson = pages.lesson(SMALL)
    before = nbformat.writes(lesson)
    slides.marked(lesson, 3), pages.with_links(lesson, ".html")
    assert nbformat.writes(lesson) == before


def test_the_copy_of_reveal_js_is_whole_and_has_its_licence():
    folder = slides.REVEAL
    assert "reveal.js 5.2.1" in (folder / "README.md").read_text(encoding="utf-8")
    assert "5.2.1" in (folder / "reveal.js").read_text(encoding="utf-8")
    assert (folder / "LICENSE").read_text(encoding="utf-8").startswith("Copyright (C) 2011-2024 Hakim El Hattab")
    assert {path.name for path in folder.iterdir()} == {"README.md", "LICENSE", "reveal.js", "reveal.css", "notes.js"}
