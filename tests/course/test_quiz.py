"""The quiz of each lesson: what is said to an answer, and that the right one cannot be told by its place or its length."""

import json
import re
from collections import Counter
from statistics import mean

import numpy as np
import pytest
import torch

from notebooks.scripts import build
from qlora_helpers.course import quiz
from qlora_helpers.course.quiz import marking

LESSONS = [int(name[:2]) for name in build.lessons()]
QUESTIONS = [question for lesson in LESSONS for question in quiz.read_quiz(lesson)]

every_question = pytest.mark.parametrize("question", QUESTIONS, ids=[question.number for question in QUESTIONS])


# ---- The questions


def test_every_lesson_has_four_questions_and_no_quiz_is_left_over():
    assert [int(path.stem) for path in sorted(marking.FOLDER.glob("*.json"))] == LESSONS
    assert Counter(question.number.partition(".")[0] for question in QUESTIONS) == {str(n): 4 for n in LESSONS}


@every_question
def test_a_question_has_options_that_differ_and_sentences_that_teach(question):
    assert question.text.endswith("?") and sum(option.right for option in question.options) == 1
    assert len({option.text for option in question.options}) == len(question.options) in (3, 4)
    for option in question.options:
        assert not option.text.endswith("."), "options are no sentences"
        assert option.says.endswith((".", "?")) and len(option.says) > len(option.text) / 2 and len(option.says) >= 40


def words(text: str) -> set[str]:
    """The words that carry a meaning: names, numbers, and what has at least five letters; plurals as singulars."""
    found = re.findall(r"[a-z][a-z0-9_]{4,}|\d+", text.lower())
    return {word.rstrip("s") for word in found}


def gives_away(question: quiz.Question, said: str) -> bool:
    """Whether a text has most of the words by which the right option differs from the question and the other options."""
    others = words(" ".join([question.text, *(option.text for option in question.options if not option.right)]))
    its_own = words(question.right.text) - others
    return bool(its_own) and len(its_own & words(said)) > len(its_own) / 2


@every_question
def test_a_wrong_option_s_sentence_does_not_say_which_one_is_right(question):
    for option in question.options:
        if not option.right:
            assert question.right.text.lower() not in option.says.lower()
            assert not gives_away(question, option.says), (option.letter, option.says)


def test_the_last_test_notices_a_sentence_that_gives_the_answer_away():
    question = quiz.read_quiz(6)[1]
    assert gives_away(question, "You should merge into the 16-bit base and quantise then.")
    assert not gives_away(question, "A merge into 4 bits rounds.")


def test_right_options_are_spread_evenly_and_in_no_order():
    letters = [question.right.letter for question in QUESTIONS]
    count = Counter(letters)
    assert count.keys() == set("abcd") and max(count.values()) - min(count.values()) <= 2
    lessons = ["".join(letters[at : at + 4]) for at in range(0, len(letters), 4)]
    assert len(set(lessons)) >= 0.6 * len(lessons), "too many lessons have their right options at the same places"
    assert not re.search(r"(.)\1\1", "".join(letters)), "three right options in a row have one letter"


def test_right_options_cannot_be_told_by_their_length():
    """Who always takes the longest option, or the shortest, is right no more often than by chance, or hardly."""
    lengths = [({o.letter: len(o.text) for o in question.options}, question.right.letter) for question in QUESTIONS]
    for extreme in (max, min):
        hits = [extreme(sizes, key=sizes.get) == right for sizes, right in lengths]
        assert sum(hits) / len(hits) <= 1 / 3, extreme.__name__
    right = mean(sizes[letter] for sizes, letter in lengths)
    wrong = mean(size for sizes, letter in lengths for other, size in sizes.items() if other != letter)
    assert right / wrong == pytest.approx(1, abs=0.1)


# ---- Marking


@pytest.fixture
def asked() -> quiz.Question:
    return quiz.read_quiz(2)[2]


@pytest.mark.parametrize(
    "answer", ["d", "D", " d ", "d)", "(D)", "d.", "4", 4, np.int64(4), torch.tensor(4), np.str_("d")], ids=repr
)
def test_an_answer_may_be_a_letter_in_any_spelling_or_a_place(asked, answer):
    assert asked.right.letter == "d"
    assert asked.marked(answer) == f"✓ Quiz 2.3: right. {asked.right.says}"


