"""A notebook's stored outputs tell which exercises are solved, and what makes that doubtful is noticed."""

import json

import pytest

from notebooks.scripts import build
from qlora_helpers.course import stored_results
from qlora_helpers.course.exercises.asking import Exercise, number
from qlora_helpers.course.stored_results import NotALesson, read_notebook
from tests.support.stored_lessons import TITLES, code, lesson, markdown, save


@pytest.fixture(autouse=True)
def no_course(tmp_path, monkeypatch):
    """A place without the course's own notebooks, so that nothing is compared with them."""
    stored_results._given.cache_clear()
    monkeypatch.setattr(stored_results, "COURSE", tmp_path / "course")
    yield tmp_path / "course"
    stored_results._given.cache_clear()


def results(tmp_path, notebook) -> dict[str, str]:
    read = read_notebook(save(tmp_path / "02.ipynb", notebook))
    return {task.number: task.result for task in read.tasks}


def notices(tmp_path, notebook) -> list[str]:
    read = read_notebook(save(tmp_path / "02.ipynb", notebook))
    return [*read.notices, *(f"{task.number}: {notice}" for task in read.tasks for notice in task.notices)]


def test_results_are_those_of_the_lines_that_checks_print(tmp_path):
    read = read_notebook(save(tmp_path / "02.ipynb", lesson(("right", "wrong", "open"), quiz="✓✗○✓")))
    assert (read.lesson, read.title, read.notices) == (2, "NF4 against int4: which?", ())
    assert [(task.kind, task.number, task.title, task.result) for task in read.tasks] == [
        ("exercise", "2.1", TITLES[1], "right"), ("exercise", "2.2", TITLES[2], "wrong"), ("exercise", "2.3", TITLES[3], "open"),
        ("quiz", "2.1", "", "right"), ("quiz", "2.2", "", "wrong"), ("quiz", "2.3", "", "open"), ("quiz", "2.4", "", "right"),
    ]  # fmt: skip
    assert read.right == 3 and not read.is_untouched
    assert read_notebook(save(tmp_path / "02.ipynb", lesson(("open", "open")))).is_untouched


def test_the_lines_are_really_those_of_an_exercise_and_of_the_quiz(tmp_path, capsys):
    exercise = Exercise("2.1", "bits: two, or more", "build", "easy", 5, ("a", "b"), number(4.5))
    for answer, result in ((4.5, "right"), (4, "wrong"), (..., "open")):
        exercise.check(answer)
        notebook = lesson((), c1=code("exercises.it.check(a)", capsys.readouterr().out, 1))
        read = read_notebook(save(tmp_path / "02.ipynb", notebook))
        assert [(task.number, task.result) for task in read.tasks] == [("2.1", result)]
    for line, result in (("✓ Quiz 2.3: right. Yes.", "right"), ("○ Quiz 2.3: not answered yet", "open")):
        assert results(tmp_path, lesson((), c1=code("mark", line, 1))) == {"2.3": result}


def test_a_check_that_was_not_run_and_an_output_that_is_no_line_of_a_check_are_no_result(tmp_path):
    assert results(tmp_path, lesson(("right", "none"))) == {"2.1": "right", "2.2": "not run"}
    text = "✓ recall: at least 0.85 (measured 0.91)\nI solved ✓ Exercise 2.1, it: right!\n✓ Exercise two, it: right!"
    assert results(tmp_path, lesson((), c1=code("print", text, 1))) == {}


def test_the_last_line_counts_also_of_a_check_that_was_copied(tmp_path):
    again = code("exercises.it.check(answer)", "✗ Exercise 2.1, it: no. Hint: b\n✓ Exercise 2.1, it: right!", 9)
    assert results(tmp_path, lesson(("wrong", "wrong"), c1=again))["2.1"] == "right"
    earlier = code("exercises.it.check(answer)", "✓ Exercise 2.1, it: right!", 1)
    assert results(tmp_path, lesson(("wrong", "wrong"), c1=earlier))["2.1"] == "wrong"


def test_an_answer_that_was_run_after_its_check_is_noticed(tmp_path):
    assert notices(tmp_path, lesson(("right", "right"))) == []
    found = notices(tmp_path, lesson(("right", "right"), c3=code("answer = 5", "", 12)))
    assert found == ["2.1: the answer was run after its check: run the check again"]
    task = read_notebook(tmp_path / "02.ipynb").tasks[0]
    assert task.result == "right" and not task.counts
    quiz = notices(tmp_path, lesson((), quiz="✓✓", c4=code("answers = {}", "", 30)))
    assert quiz == [f"2.{n}: the answer was run after its check: run the check again" for n in (1, 2)]


def test_an_answer_that_was_never_run_is_noticed(tmp_path):
    found = notices(tmp_path, lesson(("open", "open"), c3=code("answer = 4.5", "", 2)))
    assert found == ["2.1: the dots are gone from the answer, but the check is older: run both cells"]


def test_cells_without_counts_are_not_doubted(tmp_path):
    assert (
        notices(tmp_path, lesson(("right",), c3=code("answer = 4"), c4=code("check", "✓ Exercise 2.1, it: right!")))
        == []
    )


