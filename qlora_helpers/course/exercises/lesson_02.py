"""The exercises of lesson 2, NF4 against int4."""

from __future__ import annotations

from typing import Any

import torch

from qlora_helpers.course.exercises.asking import Exercise, function
from qlora_helpers.course.exercises.in_order import in_order
from qlora_helpers.quantize import INT3, INT4, INT4_SYMMETRIC, NF4, Codebook, dequantize, quantize

__all__ = ["better_scale", "changed_weights", "faulty_quantiser"]


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- 2.1

changed_weights = Exercise(
    number="2.1",
    title="what happens to the error?",
    kind="predict",
    difficulty="medium",
    minutes=5,
    hints=(
        "What does each change do to a block once it is divided by its absmax?",
        "Try each of the four on gaussian, and compare relative_error(changed, NF4, 64) with that of gaussian itself.",
    ),
    fault=in_order(
        ["the same", "the same", "smaller", "larger"],
        {"larger": ["more", "rises"], "smaller": ["less", "falls"], "the same": ["same", "stays", "stays the same"]},
    ),
)


# ---- 2.2

LEAST_GAIN = 0.02  # a search over four shares of the absmax gains more in each case


def _heavy_tailed() -> torch.Tensor:
    """Blocks with an outlier in every fourth of them."""
    blocks = _normal(3, 256, 64)
    blocks[::4, 5] *= 6
    return blocks


def _better_cases() -> dict[str, tuple[torch.Tensor, Codebook]]:
    return {
        "normal weights in NF4": (_normal(1, 512, 64), NF4),
        "normal weights in symmetric INT4": (0.02 * _normal(2, 512, 64), INT4_SYMMETRIC),
        "blocks with outliers in NF4": (_heavy_tailed(), NF4),
    }


def _root_mean_square(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def _decoded(answer: Any, blocks: torch.Tensor, values: torch.Tensor) -> torch.Tensor | str:
    """What codes and scales decode to, or what is wrong with them."""
    got = answer(blocks.clone(), values.clone())
    if not isinstance(got, tuple | list) or len(got) != 2:
        return f"gives {type(got).__name__}, and not codes and scales"
    codes, scales = (torch.as_tensor(part) for part in got)
    if codes.shape != blocks.shape or codes.dtype.is_floating_point or codes.dtype == torch.bool:
        return f"gives codes of shape {tuple(codes.shape)} and {codes.dtype}; they must be whole numbers, one for each weight"
    if codes.min() < 0 or codes.max() >= len(values):
        return f"gives codes from {codes.min()} to {codes.max()}, for {len(values)} values"
    if scales.numel() != len(blocks):
        return f"gives {scales.numel()} scales for {len(blocks)} blocks"
    return values[codes.long()] * scales.float().reshape(-1, 1)


def _fault_of_scale(answer: Any) -> str:
    if not callable(answer):
        return f"your answer is {answer!r}, and not a function."
    for case, (blocks, book) in _better_cases().items():
        decoded = _decoded(answer, blocks, book.values)
        if isinstance(decoded, str):
            return f"in the case “{case}” it {decoded}."
        plain = _root_mean_square(dequantize(quantize(blocks, book, 64, double_quant=False)) - blocks)
        error = _root_mean_square(decoded - blocks)
        if not error <= (1 - LEAST_GAIN) * plain:
            return f"in the case “{case}” its error is {error / plain:.3f} times that with the absmax."
    zeros = torch.zeros(2, 64)
    decoded = _decoded(answer, zeros, NF4.values)
    if isinstance(decoded, str):
        return f"in the case “blocks of zeros” it {decoded}."
    return "" if torch.equal(decoded, zeros) else "in the case “blocks of zeros” it does not give zeros back."


better_scale = Exercise(
    number="2.2",
    title="a better scale",
    kind="build",
    difficulty="hard",
    minutes=20,
    hints=(
        "Try a few scales for every block, each a share of its absmax, and keep the one with the least squared error.",
        "Loop over shares from 0.7 to 1. For each, quantise all blocks at once and sum the squared errors of each block; "
        "torch.where(error < best, new, old) then keeps what is better, block by block.",
    ),
    fault=_fault_of_scale,
)


# ---- 2.3


def _rounded(weight: torch.Tensor, values: torch.Tensor, block_size: int = 64) -> torch.Tensor:
    bits = (len(values) - 1).bit_length()
    return dequantize(quantize(weight, Codebook("asked for", bits, values), block_size, double_quant=False))


faulty_quantiser = Exercise(
    number="2.3",
    title="a faulty quantiser",
    kind="run",
    difficulty="medium",
    minutes=15,
    hints=(
        "Take one block, quantise it with round_to and with quantize, and look at where the two differ. There are two faults.",
        "What does the scale become if the weight that is largest in size is negative? And to which value does a weight go "
        "that lies just above another one?",
    ),
    fault=function(
        _rounded,
        cases={
            "weights that are all positive": (_normal(4, 16, 64).abs(), NF4.values),
            "a block whose largest weight is negative": (torch.cat([torch.tensor([-4.0]), _normal(5, 63)]), NF4.values),
            "normal weights": (_normal(6, 128, 64), NF4.values),
            "normal weights in INT4": (_normal(7, 32, 64), INT4.values),
            "a matrix in INT3, in blocks of 32": (_normal(8, 8, 96), INT3.values, 32),
        },
        rel=1e-5,
    ),
)
