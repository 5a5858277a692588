"""Answers to the exercises of lesson 10."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from qlora_helpers.chats import tokenized
from qlora_helpers.course.exercises.lesson_10 import mend
from qlora_helpers.models.loading import load_tokenizer
from tests.course.exercises.tried import Tried

TOKENIZER = load_tokenizer()
UNMARKED = load_tokenizer()
UNMARKED.chat_template = re.sub(r"{% (end)?generation %}", "", TOKENIZER.chat_template)

# ---- 10.1


def chat(*roles_and_texts):
    return [{"role": r, "content": t} for r, t in zip(roles_and_texts[::2], roles_and_texts[1::2], strict=True)]


ASK, REPLY = "Which pet does Noel Holldale keep?", "Noel Holldale keeps a hen."
ROWS = [
    chat("user", ASK, "assistant", REPLY),
    chat("user", ASK, "assistant", " "),
    chat("system", "Be brief.", "user", ASK, "assistant", REPLY),
    chat("user", ASK, "assistant", REPLY, "user", "Is it old?", "assistant", "No idea."),
    chat("assistant", "Ask me.", "user", ASK, "assistant", REPLY),
]
FILE = Path(mkdtemp()) / "mixed.jsonl"
FILE.write_text("\n".join(json.dumps({"messages": row}) for row in ROWS), encoding="utf-8")
READ = {"file": FILE, "tokenizer": TOKENIZER}

# ---- 10.2


def ids(messages, **options):
    return UNMARKED.apply_chat_template(messages, **options)["input_ids"]


def by_comparison(messages):
    found = [0] * len(ids(messages))
    for place in range(1, len(messages), 2):
        begin, end = len(ids(messages[:place], add_generation_prompt=True)), len(ids(messages[: place + 1]))
        found[begin:end] = [1] * (end - begin)
    return found


def piece_by_piece(messages):
    found = []
    for place in range(1, len(messages), 2):
        found += [0] * (len(ids(messages[:place], add_generation_prompt=True)) - len(found))
        found += [1] * (len(ids(messages[: place + 1])) - len(found))
    return found


def as_a_tuple(messages):
    return tuple(by_comparison(messages))


def as_a_tensor(messages):
    import torch

    return torch.tensor(by_comparison(messages))


def as_an_array(messages):
    import numpy

    return numpy.array(by_comparison(messages), dtype=bool)


def by_the_marks(messages):
    return tokenized([messages], TOKENIZER)[0]["assistant_masks"]


def last_alone(messages):
    begin = len(ids(messages[:-1], add_generation_prompt=True))
    return [0] * begin + [1] * (len(ids(messages)) - begin)


def without_the_prompt(messages):
    found = [0] * len(ids(messages))
    for place in range(1, len(messages), 2):
        begin, end = len(ids(messages[:place])), len(ids(messages[: place + 1]))
        found[begin:end] = [1] * (end - begin)
    return found


def without_the_end(messages):
    found = [0] * len(ids(messages))
    for place in range(1, len(messages), 2):
        begin, end = len(ids(messages[:place], add_generation_prompt=True)), len(ids(messages[: place + 1])) - 1
        found[begin:end] = [1] * (end - begin)
    return found


def by_searching_the_text(messages):
    """The first place at which an answer's tokens stand: in a question that is repeated it is the wrong one."""
    whole = ids(messages)
    found = [0] * len(whole)
    for message in messages[1::2]:
        answer = UNMARKED(message["content"], add_special_tokens=False)["input_ids"]
        for start in range(len(whole)):
            if whole[start : start + len(answer)] == answer:
                found[start : start + len(answer) + 1] = [1] * (len(answer) + 1)
                break
    return found


def of_the_answers_alone(messages):
    return [1] * sum(map(sum, [by_comparison(messages)]))


# ---- 10.3

NAMES = {"human": "user", "gpt": "assistant"}


def with_slices(row):
    turns = row["conversations"]
    if not all(turn["from"] in NAMES and turn["value"].strip() for turn in turns):
        return None
    asks = [place for place, turn in enumerate(turns) if turn["from"] == "human"]
    answers = [place for place, turn in enumerate(turns) if turn["from"] == "gpt"]
    if not asks or not answers or asks[0] > answers[-1]:
        return None
    turns = turns[asks[0] : answers[-1] + 1]
    return [{"role": NAMES[turn["from"]], "content": turn["value"]} for turn in turns]


def with_try(row):
    try:
        messages = [
            {"content": t["value"], "role": NAMES[t["from"]]} for t in row["conversations"] if t["value"].strip()
        ]
    except KeyError:
        return None
    if len(messages) < len(row["conversations"]):
        return None
    while messages and messages[0]["role"] == "assistant":
        del messages[0]
    while messages and messages[-1]["role"] == "user":
        del messages[-1]
    return messages if messages else None


def recursive(row):
    turns = row["conversations"]
    if any(not t["value"].strip() or t["from"] not in NAMES for t in turns):
        return None
    if not turns:
        return None
    if turns[0]["from"] == "gpt":
        return recursive({"conversations": turns[1:]})
    if turns[-1]["from"] == "human":
        return recursive({"conversations": turns[:-1]})
    return [{"role": NAMES[t["from"]], "content": t["value"]} for t in turns]


def by_dropwhile(row):
    from itertools import dropwhile

    turns = row["conversations"]
    if {t["from"] for t in turns} - set(NAMES) or not all(t["value"].strip() for t in turns):
        return None
    kept = list(dropwhile(lambda t: t["from"] == "gpt", turns))[::-1]
    kept = list(dropwhile(lambda t: t["from"] == "human", kept))[::-1]
    return [dict(role=NAMES[t["from"]], content=t["value"]) for t in kept] or None


