"""Persons are found in folders, in sets of files and in reports; what lies between them is noticed, and nothing is changed."""

import json
import os
import sys

import pytest

from qlora_helpers.course import people, stored_results
from qlora_helpers.course.people import NO_NAME, as_report, find_people, read_report
from tests.support.stored_lessons import lesson, save

NF4, DOUBLE = "02_nf4_vs_int4", "03_double_quantisation"


@pytest.fixture(autouse=True)
def course(tmp_path, monkeypatch):
    """A copy of the course that has the names of two lessons."""
    stored_results._given.cache_clear()
    for module in (people, stored_results):
        monkeypatch.setattr(module, "COURSE", tmp_path / "course")
    for name, number in ((NF4, 2), (DOUBLE, 3)):
        save(tmp_path / "course" / "notebooks" / f"{name}.ipynb", lesson(("open", "open", "open"), number))
    yield tmp_path / "course"
    stored_results._given.cache_clear()


@pytest.fixture
def here(tmp_path):
    return tmp_path / "class"


def found(*paths, **options) -> dict[str, dict[int, int]]:
    """By person, how many are right in each lesson."""
    persons = find_people(paths, **options).people
    return {person.name: {one.lesson: one.right for one in person.lessons} for person in persons}


def noticed(*paths, **options) -> list[str]:
    everything = find_people(paths, **options)
    return [*everything.notices, *(notice for person in everything.people for notice in person.notices)]


def test_a_folder_of_lessons_is_one_person_s(here):
    save(here / f"{NF4}.ipynb", lesson(("right", "open")))
    save(here / f"{DOUBLE}.ipynb", lesson(("right", "right"), 3))
    assert found(here) == {NO_NAME: {2: 1, 3: 2}} and noticed(here) == []
    assert found(here / f"{NF4}.ipynb", here / f"{DOUBLE}.ipynb") == {NO_NAME: {2: 1, 3: 2}}
    assert found(here, name="Ada") == {"Ada": {2: 1, 3: 2}}


def test_the_course_s_own_folder_is_that_of_one_person_without_the_solved_lessons(course):
    save(course / "notebooks" / "solutions" / f"{NF4}.ipynb", lesson(("right", "right", "right")))
    save(course / "colab" / f"{NF4}.ipynb", lesson())
    (course / "qlora_helpers").mkdir()
    for path in (course, course / "notebooks"):
        assert found(path) == {NO_NAME: {2: 0, 3: 0}} and noticed(path) == []


def test_each_folder_is_a_person_s_with_whatever_is_in_it(here):
    save(here / "Bo" / f"{NF4}.ipynb", lesson(("right", "right")))
    save(here / "Ada" / "qlora-course" / "notebooks" / f"{NF4}.ipynb", lesson(("right",)))
    save(
        here / "Ada" / "qlora-course" / "notebooks" / "solutions" / f"{NF4}.ipynb", lesson(("right", "right", "right"))
    )
    save(here / "Ada" / ".ipynb_checkpoints" / f"{NF4}-checkpoint.ipynb", lesson(("wrong",)))
    (here / "Cy").mkdir()
    (here / "Di").mkdir()
    (here / "Di" / "homework.zip").write_bytes(b"PK")
    save(here / f"{NF4}.ipynb", lesson())
    assert found(here) == {"Ada": {2: 1}, "Bo": {2: 2}, "Cy": {}, "Di": {}}
    assert noticed(here) == [
        f"{NF4}.ipynb: lies beside the folders of persons, and was not read",
        "there is no notebook in the folder",
        "homework.zip: is packed, and was not read: unpack it",
    ]


def test_files_with_names_are_a_person_s_each(here):
    for name, results in ((f"{NF4}_Ada", ("right",)), (f"Bo Berg_{NF4}", ("right", "right")), (f"{DOUBLE} - Ada", ("open",)),
                          (f"Cy_123_file_{NF4}-Copy1", ("wrong",)), (f"{NF4}", ("open",))):  # fmt: skip
        save(here / f"{name}.ipynb", lesson(results, 3 if DOUBLE in name else 2))
    assert found(here) == {"Ada": {2: 1, 3: 0}, "Bo Berg": {2: 2}, "Cy_123_file": {2: 0}, NO_NAME: {2: 0}}
    assert found(here, name="Eve") == {"Eve": {2: 2, 3: 0}}


def test_files_that_are_called_by_persons_alone_are_theirs(here):
    for name in ("ada", "bo"):
        save(here / f"{name}.ipynb", lesson(("right",)))
    assert found(here) == {"ada": {2: 1}, "bo": {2: 1}}
    save(here / f"{NF4}.ipynb", lesson(("right", "right")))  # beside this one they are copies with other names
    assert found(here) == {NO_NAME: {2: 2}}


def test_of_copies_the_one_with_the_most_right_counts_and_others_are_noticed(here):
    save(here / f"{NF4}.ipynb", lesson(("right", "open", "open")))
    for copy, results in (
        ("-Copy1", ("right", "right", "open")),
        (" (1)", ("open", "open", "open")),
        ("_copy", ("wrong", "open", "open")),
    ):
        save(here / f"{NF4}{copy}.ipynb", lesson(results))
    save(here / "Untitled.ipynb", lesson(("right", "wrong", "open")))
    assert found(here) == {NO_NAME: {2: 2}}
    (notice,) = noticed(here)
    assert notice.startswith(f"{NF4}-Copy1.ipynb: counts for lesson 2, with 2 right; there are also ")
    assert all(
        part in notice for part in (f"{NF4}.ipynb (1 right)", f"{NF4}_copy.ipynb (0 right)", "Untitled.ipynb (1 right)")
    )
    assert "(1).ipynb" not in notice  # nothing was answered in it