def test_cleared_outputs_are_noticed(tmp_path):
    notebook = lesson(("right", "right"))
    for cell in notebook["cells"]:
        cell |= {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
    assert notices(tmp_path, notebook) == ["its outputs were cleared: run it again from the top, and save it"]
    assert results(tmp_path, notebook) == {"2.1": "not run", "2.2": "not run"}


def test_a_notebook_of_another_version_or_the_solved_one_is_noticed(tmp_path, no_course):
    save(no_course / "notebooks" / "02_nf4.ipynb", lesson(("open", "open", "open"), made="mine"))
    save(no_course / "notebooks" / "solutions" / "02_nf4.ipynb", lesson(("right", "right", "right"), made="solved"))
    save(no_course / "colab" / "02_nf4.ipynb", lesson(("open", "open", "open"), made="colab"))
    every = ("right", "right", "right")
    for made in ("mine", "colab", ""):  # some programs drop what they do not know
        assert notices(tmp_path, lesson(every, made=made)) == []
    assert notices(tmp_path, lesson(every, made="old")) == [
        "it comes from another version of the course than the one here"
    ]
    assert notices(tmp_path, lesson(every, made="solved")) == [
        "it is the solved edition: its results are the course's own"
    ]
    assert notices(tmp_path, lesson(("right",), made="mine")) == ["it lacks exercises 2.2, 2.3"]
    assert notices(tmp_path, lesson(every, made="mine", c2=None, c3=None, c4=None)) == ["it lacks exercise 2.1"]


def test_the_colab_edition_has_a_badge_before_its_title(tmp_path):
    notebook = lesson(("right",))
    notebook["cells"] = [markdown("[![Open in Colab](x)](y)"), code("# @title Set-up", "", 1), *notebook["cells"]]
    assert results(tmp_path, notebook) == {"2.1": "right"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("{", "is no whole notebook: "),
        (json.dumps(lesson())[:500], "is no whole notebook: "),
        ("<<<<<<< HEAD\n{}\n>>>>>>> other\n", "has the conflict marks of a merge"),
        ("[" * 100_000, "is no whole notebook: "),
        ("[]", "is no notebook: it has no cells"),
        ('{"cells": 3}', "is no notebook: it has no cells"),
        ('{"worksheets": []}', "is in the old format 3: open it in JupyterLab, and save it"),
        ('{"cells": []}', "is no lesson of this course"),
        ('{"cells": [3, {"cell_type": "markdown"}, {"cell_type": "markdown", "source": "# My notes"}]}', "is no lesson of this course"),
    ],
)  # fmt: skip
def test_what_is_no_lesson_is_told(tmp_path, content, told):
    with pytest.raises(NotALesson, match=f"^{told}"):
        read_notebook(save(tmp_path / "02.ipynb", content))


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(NotALesson, match=r"^cannot be read: "):
        read_notebook(tmp_path / "none.ipynb")
    (tmp_path / "02.ipynb").write_bytes(json.dumps(lesson(), ensure_ascii=False).encode("cp1252", "replace") + b"\xe9")
    with pytest.raises(NotALesson, match=r"^is not in UTF-8"):
        read_notebook(tmp_path / "02.ipynb")
    (tmp_path / "02.ipynb").write_bytes(b"\xef\xbb\xbf" + json.dumps(lesson()).encode())  # Windows' mark of UTF-8
    assert read_notebook(tmp_path / "02.ipynb").lesson == 2


def test_parts_of_a_notebook_that_are_not_as_they_should_be_are_passed_over(tmp_path):
    cells = [
        {"cell_type": "code", "source": None, "outputs": [3, {"text": 4}, {"text": [5, "✓ Exercise 2.1, it: right!"]}], "execution_count": "7"},
        {"cell_type": "code", "outputs": None}, {"cell_type": "raw", "source": "✓ Exercise 2.2, it: right!"}, {}, None,
    ]  # fmt: skip
    notebook = {"cells": [markdown("# 2 · NF4"), *cells], "metadata": None}
    assert results(tmp_path, notebook) == {"2.1": "right"}


@pytest.mark.parametrize("name", build.lessons())
def test_every_edition_of_the_course_is_read(name, monkeypatch):
    stored_results._given.cache_clear()
    monkeypatch.setattr(stored_results, "COURSE", build.ROOT)
    for edition, folder in build.EDITIONS.items():
        read = read_notebook(folder / f"{name}.ipynb")
        assert read.lesson == int(name[:2])
        solved = [notice for notice in read.notices if "solved edition" in notice]
        assert len(solved) == (edition == "solutions") and len(read.notices) == len(solved)
        if not (build.ROOT / "qlora_helpers" / "course" / "exercises" / f"lesson_{name[:2]}.py").exists():
            continue
        exercises = [task for task in read.tasks if task.kind == "exercise"]
        assert {task.result for task in exercises} == {"right" if edition == "solutions" else "open"} and len(
            exercises
        ) >= 3
