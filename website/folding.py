"""Sphinx's part of the pages: exercises and solutions that fold, formulas, and links to copied files."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective


class details(nodes.General, nodes.Element):
    """A part of a page that folds: `summary` is its line that is always there."""


def visit_details(writer, node: details) -> None:
    opened = " open" if node.get("open") else ""
    writer.body.append(f'<details class="{" ".join(node["classes"])}"{opened}>\n<summary>{node["summary"]}</summary>\n')


def depart_details(writer, node: details) -> None:
    writer.body.append("</details>\n")


class Solution(SphinxDirective):
    """A solution, closed until the reader opens it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        node = details(summary="Solution", classes=["solution"])
        self.state.nested_parse(self.content, self.content_offset, node)
        return [node]


class FoldExercises(SphinxTransform):
    """Put what is below the heading of an exercise into a part that folds, open at first."""

    default_priority = 300

    def apply(self) -> None:
        for section in list(self.document.findall(nodes.section)):
            title, *rest = section.children
            if title.astext().startswith("Exercise ") and rest:
                node = details("", *rest, summary="Task and check", classes=["exercise"], open=True)
                section.children = []
                section += [title, node]


class LinksToCopies(SphinxTransform):
    """Make the links of `pages` to copied files relative to the page that has them."""

    default_priority = 900

    def apply(self) -> None:
        up = "../" * self.env.docname.count("/")
        for link in self.document.findall(nodes.reference):
            if link.get("refuri", "").startswith("copy:"):
                link["refuri"] = up + link["refuri"].removeprefix("copy:")
                link["classes"] = ["file"]


def visit_formula(writer, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML, which browsers draw themselves."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    app.add_node(details, html=(visit_details, depart_details))
    app.add_directive("solution", Solution)
    app.add_transform(FoldExercises)
    app.add_transform(LinksToCopies)
    app.add_html_math_renderer("mathml", (visit_formula, None), (visit_formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