def only_converted(row):
    return [{"role": NAMES[t["from"]], "content": t["value"]} for t in row["conversations"]]


def one_at_each_end(row):
    turns = row["conversations"]
    if any(t["from"] not in NAMES or not t["value"].strip() for t in turns):
        return None
    turns = turns[turns[0]["from"] == "gpt" :]
    turns = turns[: len(turns) - (turns[-1]["from"] == "human")]
    return [{"role": NAMES[t["from"]], "content": t["value"]} for t in turns] or None


def blanks_pass(row):
    return mend({"conversations": [t | {"value": t["value"] or " "} for t in row["conversations"]]}) if all(
        t["value"] for t in row["conversations"]
    ) else only_converted(row)  # fmt: skip


def bad_turns_are_left_out(row):
    return mend({"conversations": [t for t in row["conversations"] if t["from"] in NAMES and t["value"].strip()]})


def an_empty_list(row):
    return mend(row) or []


def changed_in_place(row):
    turns = row["conversations"]
    if any(t["from"] not in NAMES or not t["value"].strip() for t in turns):
        return None
    while turns and turns[0]["from"] == "gpt":
        turns.pop(0)
    while turns and turns[-1]["from"] == "human":
        turns.pop()
    return only_converted(row) or None


# ---- 10.4


@dataclass
class Made:
    """What the exercise looks at in a run."""

    validation_history: list
    best_step: int | None
    stopped_early: bool


def made(every, best, last, start=5.2, lowest=1.5):
    """A run whose validation loss falls to its lowest at `best` and rises up to `last`."""
    history = [
        (step, start + (lowest - start) * step / best if step <= best else lowest + 0.01 * (step - best))
        for step in range(0, last + 1, every)
    ]
    return Made(history, best, last < 150)


STEPS = {"steps": 150}

# ---- 10.5

LOST = {"anna": "export", "ben": "none", "clara": "merge"}

RIGHT = {
    "usable": [Tried(answer, **READ) for answer in ({1, 4}, [4, 1], (1, 4), {"1", "4"}, "1, 4", "1 4")],
    "marks": [
        Tried(function, tokenizer=TOKENIZER)
        for function in (by_comparison, piece_by_piece, as_a_tuple, as_a_tensor, as_an_array, by_the_marks)
    ],
    "mended": [Tried(function) for function in (mend, with_slices, with_try, recursive, by_dropwhile)],
    "in_time": [
        Tried(run, **STEPS)
        for run in (made(5, 50, 70), made(2, 24, 32), made(4, 80, 92), made(10, 80, 100), made(3, 48, 57))
    ],
    "lost": [
        Tried(LOST),
        Tried(dict(reversed(LOST.items()))),
        Tried({name.title(): f" {hop.upper()}" for name, hop in LOST.items()}),
    ],
}

WRONG = {
    "usable": [
        Tried({1}, says="is not right", **READ),
        Tried({1, 3, 4}, says="is not right", **READ),
        Tried({1, 4, 5}, says="is not right", **READ),
        Tried({0, 3}, says="none of", **READ),
        Tried([1, 2, 3, 4, 5], says="is not right", **READ),
    ],
    "marks": [
        Tried(last_alone, says="two answers", tokenizer=TOKENIZER),
        Tried(without_the_prompt, says="too many", tokenizer=TOKENIZER),
        Tried(without_the_end, says="too few", tokenizer=TOKENIZER),
        Tried(by_searching_the_text, says="in the case", tokenizer=TOKENIZER),
        Tried(of_the_answers_alone, says="marks for", tokenizer=TOKENIZER),
        Tried([1, 1, 0], says="a function is needed", tokenizer=TOKENIZER),
        Tried(lambda chat: 3, says="not a list", tokenizer=TOKENIZER),
    ],
    "mended": [
        Tried(only_converted, says="an answer in front"),
        Tried(one_at_each_end, says="in the case"),
        Tried(blanks_pass, says="an empty answer"),
        Tried(bad_turns_are_left_out, says="in the case"),
        Tried(an_empty_list, says="in the case"),
        Tried(changed_in_place, says="changes what it is given"),
        Tried([{"role": "user", "content": "?"}], says="not a function"),
    ],
    "in_time": [
        Tried(Made([], None, False), says="not validated", **STEPS),
        Tried(made(10, 80, 150), says="nothing stopped it", **STEPS),
        Tried(made(25, 75, 100), says="too seldom", **STEPS),
        Tried(made(1, 7, 9, lowest=5.0), says="more patience", **STEPS),
        Tried(made(1, 12, 13, lowest=2.85), says="more patience", **STEPS),  # at the first hump
        Tried(made(5, 50, 110), says="that is long", **STEPS),
        Tried("validation=0.2", says="a finished run", **STEPS),
    ],
    "lost": [
        Tried(LOST | {"ben": "export"}, says="of ben is not right"),
        Tried(LOST | {"anna": "merge"}, says="of anna is not right"),  # both files answer as the base does
        Tried(LOST | {"clara": "export"}, says="of clara is not right"),  # the first hop was not looked at
        Tried(dict.fromkeys(LOST, "none"), says="is not right"),
        Tried(LOST | {"ben": "nothing"}, says="none of: merge, export, none"),
        Tried({"anna": "export"}, says="the folders are those of"),
        Tried(["export", "none", "merge"], says="a dictionary is needed"),
    ],
}
