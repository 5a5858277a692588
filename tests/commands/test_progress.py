"""`progress` tells what notebooks store of one person or of a class, says that it is self-reported, and overwrites nothing."""

import csv
import json

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.course.people import SELF_REPORTED
from tests.support.stored_lessons import lesson, save

NF4, DOUBLE = "02_nf4_vs_int4", "03_double_quantisation"


@pytest.fixture
def call(capsys):
    def run(*words: object) -> tuple[int, str, str]:
        code = main(["progress", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def one(tmp_path):
    save(tmp_path / "mine" / f"{NF4}.ipynb", lesson(("right", "wrong", "open"), quiz="✓✗○✓"))
    save(tmp_path / "mine" / f"{DOUBLE}.ipynb", lesson(("right", "none"), 3))
    return tmp_path / "mine"


@pytest.fixture
def a_class(tmp_path):
    stale = {"c3": {"cell_type": "code", "source": "answer = 1", "outputs": [], "execution_count": 50}}
    save(tmp_path / "class" / "Ada" / f"{NF4}.ipynb", lesson(("right", "wrong", "open"), quiz="✓✗"))
    save(tmp_path / "class" / "=Bo" / f"{NF4}.ipynb", lesson(("right", "right", "none"), **stale))
    save(tmp_path / "class" / "=Bo" / f"{DOUBLE}.ipynb", lesson(("right",), 3))
    (tmp_path / "class" / "Jörg").mkdir()
    return tmp_path / "class"


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if not line.startswith("---")]


def test_one_person_has_a_row_for_each_exercise_and_for_each_quiz(call, one):
    code, out, err = call(one)
    assert (code, err) == (0, "")
    table, counts, note = out.split("\n\n")
    assert table.splitlines() == [
        "lesson  exercise  result        about",
        "------  --------  ------------  --------------------",
        "2       2.1       right         the bits in a code",
        "2       2.2       wrong         a format of your own",
        "2       2.3       open          a run: by hand",
        "2       quiz      2 of 4 right",
        "3       3.1       right         the bits in a code",
        "3       3.2       not run       a format of your own",
    ]
    assert counts.splitlines()[0] == "Right: 2 of 5 exercises, 2 of 4 questions of the quiz."
    assert note.strip() == SELF_REPORTED and "Nothing was run" in note


def test_a_doubtful_result_does_not_count_and_is_told_with_its_notebook(call, one):
    stale = {"cell_type": "code", "source": "answer = 1", "outputs": [], "execution_count": 50}
    save(one / f"{NF4}.ipynb", lesson(("right", "right"), c3=stale))
    out = call(one / f"{NF4}.ipynb")[1]
    assert rows(out)[1][:3] == ["2", "2.1", "right?"] and "Right: 1 of 2 exercises." in out
    assert f"! {NF4}.ipynb, exercise 2.1: the answer was run after its check: run the check again" in out


def test_a_lesson_without_exercises_is_named(call, one):
    save(one / f"{NF4}.ipynb", lesson(()))
    assert "2                 no exercises  NF4 against int4: which?" in call(one)[1]


def test_a_class_has_a_row_for_each_person_and_counts_for_each_exercise(call, a_class):
    code, out, _ = call(a_class)
    persons, exercises, said, *_ = out.split("\n\n")
    assert code == 0 and persons.splitlines() == [
        "person  lesson 2  lesson 3  exercises right  quiz",
        "------  --------  --------  ---------------  ----",
        "=Bo     1/3       1/1                     2  –",
        "Ada     1/3       –                       1  1/2",
        "Jörg    –         –                       0  –",
    ]
    assert [row[:6] for row in rows(exercises)] == [
        ["exercise", "right", "wrong", "open", "not", "run"],
        ["2.1", "1", "0", "0", "1", "1"],
        ["2.2", "1", "1", "0", "0", "1"],
        ["2.3", "0", "0", "1", "1", "1"],
        ["3.1", "1", "0", "0", "0", "2"],
    ]
    assert said.startswith("3 persons.")
    assert f"! =Bo: {NF4}.ipynb, exercise 2.1: the answer was run after its check: run the check again" in out
    assert "! Jörg: there is no notebook in the folder" in out


def test_a_person_s_report_is_a_file_that_is_read_again(call, one, tmp_path):
    code, out, _ = call(one, "--name", "Ada Ä", "--to", tmp_path / "ada.json")
    assert code == 0 and out.endswith(f"Written: {tmp_path / 'ada.json'}\n")
    report = json.loads((tmp_path / "ada.json").read_text(encoding="utf-8"))
    assert report["person"] == "Ada Ä" and report["note"] == SELF_REPORTED
    assert [task["result"] for task in report["lessons"][0]["tasks"]][:3] == ["right", "wrong", "open"]
    assert call(tmp_path / "ada.json")[1] == call(one)[1]


def test_a_class_is_written_as_a_table_that_a_spreadsheet_reads(call, a_class, tmp_path):
    assert call(a_class, "--to", tmp_path / "class.csv")[0] == 0
    content = (tmp_path / "class.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbf") and "Jörg".encode() in content
    table = list(csv.reader(content.decode("utf-8-sig").splitlines()))
    assert table[0][:8] == [
        "person",
        "Exercise 2.1",
        "Exercise 2.2",
        "Exercise 2.3",
        "Exercise 3.1",
        "Quiz 2.1",
        "Quiz 2.2",
        "exercises right",
    ]
    assert [row[:9] for row in table[1:]] == [
        ["'=Bo", "right?", "right", "not run", "right", "", "", "2", "0"],
        ["Ada", "right", "wrong", "open", "", "right", "wrong", "1", "1"],
        ["Jörg", "", "", "", "", "", "", "0", "0"],
        ["right", "1", "1", "0", "1", "1", "0", "3", "1"],
    ]
    assert "was run after its check" in table[1][9] and "no examination" in table[4][9]


def test_reports_of_a_class_give_the_table_of_its_notebooks(call, a_class, tmp_path):
    for name in ("Ada", "=Bo"):
        (tmp_path / "reports").mkdir(exist_ok=True)
        assert call(a_class / name, "--to", tmp_path / "reports" / f"{name}.json")[0] == 0
    (a_class / "Jörg").rmdir()
    assert call(tmp_path / "reports")[1] == call(a_class)[1]


@pytest.mark.parametrize("name", ["ada.json", "class.csv"])
def test_nothing_is_overwritten_and_nothing_is_changed(call, one, tmp_path, name):
    before = {path: path.read_bytes() for path in one.iterdir()}
    (tmp_path / name).write_text("mine", encoding="utf-8")
    code, out, err = call(one, "--to", tmp_path / name)
    assert (code, out) == (2, "") and f"{str(tmp_path / name)!r} is there already: name a new file" in err
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"
    assert {path: path.read_bytes() for path in one.iterdir()} == before


def test_what_cannot_be_done_is_told_before_anything_is_written(call, a_class, one, tmp_path):
    for words, told in (
        (
            (a_class, "--to", tmp_path / "class.json"),
            "there are 3 persons: write a file that ends in .csv, or give --name",
        ),
        ((one, "--to", tmp_path / "ada.txt"), "must end in .json, for one person, or in .csv"),
        ((tmp_path / "none",), "there is no such file or folder"),
        ((tmp_path / "empty",), "there is no notebook of this course"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        code, out, err = call(*words)
        assert (code, out) == (2, "") and told in err, err
    assert {path.name for path in tmp_path.iterdir()} == {"class", "mine", "empty"}
