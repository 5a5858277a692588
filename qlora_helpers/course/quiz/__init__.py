"""A quiz of four questions for each lesson, `NN.json`, which marks itself.

The build puts it into a lesson before "You have" (`notebooks/scripts/quiz_cells.py`): the questions as text, a cell for
the learner's answers, and one that calls `mark`. Answers are letters, `answers = {1: "b", ...}`. A wrong one is told what
it overlooks, and never which one is right.
"""

from qlora_helpers.course.quiz.marking import Option, Question, as_markdown, has_quiz, mark, read_quiz

__all__ = ["Option", "Question", "as_markdown", "has_quiz", "mark", "read_quiz"]
