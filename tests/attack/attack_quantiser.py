"""Weights of any size, shape and kind through the quantiser, against bitsandbytes on this CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers.quantize import Codebook, dequantize, quantize
from tests.test_quantize import BLOCK_SIZES, CODEBOOKS, DTYPES, assert_equal_to_bitsandbytes

KINDS = ("normal", "uniform", "sparse", "of many sizes", "equal", "with ties")


@pytest.fixture(autouse=True)
def no_compilation():
    with torch._dynamo.config.patch(disable=True):
        yield


def made(kind: str, shape: tuple[int, ...], exponent: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A weight of a kind, times 10**exponent, as far as its dtype reaches."""
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=chance, dtype=torch.float64)
    uniform = torch.rand(shape, generator=chance, dtype=torch.float64)
    if kind == "uniform":
        weight = 2 * uniform - 1
    elif kind == "sparse":
        weight = weight * (uniform < 0.1)
    elif kind == "of many sizes":
        weight = weight * 10 ** (60 * uniform - 30)
    elif kind == "equal":
        weight = torch.full(shape, 1.0, dtype=torch.float64) * (-1) ** seed
    elif kind == "with ties":
        weight = torch.round(64 * (2 * uniform - 1)) / 64
    most = torch.finfo(dtype).max
    return (weight * 10.0**exponent).clamp(-most, most).to(dtype)


SHAPES = st.lists(st.integers(1, 8), max_size=2).flatmap(
    lambda first: (st.integers(1, 600) | st.integers(1, 40).map(lambda rows: 16 * rows)).map(
        lambda last: (*first, last)
    )
)


def attack_weights(tries):
    """Packed bytes, scales and decoded values of the quantiser, against bitsandbytes."""

    @settings(max_examples=5_000)
    @given(
        st.sampled_from(KINDS), SHAPES, st.floats(-45, 38.5), st.sampled_from(DTYPES), st.integers(0, 2**31),
        st.sampled_from(list(CODEBOOKS)), st.sampled_from(BLOCK_SIZES), st.booleans(),
    )  # fmt: skip
    def attack(kind, shape, exponent, dtype, seed, quant_type, block_size, double_quant):
        weight = made(kind, shape, exponent, dtype, seed)
        try:
            quantize(weight, CODEBOOKS[quant_type], block_size, double_quant)
        except ValueError as error:
            assert "the mean of the scales overflows float32" in str(error)
            tries["refused: the scales' mean overflows"] += 1
            return
        assert_equal_to_bitsandbytes(weight, quant_type, block_size, double_quant)
        tries["equal"] += 1

    attack()


WITHIN = st.floats(-1, 1, width=32)
VALUES = st.lists(WITHIN, max_size=300) | st.lists(WITHIN, min_size=2, max_size=16) | st.lists(st.floats(width=32))


def attack_codebooks(tries):
    """Codebooks of any values and number of bits: packed right, or refused."""

    @settings(max_examples=3_000)
    @given(st.integers(1, 8) | st.integers(-1, 10), VALUES, st.integers(1, 200), st.integers(0, 2**31))
    def attack(bits, values, length, seed):
        try:
            codebook = Codebook("made up", bits, torch.tensor(values, dtype=torch.float32))
        except ValueError:
            assert (
                not 1 <= bits <= 8 or not 2 <= len(values) <= 2**bits or not all(-1 <= value <= 1 for value in values)
            )
            tries["refused"] += 1
            return
        quantized = quantize(made("normal", (length,), 0, torch.float32, seed), codebook)
        packed = quantized.packed
        unpacked = packed if bits > 4 else torch.stack([packed >> 4, packed & 15], 1).flatten()[:length]
        assert torch.equal(unpacked, quantized.codes)
        assert torch.isfinite(dequantize(quantized)).all()
        tries["packed right"] += 1

    attack()
