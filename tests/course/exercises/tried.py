"""One answer to an exercise, as `answers_NN.py` lists them for the exercises of lesson NN.

    RIGHT = {"entropy": [Tried(by_torch), Tried(by_numpy), Tried(with_a_loop)]}
    WRONG = {"entropy": [Tried(without_the_minus, says="in the case “equal shares”"), Tried(1.5, says="not a function")]}

The keys are the names of the exercises in `qlora_helpers/course/exercises/lesson_NN.py`.
"""

from typing import Any


class Tried:
    """An answer, and what the lesson gives with it.

    Args:
        answer: what a learner might give.
        says: words that the message about a wrong answer must have.
        given: what the lesson's cell passes to `check` besides the answer.
    """

    def __init__(self, answer: Any, says: str = "", **given: Any):
        self.answer, self.says, self.given = answer, says, given

    def __repr__(self) -> str:
        name = getattr(self.answer, "__name__", None) or " ".join(repr(self.answer).split())[:60]
        return f"Tried({name})"
