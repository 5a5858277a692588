"""Make what an instructor shows and hands out, in `dist/teaching/`; nothing is executed.

    python -m teaching.scripts.build           # all lessons, and the zip for learners
    python -m teaching.scripts.build 03        # one of them
    python -m teaching.scripts.build --guide   # only the tables of teaching/README.md

- `slides/NN_title.slides.html`: slides, with reveal.js in the file;
- `handouts/NN_title.html`: the lesson as one page to read or print, and `handouts/glossary.html`;
- `quiz/NN_title.gift.txt` for Moodle, `quiz/NN_title.questions.html` to print, `quiz/NN_title.answers.html` for you;
- `qlora-course.zip`: for learners, see `learners_zip`.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from notebooks.scripts import build
from qlora_helpers.course import quiz
from teaching.scripts import ROOT, guide, handouts, pages, quizzes, slides

INTO = ROOT / "dist" / "teaching"
ZIP = "qlora-course.zip"  # the name that the Colab editions look for
TOP = "qlora-course/"

# What has solutions or the answers of exercises, or serves only who works on the course or teaches it.
NOT_FOR_LEARNERS = ("notebooks/solutions", "notebooks/source", "tests", "teaching", "data/scripts", ".ci")


def chosen(numbers: list[str]) -> list[str]:
    """The names of the lessons with these numbers; all if there are none.

    Raises:
        ValueError: there is no such lesson.
    """
    names = {int(name[:2]): name for name in build.lessons()}
    if unknown := [number for number in numbers if not number.isdecimal() or int(number) not in names]:
        raise ValueError(f"LESSON={' '.join(unknown)}: there is no such lesson. There are {', '.join(names.values())}")
    return [names[int(number)] for number in numbers] or list(names.values())


def materials(name: str) -> dict[str, str]:
    """All pages of a lesson, by their paths."""
    title, questions = pages.lesson(name).metadata.title, quiz.read_quiz(name[:2])
    return {
        f"slides/{name}{slides.ENDING}": slides.page(name),
        f"handouts/{name}{handouts.ENDING}": handouts.page(name),
        f"quiz/{name}.gift.txt": quizzes.gift(title, questions),
        f"quiz/{name}.questions.html": quizzes.printable(title, questions),
        f"quiz/{name}.answers.html": quizzes.answer_key(title, questions),
    }


def write(into: Path, texts: dict[str, str]) -> None:
    """Write texts into a folder, by their paths in it."""
    for path, text in texts.items():
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        (into / path).write_text(text, encoding="utf-8")


def learners_zip(into: Path) -> Path:
    """The course for learners, from the last commit: without the solutions, and with the handouts and the questions.

    It takes the place of the zip that `make zip` makes: unpacked, or beside a Colab edition. The answers to the quiz are in
    it, since it marks itself; they are in `qlora_helpers/course/quiz/`.

    Raises:
        RuntimeError: this is not a git checkout.
    """
    target = into / ZIP
    excluded = [f":(exclude){path}" for path in NOT_FOR_LEARNERS]
    command = ["git", "archive", "--format=zip", f"--prefix={TOP}", f"--output={target}", "HEAD", "--", ".", *excluded]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{ZIP} is made from the last commit, and git says: {done.stderr.strip()}")
    with ZipFile(target, "a", compression=ZIP_DEFLATED) as archive:
        for path in sorted([*into.glob("handouts/*.html"), *into.glob("quiz/*.questions.html")]):
            archive.write(path, f"{TOP}{path.relative_to(into).as_posix()}")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help="numbers of lessons, such as 03; all by default")
    parser.add_argument("--into", type=Path, default=INTO, help="the folder, by default dist/teaching")
    parser.add_argument("--guide", action="store_true", help="only fill the tables of teaching/README.md")
    args = parser.parse_args()
    guide.fill_page()
    if args.guide:
        return 0
    try:
        names = chosen(args.lessons)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.lessons and args.into.exists():
        shutil.rmtree(args.into)  # nothing of a lesson that is gone
    print(f"{'':28}{'slides':>7}{'slides, MB':>12}{'handout, MB':>13}{'questions':>11}")
    for name in names:
        texts = materials(name)
        write(args.into, texts)
        megabytes = [len(texts[path].encode()) / 1e6 for path in list(texts)[:2]]
        questions = len(quiz.read_quiz(name[:2]))
        print(f"{name:28}{slides.count(name):7}{megabytes[0]:12.1f}{megabytes[1]:13.1f}{questions:11}", flush=True)
    if (ROOT / pages.GLOSSARY).exists():
        write(args.into, {"handouts/glossary.html": handouts.glossary()})
    print(f"\nin {args.into}: slides/, handouts/, quiz/")
    if not args.lessons:
        try:
            made = learners_zip(args.into)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"{made.name}, {made.stat().st_size / 1e6:.1f} MB: for learners, from the last commit, without solutions")
        if subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT).returncode:
            print("What is not committed is only in the slides, the handouts and the quiz.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
