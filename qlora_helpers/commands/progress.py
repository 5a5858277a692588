"""`python -m qlora_helpers progress`: which exercises and questions are solved, by what notebooks store; of one or a class."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qlora_helpers.course.people import SELF_REPORTED, Found, Person, as_report, find_people, readable
from qlora_helpers.course.stored_results import RESULTS, TaskResult
from qlora_helpers.course.tables import as_table
from qlora_helpers.json_files import write_new

__all__ = ["add_arguments", "command"]

_DESCRIPTION = """\
Reads which exercises and questions of the quiz are solved from the outputs that notebooks store. It runs nothing and changes
nothing. PATH is a lesson's notebook, a folder of them, or the folder of a class, which holds

  a folder for each person            class/Ada/02_nf4_vs_int4.ipynb
  or files with names                 class/02_nf4_vs_int4_Ada.ipynb
  or reports, made with --to          class/Ada.json

It is what learners report of themselves: anybody can change what a notebook stores."""
_EXAMPLES = """\
examples:
  python -m qlora_helpers progress notebooks
  python -m qlora_helpers progress notebooks --name Ada --to Ada.json
  python -m qlora_helpers progress class --to class.csv"""
UNSURE = "?"  # behind a result that may be out of date


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="notebooks, reports, or folders of them")
    parser.add_argument(
        "--to", metavar="FILE", type=Path, help="write this new file: .json for one person, .csv for one or a class"
    )
    parser.add_argument("--name", default="", help="the person's name, for a report")


def command(args: argparse.Namespace) -> int:
    """Print who has solved what, and write it to a file if that is asked for.

    Raises:
        ValueError, OSError: there is no notebook, or the file cannot be written.
    """
    kind = args.to.suffix.lower() if args.to else ""
    if args.to and kind not in (".json", ".csv"):
        raise ValueError(f"to={str(args.to)!r}: must end in .json, for one person, or in .csv")
    found = find_people(args.paths, args.name)
    if kind == ".json" and len(found.people) > 1:
        raise ValueError(
            f"to={str(args.to)!r}: there are {len(found.people)} persons: write a file that ends in .csv, or give --name if all is one person's"
        )
    if args.to:
        is_json = kind == ".json"
        content = (
            json.dumps(as_report(found.people[0]), indent=1, ensure_ascii=False) + "\n"
            if is_json
            else as_csv(found.people)
        )
        # a spreadsheet takes a file without this mark for one in the encoding of Windows
        write_new(args.to, [content.encode("utf-8" if is_json else "utf-8-sig")])
    print(_of_one(found.people[0]) if len(found.people) == 1 else _of_a_class(found.people))
    for notice in _notices(found):
        print(f"! {notice}")
    print(f"\n{SELF_REPORTED}")
    if args.to:
        print(f"Written: {readable(str(args.to))}")
    return 0


# ---- One person


def _of_one(person: Person) -> str:
    rows = []
    for lesson in person.lessons:
        exercises = [task for task in lesson.tasks if task.kind == "exercise"]
        questions = [task for task in lesson.tasks if task.kind == "quiz"]
        rows += [(str(lesson.lesson), task.number, _said(task), task.title) for task in exercises]
        if questions:
            rows.append((str(lesson.lesson), "quiz", f"{_right(questions)} of {len(questions)} right", ""))
        if not lesson.tasks:
            rows.append((str(lesson.lesson), "", "no exercises", lesson.title))
    table = as_table(["lesson", "exercise", "result", "about"], rows)
    return f"{table}\n\n{_sum(person)}"


def _said(task: TaskResult) -> str:
    return task.result + UNSURE * bool(task.notices)


def _right(tasks: Sequence[TaskResult]) -> int:
    return sum(task.counts for task in tasks)


def _sum(person: Person) -> str:
    parts = []
    for kind, word in (("exercise", "exercises"), ("quiz", "questions of the quiz")):
        if tasks := person.tasks(kind):
            parts.append(f"{_right(tasks)} of {len(tasks)} {word}")
    return f"Right: {', '.join(parts) or 'nothing, for there are no exercises'}."


# ---- A class


def _all_tasks(people: Sequence[Person]) -> list[tuple[str, str, str]]:
    """(kind, number, title) of all exercises and questions that anybody's notebook has, the exercises first."""
    found = {
        (task.kind, task.number): task.title
        for person in people
        for task in (*person.tasks("exercise"), *person.tasks("quiz"))
    }

    def place(key: tuple[str, str]) -> tuple:
        return key[0] != "exercise", *map(int, key[1].split("."))

    return [(*key, found[key]) for key in sorted(found, key=place)]


