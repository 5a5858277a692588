"""Slides of a lesson, from the same cells as the lesson itself and with their stored outputs; nothing is executed.

Where a slide begins follows from the lesson: each heading begins a column, and each step in it, a text with the code that
shows it, is a slide of that column. Figures come without the code that draws them. The imports are left out, and so are
the cells of exercises; what to do in them stays. Each question of the quiz is a slide; its answer is in the speaker's
notes. Two tags in a source change that for a cell: `no-slide` leaves it out, and `new-slide` begins a slide with it.
"""

import copy
import re

import nbformat
from nbconvert.exporters import SlidesExporter
from nbformat import NotebookNode

from notebooks.scripts import build, quiz_cells
from notebooks.scripts.running import has_tag
from qlora_helpers.course import quiz
from teaching.scripts import ROOT, pages

ENDING = ".slides.html"
FULL = 25  # lines of code on a full slide
WORDS = 8  # of text in the height of such a line
REVEAL = ROOT / "teaching" / "reveal.js"


def _split_at_headings(cell: NotebookNode) -> list[NotebookNode]:
    """A text as several: a cell often ends one section and begins the next one."""
    if cell.cell_type != "markdown":
        return [cell]
    parts = re.split(r"\n(?=#{1,3} )", cell.source)
    cells = [nbformat.v4.new_markdown_cell(part.strip(), metadata=copy.deepcopy(cell.metadata)) for part in parts]
    return [made for made in cells if made.source]


def _is_figure(cell: NotebookNode) -> bool:
    return any("<img" in output.get("data", {}).get("text/html", "") for output in cell.get("outputs", []))


def _lines(cell: NotebookNode) -> float:
    """About how high a cell is on a slide, in lines of code."""
    if cell.cell_type == "markdown":
        table = sum(line.startswith("|") for line in cell.source.splitlines())
        blocks = len(re.findall(r"\n\n|^[-*] |^#", cell.source, re.M))
        return len(cell.source.split()) / WORDS + table + blocks
    shown = 0 if _is_figure(cell) else len(cell.source.splitlines())
    printed = sum(len(output.get("text", "").splitlines()) for output in cell.outputs)
    rich = 14 * sum("data" in output for output in cell.outputs)
    return shown + printed + rich + 2


def _on_slides(cells: list[NotebookNode]) -> tuple[list[NotebookNode], list[NotebookNode | None]]:
    """The cells that are shown, and the one after each: no imports, no answers to exercises and what checks them."""
    shown, in_exercise, imports = [], False, True
    for cell in cells:
        if cell.cell_type == "markdown":
            in_exercise = False
        elif has_tag(cell, "exercise"):
            in_exercise = True
        elif imports:
            imports = False  # the first cell of code
            continue
        in_quiz = has_tag(cell, quiz_cells.TAG) and cell.cell_type == "code"
        if not (in_exercise or in_quiz or has_tag(cell, "no-slide")):
            shown.append(cell)
    return shown, [*shown[1:], None]


def _quiz_slides(lesson: int) -> list[NotebookNode]:
    """A slide for each question, and its answer in the notes."""
    made = []
    for question in quiz.read_quiz(lesson):
        made.append(_typed(nbformat.v4.new_markdown_cell(f"## Quiz\n\n{quiz.as_markdown((question,))}"), "subslide"))
        right = question.right
        notes = "\n".join(f"- **{o.letter}**{' (right)' if o.right else ''}: {o.says}" for o in question.options)
        made.append(_typed(nbformat.v4.new_markdown_cell(f"Right is **{right.letter}**.\n\n{notes}"), "notes"))
    made[0].metadata.slideshow.slide_type = "slide"
    return made


def _typed(cell: NotebookNode, kind: str) -> NotebookNode:
    cell.metadata["slideshow"] = {"slide_type": kind}
    return cell


def marked(notebook: NotebookNode, lesson: int) -> NotebookNode:
    """A copy of a lesson whose cells say, as `slideshow` in their metadata, on which slide they are.

    `slide` begins a column, `subslide` a slide in it, `-` goes on with the slide, `notes` are the speaker's, and what is
    left out is not in the copy.
    """
    cells = [part for cell in copy.deepcopy(notebook.cells) for part in _split_at_headings(cell)]
    slides: list[NotebookNode] = []
    height, has_code, where = 0.0, False, ""
    for cell, following in zip(*_on_slides(cells), strict=True):
        if has_tag(cell, quiz_cells.TAG):
            slides += _quiz_slides(lesson)
            continue
        is_text, lines = cell.cell_type == "markdown", _lines(cell)
        heading = re.match(r"##? (.*)", cell.source) if is_text else None
        # a text begins a step, unless it concludes the one before it
        is_step = has_code and (
            _is_figure(cell) or (is_text and following is not None and following.cell_type == "code")
        )
        if heading or not slides:
            kind, where = "slide", heading[1] if heading else ""
        elif has_tag(cell, "new-slide") or is_step or (height > 3 and height + lines > FULL):
            kind = "subslide"
            cell.metadata["where"] = where
        else:
            kind = "-"
        height = lines if kind != "-" else height + lines
        has_code = not is_text or (has_code and kind == "-")
        if _is_figure(cell):
            cell.metadata["transient"] = {"remove_source": True}
        slides.append(_typed(cell, kind))
    made = copy.deepcopy(notebook)
    made.cells = slides
    return made


def page(name: str) -> str:
    """The slides of a lesson as one page, with reveal.js in it.

    Raises:
        FileNotFoundError: the copy of reveal.js is not there.
    """
    notebook = marked(pages.with_links(pages.lesson(name), ENDING), int(name[:2]))
    reveal = {file: (REVEAL / file).read_text(encoding="utf-8") for file in ("reveal.js", "reveal.css", "notes.js")}
    texts = {file.replace(".", "_"): text.replace("</script", r"<\/script") for file, text in reveal.items()}
    return pages.exported(notebook, "slides", SlidesExporter, **texts)


def count(name: str) -> int:
    """How many slides a lesson has."""
    notebook = marked(pages.lesson(name), int(name[:2]))
    return sum(cell.metadata.slideshow.slide_type in ("slide", "subslide") for cell in notebook.cells)


if __name__ == "__main__":
    for lesson in build.lessons():
        print(f"{lesson:28}{count(lesson):4} slides")