@pytest.mark.parametrize("answer", [..., None, "", "  "], ids=repr)
def test_no_answer_is_none(asked, answer):
    assert asked.marked(answer) == "○ Quiz 2.3: not answered yet"


@pytest.mark.parametrize(
    "answer", ["e", "dd", "right", 0, 5, -1, 2.0, True, False, ["d"], {"d"}, b"d", np.nan], ids=repr
)
def test_what_is_no_option_is_told_so(asked, answer):
    assert asked.marked(answer) == f"✗ Quiz 2.3: {answer!r} is none of the options: answer with a, b, c or d"


@every_question
def test_a_wrong_answer_is_told_what_it_overlooks(question):
    for option in question.options:
        if not option.right:
            assert (
                question.marked(option.letter)
                == f"✗ Quiz {question.number}: {option.letter} is not right: {option.says}"
            )


def test_a_lesson_s_answers_are_marked_line_by_line(capsys):
    one, two, _, four = quiz.read_quiz(2)
    quiz.mark(2, {1: "A", "2": 1, 3: ..., "2.4": four.right.letter})
    assert capsys.readouterr().out.splitlines() == [
        f"✗ Quiz 2.1: a is not right: {one.options[0].says}",
        f"✓ Quiz 2.2: right. {two.right.says}",
        "○ Quiz 2.3: not answered yet",
        f"✓ Quiz 2.4: right. {four.right.says}",
    ]


@pytest.mark.parametrize("answers", [..., None, {}, [], {1: ..., 2: ..., 3: ..., 4: ...}], ids=repr)
def test_nothing_answered_gives_four_lines(capsys, answers):
    quiz.mark("02", answers)
    assert capsys.readouterr().out.count("not answered yet\n") == 4


def test_answers_may_be_a_list(capsys):
    quiz.mark(2, [question.right.letter for question in quiz.read_quiz(2)])
    assert capsys.readouterr().out.count("✓") == 4


def test_answers_that_are_none_and_questions_that_are_not_there_are_said(capsys):
    quiz.mark(2, "abcd")
    assert "answers must be a dictionary such as {1: " in capsys.readouterr().out
    quiz.mark(2, {1: "a", 5: "b", "3.1": "c", "x": "d"})
    said = capsys.readouterr().out.splitlines()
    assert said[4:] == [f"✗ Quiz 2: there is no question {key!r}: they are 1 to 4" for key in (5, "3.1", "x")]


# ---- The files


def test_a_lesson_without_a_quiz_and_no_lesson_are_named():
    assert quiz.has_quiz(2) and not quiz.has_quiz(99)
    with pytest.raises(FileNotFoundError, match="lesson 99 has no quiz: there are those of lessons 1, 2"):
        quiz.read_quiz(99)
    with pytest.raises(ValueError, match="lesson='two' must be the number of a lesson, such as 2"):
        quiz.read_quiz("two")


GOOD = {"text": "Why?", "options": {"a": "A", "b": "B", "c": "C"}, "right": "b", "says": {"a": "x", "b": "y", "c": "z"}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"options": {"a": "A", "b": "B"}}, "its options must be a, b, c and perhaps d"),
        ({"options": {"b": "B", "a": "A", "c": "C"}}, "its options must be a, b, c and perhaps d"),
        ({"options": dict.fromkeys("abcde", "A")}, "its options must be a, b, c and perhaps d"),
        ({"right": "d"}, "one option is right"),
        ({"says": {"a": "x", "b": "y"}}, "each has a sentence in `says`"),
    ],
    ids=["two options", "another order", "five options", "right is none", "a sentence is missing"],
)
def test_a_file_that_is_not_as_it_should_be_is_refused(tmp_path, monkeypatch, changed, message):
    monkeypatch.setattr(marking, "FOLDER", tmp_path)
    (tmp_path / "07.json").write_text(json.dumps([GOOD, GOOD | changed]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"07.json, question 7.2: .*{message}"):
        quiz.read_quiz(7)
    (tmp_path / "07.json").write_text(json.dumps([GOOD]), encoding="utf-8")
    assert quiz.read_quiz(7)[0].right.text == "B"
