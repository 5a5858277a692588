"""Handouts: each lesson as one page that can be read, searched and printed without Jupyter and without a network."""

import nbformat

from teaching.scripts import ROOT, pages

ENDING = ".html"


def page(name: str) -> str:
    """A lesson as learners get it, its exercises unsolved, with the stored outputs."""
    return pages.exported(pages.with_links(pages.lesson(name), ENDING), "handout")


def glossary() -> str:
    """The glossary as a page to which the handouts link.

    Raises:
        FileNotFoundError: the repository has no glossary.
    """
    text = (ROOT / pages.GLOSSARY).read_text(encoding="utf-8")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    notebook.metadata["title"] = text.splitlines()[0].removeprefix("# ")
    return pages.exported(pages.with_links(notebook, ENDING), "handout")
