"""Whose notebooks lie where: those of one person, or of a class, with a folder, a set of files or a report for each person.

    class/Ada/02_nf4_vs_int4.ipynb      a folder for each person, with anything above the notebooks
    class/02_nf4_vs_int4_Ada.ipynb      or files with a name in front of the lesson's or behind it
    class/Ada.json                      or the reports that `python -m qlora_helpers progress … --to Ada.json` wrote

Copies that JupyterLab, a browser or Colab make are no lessons of their own: of several notebooks of a lesson the one with the
most right answers counts, and the others are noticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_helpers.course.stored_results import RESULTS, NotALesson, NotebookResults, TaskResult, read_notebook
from qlora_helpers.json_files import read_json
from qlora_helpers.paths import COURSE
from qlora_helpers.visible import visible

__all__ = ["NO_NAME", "SELF_REPORTED", "Found", "Person", "as_report", "find_people", "read_report", "readable"]

NO_NAME = "(no name)"
SELF_REPORTED = (
    "Read from what the notebooks store. Nothing was run, and anybody can change what is stored: it is what a learner "
    "reports, and no examination."
)
# folders of the course itself, in which nobody's answers are
OF_THE_COURSE = ("solutions", "source", "scripts", "colab", "tests", "data", "qlora_helpers", "runs", "__pycache__")
PACKED = (".zip", ".7z", ".rar", ".gz", ".tar", ".tgz")
UNPACK = "is packed, and was not read: unpack it"
COPY = re.compile(r"(?:[-_ ]*(?:copy|kopie|copie|copia)(?: ?of)?[-_ ]*\d*|[-_ ]*untitled\d*| *\(\d+\))+", re.IGNORECASE)


@dataclass(frozen=True)
class Person:
    """One learner's lessons.

    Attributes:
        name: as the folder, the file or the report calls them.
        lessons: one of each number, in order.
        notices: what concerns the files, each beginning with the file.
    """

    name: str
    lessons: tuple[NotebookResults, ...]
    notices: tuple[str, ...] = ()

    def task(self, kind: str, number: str) -> TaskResult | None:
        """An exercise or a question; None if no notebook of theirs has it."""
        tasks = (task for lesson in self.lessons for task in lesson.tasks)
        return next((task for task in tasks if (task.kind, task.number) == (kind, number)), None)

    def tasks(self, kind: str) -> list[TaskResult]:
        """All exercises, or all questions, in order."""
        return [task for lesson in self.lessons for task in lesson.tasks if task.kind == kind]


@dataclass(frozen=True)
class Found:
    """What lies in some places: one person or several, and what belongs to nobody."""

    people: tuple[Person, ...]
    notices: tuple[str, ...] = ()


def readable(name: str) -> str:
    """A file's name as text: one that Windows wrote in its own encoding is no UTF-8, and is taken as Windows-1252."""
    content = os.fsencode(name)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    return visible(text)


def find_people(paths: Iterable[Path], name: str = "") -> Found:
    """The persons whose notebooks or reports these paths are, or are in.

    Args:
        paths: notebooks, reports, and folders of them: of one person, or of a class.
        name: of the person, if all of it is one person's.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: there is no notebook of a lesson in any of them.
    """
    paths = list(paths)
    people, notices, loose = [], [], []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"path={str(path)!r}: there is no such file or folder")
        files, folders = _listed(path) if path.is_dir() else ([path], [])
        if any(map(_has_work, folders)) and not any(map(_name_in, files)):
            people += [_of_folder(folder) for folder in folders]
            notices += [
                f"{readable(file.name)}: lies beside the folders of persons, and was not read"
                for file in files
                if file.suffix in (".ipynb", *PACKED)
            ]
        else:
            loose += files
    of_files, about_files = _of_files(loose, one_person=bool(name))
    people, notices = people + of_files, notices + about_files
    if not any(person.lessons for person in people):
        said = [*notices, *(notice for person in people for notice in person.notices)]
        raise ValueError(f"{', '.join(map(str, paths))}: there is no notebook of this course{_because(said)}")
    if name:
        people = [_merged(name, people)]
    people.sort(key=lambda person: (person.name == NO_NAME, person.name.casefold()))
    return Found(tuple(people), tuple(notices))


