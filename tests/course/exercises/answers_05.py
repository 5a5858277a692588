"""Right and wrong answers to the exercises of lesson 5."""

from dataclasses import replace

import numpy as np
import torch

from qlora_helpers.course.exercises.lesson_05 import a_strange_run
from qlora_helpers.settings import Settings
from tests.course.exercises.tried import Tried

# ---- 5.1


def as_in_the_lesson(layers, checkpointed, tokens, hidden_size, per_token):
    return tokens * (checkpointed * 2 * hidden_size + max(layers - checkpointed, 1) * per_token)


def the_larger_moment(layers, checkpointed, tokens, hidden_size, per_token):
    inputs = checkpointed * tokens * hidden_size * 2
    on_the_way_back = inputs + tokens * per_token
    return max(inputs + (layers - checkpointed) * tokens * per_token, on_the_way_back)


def layer_by_layer(layers, checkpointed, tokens, hidden_size, per_token):
    size = 0
    for layer in range(layers):
        size += tokens * (2 * hidden_size if layer < checkpointed else per_token)
    return size if checkpointed < layers else size + tokens * per_token


def by_numpy(layers, checkpointed, tokens, hidden_size, per_token):
    kept = np.where(np.arange(layers) < checkpointed, 2 * hidden_size, per_token).sum()
    return tokens * (kept + (checkpointed == layers) * per_token)


def as_a_tensor(*numbers):
    return torch.tensor(float(as_in_the_lesson(*numbers)), dtype=torch.float64)


def nothing_at_work(layers, checkpointed, tokens, hidden_size, per_token):
    return tokens * (checkpointed * 2 * hidden_size + (layers - checkpointed) * per_token)


def always_one_at_work(layers, checkpointed, tokens, hidden_size, per_token):
    return tokens * (checkpointed * 2 * hidden_size + (layers - checkpointed + 1) * per_token)


def one_byte_each(layers, checkpointed, tokens, hidden_size, per_token):
    return tokens * (checkpointed * hidden_size + max(layers - checkpointed, 1) * per_token)


def of_one_token(layers, checkpointed, tokens, hidden_size, per_token):
    return checkpointed * 2 * hidden_size + max(layers - checkpointed, 1) * per_token


def in_gib(*numbers):
    return as_in_the_lesson(*numbers) / 2**30


# ---- 5.3

TUTORIAL = Settings(
    batch_size=8, accumulation=2, max_length=4096, rank=64, alpha=128, dropout=0.05,
    gradient_checkpointing=True, upcast_fp32=True, optimizer="adamw_torch", compute_dtype="bfloat16",
)  # fmt: skip
FITS = replace(TUTORIAL, batch_size=2, accumulation=8, upcast_fp32=False, optimizer="paged_adamw_8bit")


def fitted(says="", **changes) -> Tried:
    return Tried(replace(FITS, **changes), says, tutorial=TUTORIAL)


# ---- 5.4

CLAIMED, _ = a_strange_run()
WIDE = "upcast_fp32"

RIGHT = {
    "activations": [
        Tried(answer) for answer in (as_in_the_lesson, the_larger_moment, layer_by_layer, by_numpy, as_a_tensor)
    ],
    "saves_most": [
        Tried("no dropout"),
        Tried("No dropout"),
        Tried("no-dropout"),
        Tried(["no dropout"]),
        Tried(" no  dropout "),
    ],
    "make_it_fit": [
        fitted(),
        fitted(optimizer="adamw_torch"),
        fitted(optimizer="adamw_8bit"),
        fitted(batch_size=4, accumulation=4, activation_offloading=True),
        fitted(optimizer=None),
    ],
    "which_setting": [
        Tried({WIDE: True}),
        Tried(replace(CLAIMED, upcast_fp32=True)),
        Tried((WIDE, True)),
        Tried([WIDE, True]),
        Tried({WIDE: np.True_}),
    ],
}

WRONG = {
    "activations": [
        Tried(nothing_at_work, "all layers"),
        Tried(always_one_at_work, "no layer checkpointed"),
        Tried(one_byte_each, "half of the layers"),
        Tried(of_one_token, "no layer checkpointed"),
        Tried(in_gib, "no layer checkpointed"),
        Tried(4e9, "not a function"),
    ],
    "saves_most": [
        Tried("rank 4", "not right"),
        Tried("8 chats of 1,024 tokens", "not right"),
        Tried("states not paged", "not right"),
    ],
    "make_it_fit": [
        Tried(TUTORIAL, "more than the card has", tutorial=TUTORIAL),
        fitted("more than the card has", batch_size=4, accumulation=4),
        fitted("more than the card has", upcast_fp32=True),
        fitted("more than the card has", gradient_checkpointing=False),
        fitted("16 passes", batch_size=1, accumulation=16),
        fitted("from 8 chats", accumulation=4),
        fitted("rank is now 16", rank=16),
        fitted("dropout is now 0", dropout=0),
        fitted("max_length is now 2048", max_length=2048),
        Tried({"batch_size": 2}, "not Settings", tutorial=TUTORIAL),
    ],
    "which_setting": [
        Tried({"attention": "math"}, "would take 2.45 GiB"),
        Tried({"gradient_checkpointing": False}, "would take 15.20 GiB"),
        Tried({"optimizer": "adamw_torch"}, "would take"),
        Tried({"double_quant": False}, "would take"),
        Tried({"dropout": 0.5}, "would take"),
        Tried({"batch_size": 7}, "sure of batch_size"),
        Tried({"rank": 256}, "sure of rank"),
        Tried({"attention": "math", "dropout": 0.0}, "2 settings"),
        Tried({}, "0 settings"),
        Tried({"attention": "flash"}, "choose one of"),
        Tried({"upcast": True}, "has no"),
        Tried("attention", "not a dictionary"),
    ],
}
