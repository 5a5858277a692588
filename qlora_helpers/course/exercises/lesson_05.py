"""The exercises of lesson 5: activations with some layers checkpointed, what saves most, a run to fit, a run to explain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from qlora_helpers.course.exercises.asking import Exercise, choice, function
from qlora_helpers.course.exercises.reading import shown
from qlora_helpers.memory import find_shape, predict
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.units import GIB

__all__ = ["a_strange_run", "activations", "make_it_fit", "saves_most", "which_setting"]

_NAMES = tuple(field.name for field in fields(Settings))

# ---- 5.1


def _activations(layers: int, checkpointed: int, tokens: int, hidden_size: int, per_token: int) -> int:
    inputs = checkpointed * tokens * hidden_size * 2
    return inputs + max(layers - checkpointed, 1) * tokens * per_token


activations = Exercise(
    number="5.1",
    title="some layers checkpointed",
    kind="build",
    difficulty="medium",
    minutes=10,
    hints=(
        "Add what the checkpointed layers keep, their inputs of 2 bytes each, and what the other layers keep.",
        "When the first of the checkpointed layers is computed again, is what the other layers kept still there? And what "
        "if there are no other layers?",
    ),
    fault=function(
        _activations,
        {
            "no layer checkpointed": (32, 0, 1024, 4096, 260_000),
            "half of the layers": (32, 16, 8192, 4096, 260_000),
            "all but one": (28, 27, 2048, 1536, 130_000),
            "all layers": (32, 32, 8192, 4096, 260_000),
            "a model of one layer, checkpointed": (1, 1, 64, 128, 9_000),
        },
    ),
)

# ---- 5.2

saves_most = Exercise(
    number="5.2",
    title="a cheap gibibyte",
    kind="predict",
    difficulty="medium",
    minutes=5,
    hints=(
        "What is trained is small. What grows with the tokens is not.",
        "One of the four changes nothing at all, since only a product counts. Of the others, find the one that is a term of "
        "kept_per_token.",
    ),
    fault=choice("no dropout", ("rank 4", "no dropout", "8 chats of 1,024 tokens", "states not paged")),
)

# ---- 5.3

MOST_PASSES = 8
LEAST_SPARE = 1  # GiB
_FIXED = (
    "method",
    "max_length",
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "compute_dtype",
    "learning_rate",
    "seed",
)


def _fits_and_learns_the_same(mine: Any, tutorial: Settings) -> str:
    """What is wrong with settings for Qwen2.5-14B on an RTX 4090."""
    if not isinstance(mine, Settings):
        return f"your answer is {shown(mine)}, and not Settings."
    for name in _FIXED:
        if getattr(mine, name) != getattr(tutorial, name):
            return f"{name} is now {getattr(mine, name)!r}: the run would not learn the same."
    chats, wanted = (settings.batch_size * settings.accumulation for settings in (mine, tutorial))
    if chats != wanted:
        return f"a step would learn from {chats} chats (batch_size times accumulation), and not from as many as before."
    prediction = predict(find_shape("Qwen/Qwen2.5-14B"), replace(mine, memory_budget=None), "4090")
    takes, spare = prediction.device_bytes / GIB, prediction.spare_bytes / GIB
    if spare < 0:
        return f"it would take {takes:,.1f} GiB, which is {-spare:,.1f} GiB more than the card has."
    if spare < LEAST_SPARE:
        return f"it would take {takes:,.1f} GiB, which leaves {spare:.2f} GiB: too little to be sure."
    if mine.accumulation > MOST_PASSES:
        return f"it would fit, in {takes:,.1f} GiB, but a step would take {mine.accumulation} passes through the model."
    return ""


make_it_fit = Exercise(
    number="5.3",
    title="make it fit",
    kind="run",
    difficulty="medium",
    minutes=10,
    hints=(
        "Look at the figure of what each setting costs: which costly ones does the tutorial have?",
        'Undo what is costly one by one, and print predict(target, mine, "4090").device_bytes / GIB each time. The chats of '
        "a step stay the same if batch_size falls as accumulation rises.",
    ),
    fault=_fits_and_learns_the_same,
)

# ---- 5.4

_STRANGE = "qwen2.5-1.5b qlora fp16 r16 4x1024 ckpt paged_adamw_8bit float32-adapters upcast"
_CLAIMED = replace(
    GPU_RUN, batch_size=4, max_length=1024, rank=16, compute_dtype="float16", optimizer="paged_adamw_8bit"
)
_CERTAIN = ("method", "batch_size", "accumulation", "max_length", "rank", "compute_dtype")
_NEAR = 0.03


def a_strange_run() -> tuple[Settings, int]:
    """What was said of a measured run of Qwen2.5-1.5B, and its measured peak in bytes."""
    rows = json.loads(data_path("measured", "memory.json").read_text(encoding="utf-8"))["rows"]
    (row,) = [row for row in rows if row["label"] == _STRANGE]
    return _CLAIMED, row["peak_allocated_bytes"]


def _explains_the_peak(cause: Any) -> str:
    """What is wrong with a change of one setting that is to explain the strange run."""
    claimed, peak = a_strange_run()
    if isinstance(cause, Settings):
        said = asdict(claimed)
        changes = {name: value for name, value in asdict(cause).items() if value != said[name]}
    elif isinstance(cause, Mapping):
        changes = dict(cause)
    elif isinstance(cause, Sequence) and not isinstance(cause, str) and len(cause) == 2:
        changes = {cause[0]: cause[1]}
    else:
        return f"your answer is {shown(cause)}, and not a dictionary with a setting and its value."
    unknown = [name for name in changes if name not in _NAMES]
    if unknown:
        return f"Settings has no {shown(unknown[0])}."
    if len(changes) != 1:
        return f"you changed {len(changes)} settings, and one was not as claimed."
    (name,) = changes
    if name in _CERTAIN:
        return f"the owner is sure of {name}."
    run = replace(claimed, **changes)  # a value that is not allowed is named by Settings
    takes = predict(find_shape("Qwen/Qwen2.5-1.5B"), run, "h200").peak_allocated_bytes
    if abs(takes / peak - 1) <= _NEAR:
        return ""
    return f"with {name}={changes[name]!r} the run would take {takes / GIB:.2f} GiB, and it took {peak / GIB:.2f}."


which_setting = Exercise(
    number="5.4",
    title="which setting was it?",
    kind="run",
    difficulty="hard",
    minutes=15,
    hints=(
        'For each candidate, print predict(small, replace(claimed, ...), "h200").peak_allocated_bytes / GIB.',
        "The measured peak lies more than a GiB above the prediction. In the figure of what each setting costs only a few cost "
        "so much, and one of these comes from a single line that many tutorials have.",
    ),
    fault=_explains_the_peak,
)
