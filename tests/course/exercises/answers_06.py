"""Right and wrong answers to lesson 6's exercises."""

import functools
import json
import tempfile

import numpy as np
import torch

from qlora_helpers.adapters.files import CONFIG, load_adapter, read_adapter_config
from qlora_helpers.chats import read_chats
from qlora_helpers.course.exercises.lesson_06 import adapters_without_effect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import NF4, dequantize, quantize
from tests.course.exercises.tried import Tried

# ---- 6.1


def stacked(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return torch.cat([A_1, A_2]), torch.cat([scale_1 * B_1, scale_2 * B_2], dim=1)


def scaled_in_A(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return [torch.cat([A_2 * scale_2, A_1 * scale_1]), torch.cat([B_2, B_1], 1)]


def by_numpy(A_1, B_1, scale_1, A_2, B_2, scale_2):
    A_1, B_1, A_2, B_2 = (tensor.numpy() for tensor in (A_1, B_1, A_2, B_2))
    return np.vstack([A_1, A_2]), np.hstack([scale_1 * B_1, scale_2 * B_2])


def by_svd(A_1, B_1, scale_1, A_2, B_2, scale_2):
    U, S, V = torch.linalg.svd(scale_1 * B_1 @ A_1 + scale_2 * B_2 @ A_2, full_matrices=False)
    rank = min(len(A_1) + len(A_2), len(S))
    return V[:rank], U[:, :rank] * S[:rank]


def in_place(A_1, B_1, scale_1, A_2, B_2, scale_2):
    B_1 *= scale_1
    B_2 *= scale_2
    return torch.cat([A_1, A_2], 0), torch.cat([B_1, B_2], -1)


def added(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return A_1 + A_2, scale_1 * B_1 + scale_2 * B_2


def without_scales(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return torch.cat([A_1, A_2]), torch.cat([B_1, B_2], dim=1)


def scaled_twice(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return torch.cat([scale_1 * A_1, scale_2 * A_2]), torch.cat([scale_1 * B_1, scale_2 * B_2], dim=1)


def the_sum_itself(A_1, B_1, scale_1, A_2, B_2, scale_2):
    delta = scale_1 * B_1 @ A_1 + scale_2 * B_2 @ A_2
    return delta, torch.eye(len(delta))


def turned_round(*arguments):
    return stacked(*arguments)[::-1]


def one_matrix(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return scale_1 * B_1 @ A_1 + scale_2 * B_2 @ A_2


def stacked_wrongly(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return torch.cat([A_1, A_2]), torch.cat([B_1, B_2])


# ---- 6.2


def weights_and_differences() -> dict[str, dict[str, torch.Tensor]]:
    """Decoded weights, and differences about as large beside them as a short run's."""
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=dice) / 12
    decoded = dequantize(quantize(weight, NF4, 64, double_quant=True))
    return {"decoded": {"layer": decoded}, "deltas": {"layer": torch.randn(64, 128, generator=dice) / 100}}


HALVES = weights_and_differences()

# ---- 6.3


class Loaded(Tried):
    """A model that is loaded when it is asked about, and not when this file is read."""

    def __init__(self, make, says: str = ""):
        self.make, self.says = make, says

    def __repr__(self) -> str:
        return f"Loaded({self.make.__name__})"

    @property
    def answer(self):
        return self.make()

    @property
    def given(self) -> dict:
        return asked()


@functools.cache
def asked() -> dict:
    return {"tokenizer": load_tokenizer(), "chats": read_chats(data_path("chats", "test.jsonl"))[:20]}


def second_with(**changes):
    """The second folder's adapter on a fresh base, with other values in its config."""
    with tempfile.TemporaryDirectory() as folder:
        _, second = adapters_without_effect(folder)
        config = json.dumps(read_adapter_config(second) | changes)
        (second / CONFIG).write_text(config, encoding="utf-8")
        return load_adapter(load_model(), second)


@functools.cache
def mended():
    return second_with(lora_alpha=32)


@functools.cache
def mended_by_a_fraction():
    return second_with(lora_alpha=32.0)


@functools.cache
def mended_by_another_scale():
    return second_with(lora_alpha=8, use_rslora=True)  # alpha / sqrt(rank) is 2, too


@functools.cache
def as_it_came():
    return second_with()


@functools.cache
def alpha_of_the_rank():
    return second_with(lora_alpha=16)


@functools.cache
def the_other_one():
    with tempfile.TemporaryDirectory() as folder:
        first, _ = adapters_without_effect(folder)
        return load_adapter(load_model(), first)


RIGHT = {
    "one_of_two": [Tried(answer) for answer in (stacked, scaled_in_A, by_numpy, by_svd, in_place)],
    "two_halves": [Tried(answer, **HALVES) for answer in ("less", "Less", " LESS ", ["less"], "fewer")],
    "without_effect": [Loaded(mended), Loaded(mended_by_a_fraction), Loaded(mended_by_another_scale)],
}
WRONG = {
    "one_of_two": [
        Tried(added, says="in the case “two of rank 2” your function gives a B @ A that is off by"),
        Tried(without_scales, says="off by"),
        Tried(scaled_twice, says="off by"),
        Tried(the_sum_itself, says="gives the rank 6, which is more than both ranks together"),
        Tried(turned_round, says="which have no B @ A"),
        Tried(stacked_wrongly, says="a B of shape (12, 2), which have no B @ A"),
        Tried(one_matrix, says="and not an A and a B"),
        Tried(3.0, says="and not a function"),
    ],
    "two_halves": [Tried(answer, says="is not right", **HALVES) for answer in ("more", "the same", "about the same")],
    "without_effect": [
        Loaded(as_it_came, says="gets 0 of 20 answers right"),
        Loaded(alpha_of_the_rank, says="of 20 answers right"),
        Loaded(the_other_one, says="gets 0 of 20 answers right"),
    ],
}
