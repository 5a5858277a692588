"""The exercises of lesson 11: what makes a run faster, a packer, a packed batch in which chats see each other."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_helpers.course.exercises.asking import Exercise, choice
from qlora_helpers.training.packing import rows_for

__all__ = ["faster", "packer", "repacked"]

CHANGES = {
    "larger passes": ["larger pass", "more chats at once"],
    "packing": ["pack"],
    "compiling": ["compile", "compile_layers"],
    "fewer checkpointed layers": ["checkpoint fewer layers", "fewer layers"],
    "nothing": ["none", "none of these"],
}
# Each run, and the change that makes it faster.
_HELPS = {
    "A": "larger passes",  # the GPU waits for the CPU, which launches as many kernels for a little work as for much
    "B": "packing",  # most of what is computed is padding
    "C": "nothing",  # over before the compiler has paid, and there is no memory for anything else
    "D": "fewer checkpointed layers",  # the GPU works all the time, on passes that a full card would not need
}


def _faster(answer: Any) -> str:
    if not isinstance(answer, Mapping):
        return f"a dictionary is needed, with a change for each of {', '.join(_HELPS)}."
    if missing := [run for run in _HELPS if run not in answer]:
        return f"there is no change for {', '.join(missing)}."
    for run, right in _HELPS.items():
        if fault := choice(right, CHANGES)(answer[run]):
            return f"run {run}: {fault}"
    return ""


faster = Exercise(
    number="11.1",
    title="what makes it faster?",
    kind="predict",
    difficulty="medium",
    minutes=8,
    hints=(
        "ask of each run what its time is spent on: waiting, padding, work that is done twice, or a compiler.",
        "a busy GPU gains from less work, an idle one from more work at a time. And a change must pay within the run's own "
        "steps, and within its memory.",
    ),
    fault=_faster,
)


# ---- A packer


def _drawn(seed: int, count: int, most: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randint(1, most) for _ in range(count)]


_CASES = {
    "one chat": ([5], 8),
    "chats that fill a row each": ([8, 8, 8], 8),
    "pairs that fit exactly": ([3, 5, 6, 2, 7, 1], 8),
    "a long one and short ones": ([1, 1, 1, 60, 1, 1], 64),
    "more than two in a row": ([2, 2, 2, 2, 2, 2, 2, 2, 2], 6),
    "short ones first": ([1, 2, 3, 4, 5, 6, 7, 8], 9),
    "forty chats of any length": (_drawn(0, 40, 64), 64),
    "two hundred chats": (_drawn(1, 200, 100), 128),
}
# First-fit and best-fit decreasing, the usual ways, need the same number of rows in these cases.


def _packer(answer: Any) -> str:
    if not callable(answer):
        return "a function is needed, of lengths and the most tokens of a row."
    for name, (lengths, most) in _CASES.items():
        given = list(lengths)
        case = f"in the case “{name}” your function"
        try:
            rows = [[int(place) for place in row] for row in answer(given, most)]
        except TypeError as error:
            return f"{case} does not give rows of places: {error}."
        if given != lengths:
            return f"{case} changes the list that it is given: work on a copy."
        if fault := _fault_of_rows(rows, lengths, most):
            return f"{case} {fault}"
    return ""


def _fault_of_rows(rows: Sequence[Sequence[int]], lengths: Sequence[int], most: int) -> str:
    places = [place for row in rows for place in row]
    if strange := [place for place in places if not 0 <= place < len(lengths)]:
        return f"names chat {strange[0]}, and there are {len(lengths)}: a row has places in the list, not lengths."
    if twice := [place for place in places if places.count(place) > 1]:
        return f"puts chat {twice[0]} into more than one place."
    if missing := set(range(len(lengths))) - set(places):
        return f"puts chat {min(missing)} into no row."
    longest = max(sum(lengths[place] for place in row) for row in rows)
    if longest > most:
        return f"makes a row of {longest} tokens, where {most} are allowed."
    used = sum(1 for row in rows if row)
    if used < len(rows):
        return "gives an empty row."
    return "" if used <= len(rows_for(lengths, most)) else f"needs {used} rows, and fewer would do."


packer = Exercise(
    number="11.2",
    title="a packer",
    kind="build",
    difficulty="hard",
    minutes=20,
    hints=(
        "in which order do you take the chats? What is short finds room at the end; what is long does not.",
        "take the longest chat first, and put each into a row that has room for it; open a new row only if none has.",
    ),
    fault=_packer,
)


# ---- A packed batch in which chats see each other

_MOST_OFF = 1e-3  # of a loss: rounding is far below it, and a neighbour that is seen is far above


def _repacked(answer: Any, *, model: Any, chats: Sequence[Sequence[int]]) -> str:
    if not callable(answer):
        return "a function is needed, of chats."
    for name, some in {
        "two chats": chats[:2], "five chats": chats[:5], "one chat": chats[2:3], "the same chat twice": [chats[0]] * 2,
    }.items():  # fmt: skip
        case = f"in the case “{name}”"
        batch = answer([list(ids) for ids in some])
        if not isinstance(batch, Mapping) or not {"input_ids", "labels", "position_ids"} <= set(batch):
            return f"{case} a dictionary with input_ids, labels and position_ids is needed."
        if fault := _fault_of_batch(batch, some, model):
            return f"{case} {fault}"
    return ""


def _fault_of_batch(batch: Mapping[str, Any], chats: Sequence[Sequence[int]], model: Any) -> str:
    import torch

    tokens = [token for ids in chats for token in ids]
    if batch["input_ids"].flatten().tolist() != tokens:
        return "the row has not all tokens of the chats, in their order."
    labels = batch["labels"].flatten().tolist()
    if len(labels) != len(tokens) or any(
        label not in (-100, token) for label, token in zip(labels, tokens, strict=True)
    ):
        return "a label is neither its token nor -100."
    ends, start = [], 0
    for ids in chats:
        ends.append((start, start + len(ids)))
        start += len(ids)
    if any(labels[begin] != -100 for begin, _ in ends[1:]):
        return "the last token of a chat is trained to predict the first one of the next."
    if any(label == -100 for begin, end in ends for label in labels[begin + 1 : end]):
        return "tokens that should count have no label."
    with torch.no_grad():
        ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
        mask = batch["attention_mask"].to(model.device) if "attention_mask" in batch else None
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0].float()
        for number, (begin, end) in enumerate(ends, 1):
            ids = torch.tensor(tokens[begin:end], device=model.device)
            alone = model(input_ids=ids[None], use_cache=False).logits[0].float()
            losses = [torch.nn.functional.cross_entropy(x[:-1], ids[1:]).item() for x in (logits[begin:end], alone)]
            if abs(losses[0] - losses[1]) > _MOST_OFF:
                return f"chat {number} has a loss of {losses[0]:.3f} in the row and {losses[1]:.3f} alone: it is not alone in it."
    return ""


repacked = Exercise(
    number="11.3",
    title="chats that see each other",
    kind="run",
    difficulty="hard",
    minutes=20,
    hints=(
        "by what does transformers tell where a chat ends in a row? Print that of the broken batch, and look at the first token "
        "of the second chat.",
        "two things are wrong: position_ids must begin anew with each chat, and no label may ask for a chat's first token. An "
        "attention_mask with one entry per token undoes the first.",
    ),
    fault=_repacked,
)
