"""The quiz for Moodle is what Moodle's importer makes the same questions of; printed, it has no answers but in the key."""

import re

import pytest

from notebooks.scripts import build
from qlora_helpers.course import quiz
from qlora_helpers.course.quiz import Option, Question
from teaching.scripts import pages, quizzes
from tests.teaching.reading import read, squeezed

every_lesson = pytest.mark.parametrize("name", build.lessons())
NAMES = {":": "&&058;", "#": "&&035;", "=": "&&061;", "{": "&&123;", "}": "&&125;", "~": "&&126;"}


def imported(text: str) -> tuple[str, list[dict]]:
    """The category and the questions, in the steps of `readquestion` in Moodle's question/format/gift/format.php."""

    def hidden(block: str) -> str:
        block = block.replace("\\\\", "&&092;")
        for sign, name in NAMES.items():
            block = block.replace(f"\\{sign}", name)
        return block.replace("&&092;", "\\")

    def shown(piece: str) -> str:
        for sign, name in NAMES.items():
            piece = piece.replace(name, sign)
        return piece.strip()

    category, questions = "", []
    for block in re.split(r"\n\s*\n", text):
        lines = ["" if line.strip().startswith("//") else line for line in block.splitlines()]
        block = hidden("\n".join(lines).strip())
        if block.startswith("$CATEGORY:"):
            category = block.removeprefix("$CATEGORY:").strip()
        elif block:
            assert block.startswith("::")
            name, _, rest = block[2:].partition("::")
            begin, end = rest.index("{"), rest.index("}")
            assert rest.endswith("}") and end == len(rest) - 1, "what follows the braces would become a gap"
            assert rest.startswith("[markdown]")
            options = rest[begin + 1 : end].replace("=", "~=").split("~")
            assert not options.pop(0).strip()
            read_options = []
            for option in map(str.strip, options):
                answer, _, feedback = option.removeprefix("=").partition("#")
                assert not re.match(r"%-*\d", answer), "it would be read as a weight"
                read_options.append((shown(answer), shown(feedback), option.startswith("=")))
            asked = shown(rest[len("[markdown]") : begin])
            questions.append({"name": shown(name), "text": asked, "options": read_options})
    return category, questions


def as_imported(questions: tuple[Question, ...]) -> list[dict]:
    return [
        {"name": f"Quiz {q.number}", "text": q.text, "options": [(o.text, o.says, o.right) for o in q.options]}
        for q in questions
    ]


@every_lesson
def test_moodle_gets_every_question_as_it_is(name):
    questions, title = quiz.read_quiz(name[:2]), pages.lesson(name).metadata.title
    category, made = imported(quizzes.gift(title, questions))
    assert category == f"QLoRA course/{title}" and made == as_imported(questions)


def test_signs_of_the_format_are_meant_as_they_are():
    odd = r"a = b ~ c # d {e} f: 50 % \ g \n h -> i"
    options = (
        Option("a", odd, f"1 {odd}", False),
        Option("b", f"2 {odd}", f"3 {odd}", True),
        Option("c", "x", "y", False),
    )
    questions = (Question("2.1", odd, options), Question("2.2", "[html] is no format here?", options))
    category, made = imported(quizzes.gift("2 · a / b", questions))
    assert category == "QLoRA course/2 · a // b", "a single slash would begin a category within the category"
    assert made == as_imported(questions)


@every_lesson
def test_the_page_to_print_has_the_questions_and_no_answer(name):
    questions = quiz.read_quiz(name[:2])
    text = squeezed(read(quizzes.printable("3 · T", questions)).text)
    for question in questions:
        assert squeezed(f"{question.number} {question.text}".replace("`", "")) in text
        for option in question.options:
            assert squeezed(option.text.replace("`", "")) in text
            assert squeezed(option.says.replace("`", "")) not in text
    assert "(right)" not in text


@every_lesson
def test_the_key_begins_with_the_right_letters_and_explains_each_option(name):
    questions = quiz.read_quiz(name[:2])
    page = quizzes.answer_key("3 · T", questions)
    text = squeezed(read(page).text)
    for question in questions:
        assert re.search(rf"<td>{re.escape(question.number)}</td>\s*<td>{question.right.letter}</td>", page)
        for option in question.options:
            assert (
                squeezed(f"{option.letter}{' (right)' * option.right}{option.text}:{option.says}".replace("`", ""))
                in text
            )
    assert text.count("(right)") == len(questions)
