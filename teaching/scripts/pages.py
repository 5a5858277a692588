"""Pages of HTML, each a single file that needs no network, from the built lessons and their stored outputs.

nbconvert makes them with the templates in `teaching/templates/`. Nothing is executed. Its own templates would load
scripts from other servers (RequireJS, MathJax, Mermaid, reveal.js); these have what they need inside.
"""

import copy
import html
import re

import nbformat
from nbconvert.exporters import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from notebooks.scripts import build
from teaching.scripts import ROOT

TEMPLATES = ROOT / "teaching" / "templates"
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
GLOSSARY = "GLOSSARY.md"


def lesson(name: str, edition: str = "learner") -> NotebookNode:
    """A stored edition of a lesson, with its title in the metadata."""
    notebook = nbformat.read(build.EDITIONS[edition] / f"{name}.ipynb", as_version=4)
    notebook.metadata["title"] = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    return notebook


def linked(text: str, ending: str) -> str:
    """Markdown whose links to lessons and to the glossary lead to pages beside this one; other relative links become text.

    Args:
        ending: of the files of lessons, such as `.html`.
    """

    def replaced(link: re.Match) -> str:
        words, target = link.groups()
        path, _, place = target.partition("#")
        file = path.rpartition("/")[2]
        if re.match(r"\w+:", target):
            return link[0]
        if file.endswith(".ipynb") and file.removesuffix(".ipynb") in build.lessons():
            return f"[{words}]({file.removesuffix('.ipynb')}{ending})"
        if file == GLOSSARY and (ROOT / GLOSSARY).exists():
            return f"[{words}](glossary.html{'#' * bool(place)}{place})"
        return words

    return LINK.sub(replaced, text)


def with_links(notebook: NotebookNode, ending: str) -> NotebookNode:
    """A copy whose texts link to pages of this kind."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, ending)
    return notebook


def anchors(page: str) -> str:
    """A page whose headings can be linked to as on GitHub: in lower case, with hyphens."""

    def lowered(heading: re.Match) -> str:
        words = html.unescape(re.sub(r"<[^>]*>", "", heading[3]))
        place = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        return f'<h{heading[1]} id="{place}"{heading[2]}>{heading[3]}</h{heading[1]}>'

    return re.sub(r'<h([1-6])(?: id="[^"]*")?([^>]*)>(.*?)</h\1>', lowered, page, flags=re.S)


def code_colours() -> str:
    """The style of highlighted code, for a light page and a dark one."""
    light, dark = (
        HtmlFormatter(style=style, nobackground=True).get_style_defs(".highlight")
        for style in ("default", "github-dark")
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{ @media screen {{\n{dark}\n}} }}"


def exported(
    notebook: NotebookNode, template: str, exporter: type[HTMLExporter] = HTMLExporter, **resources: str
) -> str:
    """A notebook as one page.

    Args:
        template: a folder of `teaching/templates/`.
        resources: texts that the template puts into the page.
    """
    made = exporter(template_name=template, extra_template_basedirs=[str(TEMPLATES)], exclude_anchor_links=True)
    texts = {"code_colours": code_colours()} | resources
    page, _ = made.from_notebook_node(notebook, resources={"course": texts})
    return anchors(page)
