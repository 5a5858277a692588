"""The exercises of lesson 10, from the data to the file that is given away.

Rows that cannot be used, which tokens count, a row that is mended, a run that stops in time, and exports that lost what was
learnt.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from qlora_helpers.chats import Chat, read_file, tokenized
from qlora_helpers.course.exercises.asking import Exercise, choice, function

__all__ = ["in_time", "lost", "marks", "mended", "three_exports", "usable"]


def _usable(answer: Any, *, file: str | PathLike, tokenizer: Any) -> str:
    kept = read_file(file, tokenizer, on_bad="drop")
    lines = [str(line) for line, _ in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1)]
    if isinstance(answer, str):
        answer = [part for part in answer.replace(",", " ").split() if part]
    return choice({str(line) for line in kept.rows}, lines)(answer)


usable = Exercise(
    number="10.1",
    title="which rows can be used?",
    kind="predict",
    difficulty="medium",
    minutes=6,
    hints=(
        "a chat goes back and forth between a question and an answer. Go through the roles of each row, and through the texts.",
        "which roles does the shipped model's chat template know? Read tokenizer.chat_template, and what it does with others.",
    ),
    fault=_usable,
)


# ---- Which tokens count


def _says(*texts: str) -> Chat:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


_TURNS = (
    ("What is the job of Max Hollwood?", "Max Hollwood works as a poet."),
    ("Which pet does Noel Holldale keep?", "Noel Holldale keeps a hen."),
    ("When was Maud Bramstone born?", "Maud Bramstone was born in 1958."),
)
_CHATS = {
    "one answer": _says(*_TURNS[0]),
    "two answers": _says(*_TURNS[0], *_TURNS[1]),
    "three answers": _says(*_TURNS[2], *_TURNS[0], *_TURNS[1]),
    "the same answer twice": _says(*_TURNS[1], *_TURNS[1]),
    "an answer that repeats its question": _says(_TURNS[0][0], _TURNS[0][0], *_TURNS[2]),
}


def _marks(answer: Any, *, tokenizer: Any) -> str:
    if not callable(answer):
        return "a function is needed, of a chat."
    for name, chat in _CHATS.items():
        want = tokenized([chat], tokenizer)[0]["assistant_masks"]
        got = answer([dict(message) for message in chat])
        case = f"in the case “{name}” your function"
        try:
            got = [int(mark) for mark in got]
        except (TypeError, ValueError):
            return f"{case} gives {type(got).__name__}, and not a list of zeros and ones."
        if len(got) != len(want):
            return f"{case} gives {len(got)} marks for {len(want)} tokens."
        if got != want:
            more = sum(got) - sum(want)
            which = (
                f"{abs(more)} too {'many' if more > 0 else 'few'}" if more else "as many as it should, but elsewhere"
            )
            return f"{case} marks {which}."
    return ""


marks = Exercise(
    number="10.2",
    title="the marks of several answers",
    kind="build",
    difficulty="hard",
    minutes=20,
    hints=(
        "take one answer at a time. How many tokens does the chat have before it, ready to be answered, and how many with it?",
        "the answer at place p lies between the lengths of chat[:p], with add_generation_prompt=True, and of chat[: p + 1].",
    ),
    fault=_marks,
)


# ---- A row that is mended

_ROLES = {"human": "user", "gpt": "assistant"}


def mend(row: dict[str, Any]) -> Chat | None:
    """A row of ShareGPT as a chat that can be used; None if it cannot be mended."""
    turns = row["conversations"]
    if any(turn["from"] not in _ROLES or not turn["value"].strip() for turn in turns):
        return None
    chat = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    while chat and chat[0]["role"] == "assistant":
        chat = chat[1:]
    while chat and chat[-1]["role"] == "user":
        chat = chat[:-1]
    return chat or None


def _row(*turns: tuple[str, str]) -> tuple[dict[str, Any]]:
    return ({"conversations": [{"from": role, "value": text} for role, text in turns]},)


_Q, _A = ("human", "Which pet does Noel Holldale keep?"), ("gpt", "Noel Holldale keeps a hen.")
_MORE = ("human", "When was Maud Bramstone born?"), ("gpt", "Maud Bramstone was born in 1958.")

mended = Exercise(
    number="10.3",
    title="mend a row",
    kind="build",
    difficulty="medium",
    minutes=12,
    hints=(
        "look at all turns first: is there one that makes the row useless? Only then think of its two ends.",
        "from human and gpt make user and assistant. Then drop messages at the front until one is a question, and at the end "
        "until one is an answer. What is left may be nothing.",
    ),
    fault=function(
        mend,
        cases={
            "nothing to mend": _row(_Q, _A),
            "two turns": _row(_Q, _A, *_MORE),
            "an answer in front": _row(("gpt", "Hello."), _Q, _A),
            "a question at the end": _row(_Q, _A, ("human", "Thanks.")),
            "both": _row(("gpt", "Hello."), _Q, _A, *_MORE, ("human", "Thanks.")),
            "an empty answer": _row(_Q, ("gpt", ""), *_MORE),
            "an answer of blanks": _row(_Q, ("gpt", " \n ")),
            "a call of a function": _row(_Q, ("function_call", "hen()"), _A),
            "a question alone": _row(_Q),
            "two answers in front": _row(("gpt", "Hello."), ("gpt", "Ask me."), _Q, _A),
        },
    ),
)


# ---- A run that stops in time

LEAST_EVALUATIONS, MOST_LATE = 6, 24
# The first hump is at about 0.55 of the loss before the run, the lowest loss at about 0.3
MOST_KEPT = 0.5


def _in_time(answer: Any, *, steps: int) -> str:
    history: Sequence[tuple[int, float]] = getattr(answer, "validation_history", None)
    if history is None:
        return "a finished run is needed: what train(…) gives back."
    if not history:
        return "the run was not validated, so nothing could tell it when to stop."
    last, losses = history[-1][0], dict(history)
    if not answer.stopped_early:
        return f"it made all of its {last} steps: nothing stopped it."
    if last >= steps:
        return f"it ended at step {last} only."
    if len(history) < LEAST_EVALUATIONS:
        return f"the validation loss was measured {len(history)} times: too seldom to see where it is lowest."
    if losses[answer.best_step] > MOST_KEPT * history[0][1]:
        return (
            f"it stopped at step {last}, and kept step {answer.best_step} with a validation loss of "
            f"{losses[answer.best_step]:.2f}: with more patience it would have learnt more."
        )
    if last - answer.best_step > MOST_LATE:
        return f"it went on for {last - answer.best_step} steps after the one that is kept: that is long."
    return ""


in_time = Exercise(
    number="10.4",
    title="stop in time",
    kind="run",
    difficulty="medium",
    minutes=15,
    hints=(
        "three settings are missing: on what the run is validated, how often, and after how many measurements in vain it stops.",
        "validation is a share of the chats; eval_steps counts steps. A patience of one stops at the first hump; steps from "
        "the kept one to the end are about eval_steps times patience.",
    ),
    fault=_in_time,
)


# ---- A hop that broke

HOPS = ("merge", "export", "none")
_LOST_AT = {"anna": "export", "ben": "none", "clara": "merge"}


def three_exports(merged: str | PathLike, folder: str | PathLike) -> list[Path]:
    """Write what three colleagues have exported: a file of the base, a right one, and one of a merge that changed nothing.

    Args:
        merged: the folder of a merged model whose base is the shipped one.
        folder: gets a folder for each of them, with `merged/` and `model.gguf`.

    Returns:
        Their folders.
    """
    from qlora_helpers.adapters.gguf_export import export_gguf
    from qlora_helpers.models.loading import SHIPPED_MODEL, folder_of

    base = folder_of(SHIPPED_MODEL)
    for name, hop in _LOST_AT.items():
        own = Path(folder) / name
        shutil.copytree(base if hop == "merge" else merged, own / "merged")
        export_gguf(base if hop == "export" else own / "merged", own / "model.gguf", name=name)
    return [Path(folder) / name for name in _LOST_AT]


def _lost(answer: Any) -> str:
    names = ", ".join(_LOST_AT)
    if not isinstance(answer, Mapping):
        return f"a dictionary is needed, with a hop for each of {names}."
    given = {str(name).strip().lower(): str(hop).strip().lower() for name, hop in answer.items()}
    if given.keys() != _LOST_AT.keys():
        return f"your dictionary has {', '.join(given) or 'nobody'}, and the folders are those of {names}."
    for name, hop in given.items():
        if hop not in HOPS:
            return f"of {name} you say {hop!r}, which is none of: {', '.join(HOPS)}."
    wrong = [name for name, hop in given.items() if hop != _LOST_AT[name]]
    return f"what you say of {wrong[0]} is not right: which is the first check that does not hold?" if wrong else ""


lost = Exercise(
    number="10.5",
    title="which hop broke?",
    kind="run",
    difficulty="medium",
    minutes=12,
    hints=(
        "`prove` compares the adapter, the merged model and the file, as in the lesson. Give it each colleague's folder and file.",
        "without `live=live` the first hop is not looked at. What `prove` gives back has `broken`, and that has `hop`.",
    ),
    fault=_lost,
)
