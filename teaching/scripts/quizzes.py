"""The quiz for other places: Moodle's GIFT format, and pages to print, with the questions alone and with an answer key.

GIFT as Moodle's importer reads it (`question/format/gift/format.php`): a question ends with an empty line, its options are
in braces, `=` before the right one and `~` before the others, `#` before what is said to it. These signs are written with
a backslash where they are meant as they are.
"""

import nbformat

from qlora_helpers.course.quiz import Question, as_markdown
from teaching.scripts import pages

SIGNS = "\\~=#{}:"  # the backslash first
COURSE = "QLoRA course"
INTRODUCTION = "Choose one answer for each question."


def _escaped(text: str) -> str:
    for sign in SIGNS:
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def gift(title: str, questions: tuple[Question, ...]) -> str:
    """A category of questions in Moodle's GIFT format; each option says what it says in the notebook.

    Args:
        title: of the lesson, which names the category.
    """
    blocks = [f"// {title}: made from the course by  make teaching", f"$CATEGORY: {COURSE}/{title.replace('/', '//')}"]
    for question in questions:
        lines = [f"::Quiz {_escaped(question.number)}::[markdown]{_escaped(question.text)} {{"]
        for option in question.options:
            lines.append(f"{'=' if option.right else '~'}{_escaped(option.text)}#{_escaped(option.says)}")
        blocks.append("\n".join([*lines, "}"]))
    return "\n\n".join(blocks) + "\n"


def printable(title: str, questions: tuple[Question, ...]) -> str:
    """A page with a lesson's questions, to print."""
    return _page(f"{title}: quiz", f"{INTRODUCTION}\n\n{as_markdown(questions)}")


def answer_key(title: str, questions: tuple[Question, ...]) -> str:
    """A page with the right answers first, and then each question with what its options say."""
    keys = "\n".join(["| question | right |", "|---|---|", *(f"| {q.number} | {q.right.letter} |" for q in questions)])
    explained = []
    for question in questions:
        says = (f"- **{o.letter}{' (right)' * o.right}** {o.text}: *{o.says}*" for o in question.options)
        explained.append("\n".join([f"**{question.number}** {question.text}", "", *says]))
    return _page(f"{title}: answer key", "\n\n".join([keys, *explained]))


def _page(title: str, text: str) -> str:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {title}\n\n{text}")])
    notebook.metadata["title"] = title
    return pages.exported(notebook, "handout")
