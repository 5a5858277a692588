"""The exercises of lesson 3, double quantisation."""

from __future__ import annotations

from typing import Any

import torch

from qlora_helpers.course.exercises.asking import Exercise, number
from qlora_helpers.course.exercises.in_order import in_order
from qlora_helpers.quantize import NF4, quantize

__all__ = ["fixed_cost", "from_bytes", "tables"]

# ---- 3.1

tables = Exercise(
    number="3.1",
    title="two tables for the scales",
    kind="predict",
    difficulty="medium",
    minutes=5,
    hints=(
        "Where between -1 and 1 do the scales of a block of 256 lie, in each of the two matrices?",
        "How far apart are neighbouring values of each table near 1, near 0.3, and near 0.001?",
    ),
    fault=in_order(["equal steps", "dynamic"], {"dynamic": [], "equal steps": ["equal", "equal step"]}),
)


# ---- 3.2


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _cases() -> dict[str, tuple[torch.Tensor, str, int]]:
    """Weights, the format, and the block size."""
    return {
        "a matrix of 256 full blocks": (_normal(1, 128, 128), "nf4", 64),
        "a matrix of 300 blocks, whose second group of scales is not full": (0.02 * _normal(2, 150, 128), "nf4", 64),
        "a matrix in FP4": (_normal(3, 64, 64), "fp4", 64),
        "blocks of 128 weights": (3 * _normal(4, 64, 640), "nf4", 128),
        "a single block": (_normal(5, 1, 64), "nf4", 64),
    }


def _fault_of_decoding(answer: Any) -> str:
    import bitsandbytes.functional as bnb

    if not callable(answer):
        return f"your answer is {answer!r}, and not a function."
    for case, (weight, kind, block_size) in _cases().items():
        packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=kind, compress_statistics=True)
        want = bnb.dequantize_4bit(packed, state)
        got = answer(packed.clone(), state)
        if not isinstance(got, torch.Tensor):
            return f"in the case “{case}” it gives {type(got).__name__}, and not a tensor."
        if got.shape != want.shape:
            return f"in the case “{case}” it gives the shape {tuple(got.shape)} for a weight of {tuple(weight.shape)}."
        wrong = ~torch.isclose(got.float(), want, rtol=1e-5, atol=1e-8)
        if wrong.any():
            first = int(wrong.flatten().nonzero()[0])
            return f"in the case “{case}” {int(wrong.sum()):,} of {want.numel():,} weights are wrong, the first at {first:,}."
    return ""


from_bytes = Exercise(
    number="3.2",
    title="a weight from its bytes",
    kind="build",
    difficulty="hard",
    minutes=20,
    hints=(
        "First the scales: table[code] * absmax of its group + offset. The group of a scale is its number // 256.",
        "Then the codes: packed >> 4 is the first of each byte and packed & 15 the second, in turns (torch.stack, then "
        "flatten). Look each up in state.code, and multiply by the scale of its block.",
    ),
    fault=_fault_of_decoding,
)


# ---- 3.3


def _added() -> int:
    """The bytes that double quantisation adds to a matrix whatever its size: the table of the second level, the offset."""
    nested = quantize(torch.ones(64), NF4, 64, double_quant=True).nested
    return nested.values.nbytes + nested.offset.nbytes


def _fewest() -> int:
    """The fewest weights in full blocks with which double quantisation saves bytes."""
    blocks = 1
    while 4 * blocks <= blocks + 4 * -(-blocks // 256) + _added():
        blocks += 1
    return 64 * blocks


def _fault_of_cost(answer: Any) -> str:
    if not isinstance(answer, list | tuple) or len(answer) != 2:
        return f"your answer is {answer!r}, where bytes_added and fewest_weights are asked for."
    for name, one, want in zip(("bytes_added", "fewest_weights"), answer, (_added(), _fewest()), strict=True):
        if fault := number(want)(one):
            return f"{name}: {fault}"
    return ""


fixed_cost = Exercise(
    number="3.3",
    title="where did the saving go?",
    kind="run",
    difficulty="medium",
    minutes=15,
    hints=(
        "Compare what a layer's quant_state holds in both models: which tensors grow with the matrix, and which do not?",
        "The second level has a table of its own, and something else that there is once per matrix. For the second question, "
        "try one size after the other: quantize(torch.ones(count), double_quant=...).nbytes.",
    ),
    fault=_fault_of_cost,
)
