"""Lesson 6's exercises: one adapter from two, a merge in two halves, and two adapters that do nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_helpers import evaluation
from qlora_helpers.adapters.files import CONFIG, WEIGHTS, read_adapter_config
from qlora_helpers.chats import Chat
from qlora_helpers.course.exercises.asking import Exercise, choice
from qlora_helpers.course.exercises.reading import raised, shown
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import NF4, dequantize, quantize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["adapters_without_effect", "one_of_two", "two_halves", "without_effect"]

# ---- 6.1

# name: the shape of the weight, both ranks, both scales
_PAIRS = {
    "two of rank 2": ((6, 8), (2, 2), (2.0, 2.0)),
    "ranks 1 and 4": ((7, 5), (1, 4), (2.0, 2.0)),
    "scales 2 and 0.25": ((16, 24), (4, 4), (2.0, 0.25)),
    "one of them subtracted": ((9, 9), (3, 2), (1.0, -1.0)),
}


def _pair(name: str) -> tuple:
    (outputs, inputs), ranks, scales = _PAIRS[name]
    dice = torch.Generator().manual_seed(len(name))
    arguments = []
    for rank, scale in zip(ranks, scales, strict=True):
        arguments += [torch.randn(rank, inputs, generator=dice), torch.randn(outputs, rank, generator=dice), scale]
    return tuple(arguments)


def _fault_of_one_of_two(answer: Callable[..., Any]) -> str:
    if not callable(answer):
        return f"your answer is {shown(answer)}, and not a function: give its name alone, without calling it."
    for name in _PAIRS:
        A_1, B_1, scale_1, A_2, B_2, scale_2 = _pair(name)
        case = f"in the case “{name}” your function"
        try:
            got = answer(*_pair(name))  # drawn anew: whatever it does to its arguments, those here stay
        except (Exception, SystemExit) as error:
            return raised(case, error)
        if not isinstance(got, tuple | list) or len(got) != 2:
            return f"{case} gives {shown(got)}, and not an A and a B."
        A, B = (torch.as_tensor(part, dtype=torch.float32) for part in got)
        if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0]:
            return (
                f"{case} gives an A of shape {tuple(A.shape)} and a B of shape {tuple(B.shape)}, which have no B @ A."
            )
        if (B.shape[0], A.shape[1]) != (B_1.shape[0], A_1.shape[1]):
            shape = (B.shape[0], A.shape[1])
            return f"{case} gives a B @ A of shape {shape}, which is not that of the layer's weight."
        if A.shape[0] > A_1.shape[0] + A_2.shape[0]:
            return f"{case} gives the rank {A.shape[0]}, which is more than both ranks together."
        wanted = scale_1 * B_1 @ A_1 + scale_2 * B_2 @ A_2
        off = (B @ A - wanted).abs().max().item()
        if not off <= 1e-4 * wanted.abs().max().item():
            return f"{case} gives a B @ A that is off by up to {off:.3g}."
    return ""


one_of_two = Exercise(
    number="6.1",
    title="one adapter from two",
    kind="build",
    difficulty="medium",
    minutes=15,
    hints=(
        "B @ A is a sum over the rank: of each column of B times the same row of A. What happens if A gets more rows?",
        "Stack the matrices (torch.cat) instead of adding them. The scales go into only one side.",
    ),
    fault=_fault_of_one_of_two,
)

# ---- 6.2


def _in_4_bits(weight: torch.Tensor) -> torch.Tensor:
    return dequantize(quantize(weight, NF4, 64, double_quant=True))


def _share_that_survives(decoded: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor], parts: int) -> float:
    """How much of a difference is in the weights after merging it into 4 bits in equal parts: 1 if all of it is."""
    kept = wished = 0.0
    for name, weight in decoded.items():
        start = now = _in_4_bits(weight)
        for _ in range(parts):
            now = _in_4_bits(now + deltas[name] / parts)
        kept += ((now - start) * deltas[name]).sum().item()
        wished += (deltas[name] ** 2).sum().item()
    return kept / wished


def _of_two_halves(decoded: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> str:
    at_once, in_halves = (_share_that_survives(decoded, deltas, parts) for parts in (1, 2))
    if math.isclose(at_once, in_halves, rel_tol=0.1):
        return "the same"
    return "more" if in_halves > at_once else "less"


two_halves = Exercise(
    number="6.2",
    title="merged in two halves",
    kind="predict",
    difficulty="medium",
    minutes=5,
    hints=(
        "A weight stays where it is if the difference is too small to reach the next value. What is half of it?",
        "Read the share that survives off the figure above, at a size between 1 and 1/4. That is what happens twice.",
    ),
    fault=choice(_of_two_halves, {"more": [], "less": ["fewer"], "the same": ["same", "about the same", "equal"]}),
)

# ---- 6.3

_ENOUGH = 0.85  # of the answers right; with the adapter as it was trained more than 0.9 are


def adapters_without_effect(folder: str | Path) -> tuple[Path, Path]:
    """Write two adapters that load and change no answer: one was saved before its run, one has a wrong alpha.

    Args:
        folder: gets the two folders `first` and `second`.

    Returns:
        Their paths.
    """
    first, second = (Path(folder) / name for name in ("first", "second"))
    for path in (first, second):
        shutil.copytree(data_path("adapters", "sentences"), path)
    dice = torch.Generator().manual_seed(6)
    tensors = load_file(first / WEIGHTS)
    for key, tensor in tensors.items():  # as PEFT starts: B is zero, and A is random
        width = tensor.shape[1] ** -0.5
        start = (2 * torch.rand(tensor.shape, generator=dice) - 1) * width
        tensors[key] = torch.zeros_like(tensor) if ".lora_B." in key else start
    save_file(tensors, first / WEIGHTS)
    config = read_adapter_config(second) | {"lora_alpha": 1}
    (second / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return first, second


def _fault_of_the_rescued(answer: Any, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> str:
    if not isinstance(answer, PeftModel):
        return f"your answer is {shown(answer)[:60]}, and not a model with an adapter, as load_adapter gives it."
    right = evaluation.exact_match(answer, tokenizer, chats)
    if right >= _ENOUGH:
        return ""
    return f"your model gets {round(right * len(chats))} of {len(chats)} answers right, and with `sentences` it was nine in ten."


without_effect = Exercise(
    number="6.3",
    title="adapters that do nothing",
    kind="run",
    difficulty="medium",
    minutes=15,
    hints=(
        "The difference is B @ A * alpha / rank. Look at each of its four parts, in both folders and in `sentences`.",
        "Where B is zero, no change of the config helps. Compare the other folder's describe() with that of `sentences`.",
    ),
    fault=_fault_of_the_rescued,
)
