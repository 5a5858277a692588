"""The command that makes what is shown and handed out: which files, from which lessons, and what learners get."""

import subprocess
import sys
from zipfile import ZipFile

import pytest

from notebooks.scripts import build as notebooks
from qlora_helpers.course import quiz
from teaching.scripts import build
from tests import ROOT

in_a_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the zip is made from the last commit, by git")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "teaching.scripts.build", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)


def files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def of_a_lesson(name: str) -> set[str]:
    made = {f"slides/{name}.slides.html", f"handouts/{name}.html"}
    return made | {f"quiz/{name}.{what}" for what in ("gift.txt", "questions.html", "answers.html")}


def test_one_lesson_gives_its_files_and_leaves_the_others_alone(tmp_path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "kept.txt").write_text("of another lesson", encoding="utf-8")
    done = run("3", "--into", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == {"slides/kept.txt", "handouts/glossary.html"} | of_a_lesson("03_double_quantisation")
    assert "03_double_quantisation" in done.stdout and build.ZIP not in done.stdout


@pytest.mark.parametrize("number", ["44", "x", "0"])
def test_a_lesson_that_is_not_there_is_named(number, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(build.guide, "fill_page", lambda: None)
    monkeypatch.setattr(sys, "argv", ["build", number, "--into", str(tmp_path / "new")])
    assert build.main() == 2
    assert f"LESSON={number}: there is no such lesson. There are 01_" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@in_a_checkout
def test_learners_get_the_course_without_solutions_and_with_handouts(tmp_path):
    build.write(
        tmp_path,
        {"handouts/a.html": "a", "quiz/a.questions.html": "q", "quiz/a.answers.html": "no", "slides/a.html": "no"},
    )
    made = build.learners_zip(tmp_path)
    with ZipFile(made) as archive:
        assert archive.testzip() is None
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert all(name.startswith(build.TOP) for name in names)
    inside = {name.removeprefix(build.TOP) for name in names}
    assert {"handouts/a.html", "quiz/a.questions.html"} <= inside
    assert not any("answers.html" in name or name.startswith("slides/") for name in inside)
    for folder in build.NOT_FOR_LEARNERS:
        assert (ROOT / folder).exists(), f"nothing to leave out: {folder}"
        assert not any(name.startswith(f"{folder}/") for name in inside)
    # what the lessons and the set-up of Colab need
    assert {
        "colab/setup.py",
        "colab/requirements.txt",
        "pyproject.toml",
        "qlora_helpers/__init__.py",
        "Makefile",
    } <= inside
    assert {f"notebooks/{name}.ipynb" for name in notebooks.lessons()} <= inside
    assert any(name.startswith("data/tiny-llama/") for name in inside)


@in_a_checkout
@pytest.mark.everything
def test_a_lesson_runs_in_what_learners_get(tmp_path):
    made = build.learners_zip(tmp_path)
    with ZipFile(made) as archive:
        archive.extractall(tmp_path)
    course = tmp_path / "qlora-course"
    code = "from qlora_helpers.course import quiz; from qlora_helpers.models.loading import load_model; load_model(); quiz.mark(3, {})"
    done = subprocess.run([sys.executable, "-c", code], cwd=course, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0 and done.stdout.count("not answered yet") == 4, done.stderr[-2000:]


def test_without_git_the_zip_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(
        RuntimeError, match=r"qlora-course.zip is made from the last commit, and git says: .*not a git repository"
    ):
        build.learners_zip(tmp_path)


@in_a_checkout
@pytest.mark.everything
def test_all_lessons_give_all_files_and_the_zip(tmp_path):
    (tmp_path / "out" / "slides").mkdir(parents=True)
    (tmp_path / "out" / "slides" / "99_gone.slides.html").write_text("of a lesson that is gone", encoding="utf-8")
    done = run("--into", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    wanted = set().union(*map(of_a_lesson, notebooks.lessons())) | {"handouts/glossary.html", build.ZIP}
    assert files(tmp_path / "out") == wanted
    assert sum(line.split()[-1:] == [str(len(quiz.read_quiz(1)))] for line in done.stdout.splitlines()) == len(
        notebooks.lessons()
    )