def _because(said: list[str]) -> str:
    more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
    return f" ({'; '.join(said[:3])}{more})" if said else ""


# ---- Files


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files and the folders in a folder, in order, without hidden ones and those of the course itself."""
    if (folder / "qlora_helpers").is_dir() and (folder / "notebooks").is_dir():  # a copy of the whole repository
        folder = folder / "notebooks"
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in inside if path.is_dir() and path.name not in OF_THE_COURSE]
    return [path for path in inside if path.is_file()], folders


def _below(folder: Path) -> list[Path]:
    """The notebooks, the reports and the packed files anywhere in a person's folder."""
    found = []
    for above, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in OF_THE_COURSE)
        found += [Path(above, name) for name in sorted(files) if not name.startswith(".")]
    return [
        path for path in found if path.suffix in (".ipynb", *PACKED) or (path.suffix == ".json" and _is_report(path))
    ]


def _has_work(folder: Path) -> bool:
    return any(path.suffix not in PACKED for path in _below(folder))


def _lesson_in(stem: str) -> str:
    """The name of a lesson that is in the name of a file, such as 02_nf4_vs_int4; empty if there is none."""
    known = sorted((path.stem for path in (COURSE / "notebooks").glob("[0-9][0-9]_*.ipynb")), key=len, reverse=True)
    return next((name for name in known if name in stem), "")


def _name_in(file: Path) -> str:
    """The name of a person that stands in a notebook's name beside the lesson's; empty if there is none."""
    stem = readable(file.stem)
    lesson = _lesson_in(stem)
    if file.suffix != ".ipynb" or not lesson:
        return ""
    before, _, after = stem.partition(lesson)
    return " ".join(part for part in map(_without_copy, (before, after)) if part)


def _without_copy(text: str) -> str:
    return COPY.sub("", text).strip(" _-.,()")


# ---- Persons


def _of_folder(folder: Path) -> Person:
    """The person whose folder this is."""
    files = _below(folder)
    notices = [f"{readable(file.name)}: {UNPACK}" for file in files if file.suffix in PACKED]
    read, unread = _read_all(file for file in files if file.suffix == ".ipynb")
    reports, damaged = _reports([file for file in files if file.suffix == ".json"] if not read else [])
    lessons, doubles = _one_of_each([*read, *(lesson for report in reports for lesson in report.lessons)])
    notices += [*unread, *damaged, *doubles, *(notice for report in reports for notice in report.notices)]
    if not lessons and not notices:
        notices.append("there is no notebook in the folder")
    return Person(readable(folder.name), lessons, tuple(notices))


def _of_files(files: list[Path], one_person: bool) -> tuple[list[Person], list[str]]:
    """The persons whose files lie in one folder, and what is noticed of no person's files."""
    notices = [f"{readable(file.name)}: {UNPACK}" for file in files if file.suffix in PACKED]
    reports, damaged = _reports(file for file in files if file.suffix == ".json")
    notebooks = [file for file in files if file.suffix == ".ipynb"]
    bare = {
        file for file in notebooks if not _name_in(file) and (_lesson_in(file.stem) or not _without_copy(file.stem))
    }
    people: dict[str, tuple[list, list]] = {}
    for file in notebooks:
        read, unread = _read_all([file])
        # without a lesson's name, the name of the file is the person's, but not beside files with the names of lessons alone
        whose = _name_in(file) or ("" if bare or not read else readable(file.stem))
        lessons, faults = people.setdefault(NO_NAME if one_person or not whose else whose, ([], []))
        lessons += read
        faults += unread
    found = []
    for name, (read, faults) in people.items():
        lessons, doubles = _one_of_each(read)
        if lessons or name != NO_NAME:
            found.append(Person(name, lessons, (*faults, *doubles)))
        else:
            notices += faults
    return found + reports, notices + damaged