def test_a_notebook_that_is_no_lesson_and_a_broken_one_are_noticed(here):
    save(here / f"{NF4}.ipynb", lesson(("right",)))
    save(here / "scratch.ipynb", json.dumps({"cells": []}))
    save(here / "Untitled1.ipynb", "{")
    assert found(here) == {NO_NAME: {2: 1}}
    assert [notice.partition(":")[0] for notice in noticed(here)] == ["Untitled1.ipynb", "scratch.ipynb"]
    save(here / f"{NF4}_Bo.ipynb", "{")
    assert found(here) == {"Bo": {}, NO_NAME: {2: 1}}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are no UTF-8")
def test_names_in_windows_1252_and_with_hidden_characters_are_readable(here):
    save(here / "Bo\u202e\n" / f"{NF4}.ipynb", lesson(("right",)))
    folder = os.fsencode(here) + b"/J\xf6rg"
    os.mkdir(folder)
    with open(folder + f"/{NF4}_f\xfcr.ipynb".encode("cp1252"), "w", encoding="utf-8") as file:
        json.dump(lesson(("right",), c0=None), file)
    assert list(found(here)) == ["Bo\\u202e⏎", "Jörg"]
    assert noticed(here) == [
        f"{NF4}_für.ipynb: is no lesson of this course: none of its first cells has a lesson's title"
    ]


def test_a_report_is_read_as_it_was_written(here):
    save(here / f"{NF4}.ipynb", lesson(("right", "wrong"), quiz="✓○", c3=None))
    save(here / f"{NF4}-Copy1.ipynb", lesson(("wrong", "wrong")))
    (person,) = find_people([here], "Ada").people
    path = save(here.parent / "reports" / "other.json", json.dumps(as_report(person)))
    read = read_report(path)
    assert read.name == "Ada" and read.notices == person.notices and as_report(read) == as_report(person)


def test_reports_of_a_class_are_its_persons(here):
    for name, results in (("Ada", ("right",)), ("Bo", ("right", "right"))):
        (person,) = find_people([save(here.parent / name / f"{NF4}.ipynb", lesson(results))]).people
        save(here / f"{name}.json", json.dumps(as_report(person)))  # without a name: the file's
    save(here / "report-3.json", json.dumps(as_report(person) | {"person": "Di"}))
    save(here / "grades.json", "{}")
    save(here / "damaged.json", json.dumps(as_report(person))[:100])
    assert found(here) == {"Ada": {2: 1}, "Bo": {2: 2}, "Di": {2: 2}}
    notices = noticed(here)
    assert notices[0].startswith("damaged.json: is damaged (") and notices[1:] == [
        "grades.json: is no report that `progress --to` has written"
    ]


def test_a_report_in_a_person_s_folder_counts_if_there_is_no_notebook(here):
    (person,) = find_people([save(here.parent / "x" / f"{NF4}.ipynb", lesson(("right", "right")))]).people
    for name in ("Ada", "Bo"):
        save(here / name / "mine.json", json.dumps(as_report(person)))
    save(here / "Bo" / f"{NF4}.ipynb", lesson(("right",)))
    assert found(here) == {"Ada": {2: 2}, "Bo": {2: 1}}


@pytest.mark.parametrize(
    ("key", "value"),
    [("person", 3), ("lessons", None), ("lessons", [3]), ("lessons", [{}]), ("notices", "x"), ("notices", [1])],
)
def test_a_report_that_was_changed_into_none_is_told(here, key, value):
    (person,) = find_people([save(here / f"{NF4}.ipynb", lesson())]).people
    path = save(here / "a.json", json.dumps(as_report(person) | {key: value}))
    with pytest.raises(ValueError, match=r"^is a damaged report"):
        read_report(path)


@pytest.mark.parametrize(
    "change",
    [{"result": "perfect"}, {"kind": "essay"}, {"number": "x"}, {"number": 2.1}, {"title": None}, {"notices": [None]}],
)
def test_a_task_of_a_report_that_is_none_is_told(here, change):
    report = as_report(find_people([save(here / f"{NF4}.ipynb", lesson())]).people[0])
    report["lessons"][0]["tasks"][0] |= change
    with pytest.raises(ValueError, match=r"^is a damaged report"):
        read_report(save(here / "a.json", json.dumps(report)))


def test_where_there_is_nothing_it_is_told_why(here):
    with pytest.raises(FileNotFoundError, match=r"^path='.*none': there is no such file or folder"):
        find_people([here / "none"])
    here.mkdir()
    with pytest.raises(ValueError, match=r"class: there is no notebook of this course$"):
        find_people([here])
    for name in "abcd":
        save(here / f"{name}.ipynb", "{")
    with pytest.raises(
        ValueError, match=r"no notebook of this course \(a.ipynb: is no whole notebook: .*; and 1 more\)$"
    ):
        find_people([here])
