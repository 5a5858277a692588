"""Each edition of each lesson has the lesson's quiz before its end: unanswered for learners, right in the solutions."""

import copy
import json

import nbformat
import pytest

from notebooks.scripts import build, quiz_cells
from notebooks.scripts.running import code_cells, has_tag
from qlora_helpers.course import quiz
from qlora_helpers.course.quiz import marking

NOTEBOOKS = [(name, edition) for name in build.lessons() for edition in build.EDITIONS]


def stored(name: str, edition: str) -> nbformat.NotebookNode:
    return nbformat.read(build.EDITIONS[edition] / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize(("name", "edition"), NOTEBOOKS)
def test_the_quiz_comes_before_the_end_and_is_marked(name, edition):
    cells, lesson = stored(name, edition).cells, int(name[:2])
    questions, answers, marking_cell, end = cells[-4:]
    assert end.source.startswith("## You have") and questions.source.startswith("## Quiz")
    assert quiz.as_markdown(quiz.read_quiz(lesson)) in questions.source
    assert all(has_tag(cell, quiz_cells.TAG) for cell in cells[-4:-1])
    assert sum(has_tag(cell, quiz_cells.TAG) for cell in cells) == 3
    assert has_tag(answers, "solution" if edition == "solutions" else "exercise") and answers.outputs == []
    assert has_tag(marking_cell, "nbval-check-output"), "nbval must compare it"
    (output,) = marking_cell.outputs
    said = output.text.splitlines()
    if edition == "solutions":
        assert said == [f"✓ Quiz {q.number}: right. {q.right.says}" for q in quiz.read_quiz(lesson)]
    else:
        assert said == [f"○ Quiz {lesson}.{place}: not answered yet" for place in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", build.lessons())
def test_no_answer_is_in_what_a_learner_gets(name):
    learner = nbformat.writes(stored(name, "learner"))
    for question in quiz.read_quiz(int(name[:2])):
        assert not any(json.dumps(option.says, ensure_ascii=False)[1:-1] in learner for option in question.options)


LESSON = "# %%\na = 1\n\n# %% [markdown]\n# ## You have\n# - seen.\n"


@pytest.fixture
def one_lesson(tmp_path, monkeypatch):
    """A lesson 1 with a quiz of one question, instead of the real one."""
    source, questions = tmp_path / "source", tmp_path / "quiz"
    source.mkdir(), questions.mkdir()
    (source / "01_one.py").write_text(LESSON, encoding="utf-8")
    entry = {
        "text": "Why?",
        "options": {"a": "A", "b": "B", "c": "C"},
        "right": "b",
        "says": dict.fromkeys("abc", "So."),
    }
    (questions / "01.json").write_text(json.dumps([entry]), encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", source)
    monkeypatch.setattr(marking, "FOLDER", questions)
    return questions / "01.json"


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    notebook = copy.deepcopy(notebook)
    notebook.metadata["course"] = {"executed_code": build.code_hash(notebook)}
    return notebook


def test_a_changed_question_makes_no_output_stale_and_is_marked_anew(one_lesson):
    old = executed(build.build_edition("01_one", "solutions", {}))
    assert [cell.source for cell in code_cells(old)][:2] == ["a = 1", 'quiz_answers = {1: "b"}']
    one_lesson.write_text(
        one_lesson.read_text(encoding="utf-8").replace('"right": "b"', '"right": "c"'), encoding="utf-8"
    )
    made = build.outputs_into(build.build_edition("01_one", "solutions", {}), old)
    assert code_cells(made)[1].source == 'quiz_answers = {1: "c"}'
    assert code_cells(made)[2].outputs[0].text == "✓ Quiz 1.1: right. So.\n"
    assert [cell.execution_count for cell in code_cells(made)] == [None, 2, 3]


def test_changed_code_of_the_lesson_still_makes_outputs_stale(one_lesson):
    old = executed(build.build_edition("01_one", "learner", {}))
    (build.SOURCES / "01_one.py").write_text(LESSON.replace("a = 1", "a = 2"), encoding="utf-8")
    with pytest.raises(ValueError, match="the code has changed"):
        build.outputs_into(build.build_edition("01_one", "learner", {}), old)


def test_a_quiz_that_is_new_to_a_lesson_needs_no_execution(one_lesson):
    questions = one_lesson.read_text(encoding="utf-8")
    one_lesson.unlink()
    old = executed(build.build_edition("01_one", "learner", {}))
    assert len(old.cells) == 2
    one_lesson.write_text(questions, encoding="utf-8")
    made = build.outputs_into(build.build_edition("01_one", "learner", {}), old)
    assert len(made.cells) == 5 and made.cells[3].outputs[0].text == "○ Quiz 1.1: not answered yet\n"


def test_a_text_above_the_end_stays_above_the_quiz(one_lesson):
    text = "So it is.\n\n## You have\n- seen."
    made = quiz_cells.put_in([nbformat.v4.new_markdown_cell(text, metadata={"tags": ["x"]})], 1, "learner")
    assert [made[0].source, made[1].source[:7], made[-1].source] == ["So it is.", "## Quiz", "## You have\n- seen."]
    assert len(made) == 5 and made[0].metadata.tags == made[-1].metadata.tags == ["x"]


def test_a_lesson_without_an_end_has_its_quiz_at_the_end(one_lesson):
    cells = [nbformat.v4.new_code_cell("a = 1")]
    assert [has_tag(cell, quiz_cells.TAG) for cell in quiz_cells.put_in(cells, 1, "learner")] == [
        False,
        True,
        True,
        True,
    ]