def _read_all(files: Iterable[Path]) -> tuple[list[NotebookResults], list[str]]:
    read, unread = [], []
    for file in files:
        try:
            read.append(read_notebook(file))
        except NotALesson as error:
            unread.append(f"{readable(file.name)}: {error}")
    return read, unread


def _reports(files: Iterable[Path]) -> tuple[list[Person], list[str]]:
    read, unread = [], []
    for file in files:
        try:
            report = read_report(file)
        except (OSError, ValueError) as error:
            unread.append(f"{readable(file.name)}: {error}")
        else:
            read.append(report if report.name else replace(report, name=readable(file.stem)))
    return read, unread


def _one_of_each(read: list[NotebookResults]) -> tuple[tuple[NotebookResults, ...], list[str]]:
    """One notebook of each lesson, the one with the most right answers; and which others there are."""
    kept, doubles = [], []
    for lesson in sorted({results.lesson for results in read}):
        several = [results for results in read if results.lesson == lesson]
        best = max(several, key=lambda results: (results.right, not results.is_untouched, -len(results.file)))
        kept.append(best)
        others = [one for one in several if one is not best and not one.is_untouched]
        if others:
            names = ", ".join(f"{readable(Path(one.file).name)} ({one.right} right)" for one in others)
            doubles.append(
                f"{readable(Path(best.file).name)}: counts for lesson {lesson}, with {best.right} right; "
                f"there {'is' if len(others) == 1 else 'are'} also {names}"
            )
    return tuple(kept), doubles


def _merged(name: str, people: list[Person]) -> Person:
    """Several piles of files as one person's."""
    lessons, doubles = _one_of_each([lesson for person in people for lesson in person.lessons])
    return Person(name, lessons, (*(notice for person in people for notice in person.notices), *doubles))


# ---- Reports


REPORT = "progress in the QLoRA course"


def as_report(person: Person) -> dict[str, Any]:
    """A person's results as the object of a JSON file, which `read_report` reads."""
    return {
        "what": REPORT,
        "person": "" if person.name == NO_NAME else person.name,
        "note": SELF_REPORTED,
        "lessons": [
            {
                "lesson": lesson.lesson,
                "title": lesson.title,
                "file": readable(Path(lesson.file).name),
                "notices": list(lesson.notices),
                "tasks": [
                    {
                        "kind": t.kind,
                        "number": t.number,
                        "title": t.title,
                        "result": t.result,
                        "notices": list(t.notices),
                    }
                    for t in lesson.tasks
                ],
            }
            for lesson in person.lessons
        ],
        "notices": list(person.notices),
    }


def _is_report(path: Path) -> bool:
    try:
        return read_json(path).get("what") == REPORT
    except (OSError, ValueError):
        return False


def read_report(path: Path) -> Person:
    """The person whose results are in a file that `as_report` made.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or is damaged.
    """
    found = read_json(path)
    if found.get("what") != REPORT:
        raise ValueError("is no report that `progress --to` has written")

    def texts(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise TypeError
        return tuple(map(visible, value))

    def task(entry: dict[str, Any]) -> TaskResult:
        kind, number, title, result = (entry[name] for name in ("kind", "number", "title", "result"))
        known = kind in ("exercise", "quiz") and result in RESULTS.values() and isinstance(title, str)
        if not known or not re.fullmatch(r"[1-9]\d*\.[1-9]\d*", number):
            raise TypeError
        return TaskResult(kind, number, visible(title), result, texts(entry["notices"]))

    def lesson(entry: dict[str, Any]) -> NotebookResults:
        if (
            not isinstance(entry["lesson"], int)
            or not isinstance(entry["title"], str)
            or not isinstance(entry["file"], str)
        ):
            raise TypeError
        tasks = tuple(task(one) for one in entry["tasks"])
        return NotebookResults(
            visible(entry["file"]), entry["lesson"], visible(entry["title"]), tasks, texts(entry["notices"])
        )

    try:
        if not isinstance(found["person"], str):
            raise TypeError
        return Person(visible(found["person"]), tuple(map(lesson, found["lessons"])), texts(found["notices"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("is a damaged report: write it again with `progress --to`") from error