def _of_a_class(people: Sequence[Person]) -> str:
    tasks = _all_tasks(people)
    lessons = sorted({lesson.lesson for person in people for lesson in person.lessons})
    rows = []
    for person in people:
        by_lesson = {lesson.lesson: [t for t in lesson.tasks if t.kind == "exercise"] for lesson in person.lessons}
        cells = [f"{_right(by_lesson[n])}/{len(by_lesson[n])}" if n in by_lesson else None for n in lessons]
        questions = person.tasks("quiz")
        quiz = f"{_right(questions)}/{len(questions)}" if questions else None
        rows.append((person.name, *cells, _right(person.tasks("exercise")), quiz))
    of_people = as_table(["person", *(f"lesson {n}" for n in lessons), "exercises right", "quiz"], rows)
    counted = [
        (number, *(_counts(people, kind, number)[result] for result in (*RESULTS.values(), "no notebook")), title)
        for kind, number, title in tasks
        if kind == "exercise"
    ]
    of_tasks = as_table(["exercise", *RESULTS.values(), "no notebook", "about"], counted)
    return f"{of_people}\n\n{of_tasks}\n\n{len(people)} persons. A result with notices below counts as not run."


def _counts(people: Sequence[Person], kind: str, number: str) -> Counter:
    """How many persons have each result; one that may be out of date is as good as not run."""
    counts: Counter = Counter()
    for person in people:
        task = person.task(kind, number)
        counts["no notebook" if task is None else "not run" if task.notices else task.result] += 1
    return counts


def as_csv(people: Sequence[Person]) -> str:
    """One row per person and one column per exercise and question, and a last row with how many have each one right."""
    tasks = _all_tasks(people)
    out = io.StringIO()
    writer = csv.writer(out)
    names = [f"{'Exercise' if kind == 'exercise' else 'Quiz'} {number}" for kind, number, _ in tasks]
    writer.writerow(["person", *names, "exercises right", "questions right", "notices"])
    for person in people:
        found = [person.task(kind, number) for kind, number, _ in tasks]
        notices = "; ".join(_of_person(person))
        row = ["" if task is None else _said(task) for task in found]
        sums = [_right(person.tasks("exercise")), _right(person.tasks("quiz"))]
        writer.writerow([_no_formula(person.name), *row, *sums, _no_formula(notices)])
    right = [
        sum(bool((task := person.task(kind, number)) and task.counts) for person in people) for kind, number, _ in tasks
    ]
    sums = [sum(_right(person.tasks(kind)) for person in people) for kind in ("exercise", "quiz")]
    writer.writerow(["right", *right, *sums, SELF_REPORTED])
    return out.getvalue()


def _no_formula(text: str) -> str:
    """A text that a spreadsheet does not compute: names come from others."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


# ---- Notices


def _of_person(person: Person) -> list[str]:
    notices = list(person.notices)
    for lesson in person.lessons:
        name = readable(Path(lesson.file).name)
        notices += [f"{name}: {notice}" for notice in lesson.notices]
        notices += [f"{name}, {task.kind} {task.number}: {notice}" for task in lesson.tasks for notice in task.notices]
    return notices


def _notices(found: Found) -> list[str]:
    several = len(found.people) > 1
    of_people = [
        f"{person.name}: {notice}" if several else notice for person in found.people for notice in _of_person(person)
    ]
    return [*found.notices, *of_people]
