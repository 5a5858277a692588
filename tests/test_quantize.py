"""qlora_helpers.quantize is bit-identical to bitsandbytes on a CPU, but for two roundings of its compiled code."""

import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.cextension import lib

from qlora_helpers.quantize import (
    FP4,
    INT3,
    INT4,
    INT4_SYMMETRIC,
    NF4,
    Codebook,
    dequantize,
    dynamic_map_values,
    quantize,
)
from tests import ROOT

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # all that bitsandbytes takes
CODEBOOKS = {"nf4": NF4, "fp4": FP4}
# 1-D, 3-D, odd sizes, less than one block, full blocks alone, a partial last block, blocks across row ends
SHAPES = ((1,), (5,), (4096,), (4097,), (3, 5, 7), (2, 64, 96), (7, 9), (130, 62), (64, 4096))


@pytest.fixture(autouse=True)
def no_compilation():
    """bitsandbytes recompiles its dequantisation for each odd shape, for seconds; uncompiled it is the same code."""
    with torch._dynamo.config.patch(disable=True):
        before = dict(torch._dynamo.utils.counters["frames"])
        yield
    assert torch._dynamo.utils.counters["frames"] == before, "it was compiled anyway"


def gaussian(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_shape(draw):
    """One to three dimensions; half of the last ones are multiples of 16, which have their own code path."""
    last = draw.choice((draw.randint(1, 600), 16 * draw.randint(1, 40)))
    return (*(draw.randint(1, 7) for _ in range(draw.randint(0, 2))), last)


def torch_values(packed, state):
    """What bitsandbytes decodes by its own torch code."""
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return _dequantize_4bit_compute(packed.flatten(), absmax, state.code, state.blocksize, state.shape, state.dtype)


# the two cases in which bitsandbytes' compiled code rounds otherwise than its torch code; each has a test below
TIES_AWAY_FROM_ZERO = lib.compiled_with_cuda  # float16, in a CUDA build
TINY_BECOMES_ZERO = bnb.has_avx512bf16() and not lib.compiled_with_cuda  # bfloat16, in the CPU build
SMALLEST_NORMAL = 2.0**-126


def bitsandbytes_values(packed, state):
    """What bitsandbytes decodes, by its own torch code where its compiled code is wrong or rounds differently.

    It is wrong for the shapes of fault B of qlora_helpers.models.cpu_faults. It takes a weight of one byte for a transposed
    one, and fails if that has three dimensions.
    """
    wanted = torch_values(packed, state)
    fault_b = state.shape[-1] % 16 == 0 and state.shape[-1] % state.blocksize
    if fault_b or len(packed) == 1 or (state.dtype == torch.float16 and TIES_AWAY_FROM_ZERO):
        return wanted
    compiled = bnb.dequantize_4bit(packed, state)
    if state.dtype == torch.bfloat16 and TINY_BECOMES_ZERO:
        tiny = (wanted.abs() <= SMALLEST_NORMAL).reshape(compiled.shape)
        return torch.where(tiny, wanted.reshape(compiled.shape), compiled)
    return compiled


def bits(tensor):
    """The bytes of a tensor, which unlike its values tell 0.0 from -0.0."""
    return tensor.reshape(-1).view(torch.uint8)


def assert_equal_to_bitsandbytes(weight, quant_type, block_size, double_quant):
    case = f"{quant_type}, {weight.dtype}, shape {tuple(weight.shape)}, block {block_size}, double_quant {double_quant}"
    ours = quantize(weight, CODEBOOKS[quant_type], block_size, double_quant)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
    )
    pairs = [("packed bytes", ours.packed, packed.flatten()), ("absmax", ours.absmax, state.absmax)]
    assert (ours.nested is not None) == double_quant == state.nested
    if double_quant:
        pairs += [
            ("second-level absmax", ours.nested.absmax, state.state2.absmax),
            ("offset", ours.nested.offset, state.offset),
            ("8-bit codebook", ours.nested.values, state.state2.code),
        ]
    # bitsandbytes returns a 1-D weight as (1, n)
    decoded, wanted = dequantize(ours), bitsandbytes_values(packed, state).reshape(weight.shape)
    if quant_type == "fp4":  # FP4 has two zeros, and bitsandbytes' code paths disagree on the sign of the second
        decoded, wanted = decoded + 0.0, wanted + 0.0
    for what, got, want in (*pairs, ("decoded values", decoded, wanted)):
        assert got.dtype == want.dtype and got.shape == want.shape, f"dtype or shape of {what} differ: {case}"
        assert torch.equal(bits(got), bits(want)), f"{what} differ: {case}"


# Equality with bitsandbytes: every test with "exact" in its name runs again without AVX512 (see below).


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_exact_on_random_shapes(block_size, quant_type, double_quant):
    draw = random.Random(f"{block_size} {quant_type} {double_quant}")
    for seed in range(12):
        weight = gaussian(*random_shape(draw), dtype=draw.choice(DTYPES), seed=seed)
        assert_equal_to_bitsandbytes(weight, quant_type, block_size, double_quant)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_each_kind_of_shape(dtype, shape):
    for quant_type in CODEBOOKS:
        assert_equal_to_bitsandbytes(gaussian(*shape, dtype=dtype), quant_type, 64, double_quant=True)


def with_zeros(first, last):
    weight = gaussian(96, 130)
    weight.view(-1)[first:last] = 0
    return weight


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.zeros(64, 64), id="all zero"),
        pytest.param(torch.zeros(65, 65), id="all zero, with a partial block"),
        pytest.param(with_zeros(128, 8192), id="blocks of zeros"),
        pytest.param(with_zeros(12288, 12480), id="last blocks of zeros"),
        pytest.param(torch.full((64, 64), -0.3), id="all equal"),
        pytest.param(torch.full((65, 65), 0.3), id="all equal, with a partial block"),
        pytest.param(gaussian(96, 130) * 1e-38, id="absmax near the smallest"),
        pytest.param(gaussian(96, 130) * 1e-41, id="denormal"),
        pytest.param(torch.arange(-64, 64).div(64).repeat(32), id="many ties"),
        pytest.param(gaussian(96, 130).mul(1e4).half(), id="large float16"),
    ],
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_exact_on_unusual_weights(weight, double_quant):
    for quant_type in CODEBOOKS:
        for block_size in (32, 64, 2048):
            assert_equal_to_bitsandbytes(weight, quant_type, block_size, double_quant)


def test_exact_with_more_than_one_second_level_block():
    weight = gaussian(300, 65)  # 305 blocks: a full second-level block of 256 and a partial one
    assert len(quantize(weight).nested.absmax) == 2
    assert_equal_to_bitsandbytes(weight, "nf4", 64, double_quant=True)


def test_exact_on_values_next_to_every_boundary():
    for quant_type, codebook in CODEBOOKS.items():
        ordered = codebook.values.sort().values
        midpoints = (ordered[:-1] + ordered[1:]) / 2
        steps = [midpoints.nextafter(torch.tensor(direction)) for direction in (-2.0, 2.0)]
        weight = torch.cat([torch.ones(1), midpoints, *steps, torch.zeros(18)])  # one block with absmax 1
        assert_equal_to_bitsandbytes(weight, quant_type, 64, double_quant=False)


def test_exact_on_random_weights_of_any_size():
    """A sample of tests/attack/test_quantiser.py: from 1e-45, where float32 ends, to its largest."""
    draw = random.Random(0)
    compared = 0
    for seed in range(400):
        dtype, shape = draw.choice(DTYPES), random_shape(draw)
        weight = gaussian(*shape, dtype=torch.float64, seed=seed) * 10.0 ** draw.uniform(-45, 38.5)
        if draw.random() < 0.3:  # several sizes within a block
            weight = weight * 10.0 ** torch.empty(shape).uniform_(-30, 0, generator=torch.Generator().manual_seed(seed))
        weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        quant_type, block_size, double_quant = (
            draw.choice(list(CODEBOOKS)),
            draw.choice(BLOCK_SIZES),
            draw.random() < 0.5,
        )
        if double_quant and not torch.isfinite(
            quantize(weight, block_size=block_size, double_quant=False).absmax.mean()
        ):
            continue
        assert_equal_to_bitsandbytes(weight, quant_type, block_size, double_quant)
        compared += 1
    assert compared > 380


@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_exact_float16_but_for_ties_in_a_cuda_build(quant_type, size):
    """Whatever the compiled code of a CUDA build decodes otherwise lies halfway between two float16 numbers."""
    weight = gaussian(512, 512, dtype=torch.float16) * size
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    compiled = bnb.dequantize_4bit(packed, state)
    ours = quantize(weight, CODEBOOKS[quant_type], 64, double_quant=False)
    decoded, exact = dequantize(ours), dequantize(replace(ours, dtype=torch.float32)).double()
    other = compiled != decoded
    assert not other.any() or TIES_AWAY_FROM_ZERO
    assert torch.equal((compiled[other] - exact[other]).abs(), (decoded[other] - exact[other]).abs())
    assert (compiled[other].abs() > decoded[other].abs()).all()


@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("size", [3e-38, 1e-38, 1e-39])
def test_exact_bfloat16_but_for_numbers_below_the_smallest_normal_on_avx512_bf16(quant_type, size):
    """The processor's instruction for the conversion takes them for zero."""
    weight = (gaussian(64, 64) * size).bfloat16()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    compiled = bnb.dequantize_4bit(packed, state)
    ours = quantize(weight, CODEBOOKS[quant_type], 64, double_quant=False)
    decoded, exact = dequantize(ours), dequantize(replace(ours, dtype=torch.float32))
    tiny = exact.abs() < SMALLEST_NORMAL
    assert (decoded[tiny] != 0).any()
    assert torch.equal(decoded, torch_values(packed, state))
    assert torch.equal(compiled, torch.where(tiny, 0, decoded) if TINY_BECOMES_ZERO else decoded)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="runs without AVX512 anyway")
def test_the_same_holds_without_avx512():
    script = (
        "import sys, pytest, torch; capability = torch.backends.cpu.get_cpu_capability();"
        "assert capability == 'AVX2', capability;"
        f"sys.exit(pytest.main([{__file__!r}, '-q', '-k', 'exact', '-o', 'addopts=', '-p', 'no:cacheprovider']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


# Codebooks


@pytest.mark.parametrize("quant_type", CODEBOOKS)
def test_4_bit_codebook_is_that_of_bitsandbytes(quant_type):
    assert torch.equal(CODEBOOKS[quant_type].values, bnb.get_4bit_type(quant_type, device="cpu"))


def test_8_bit_codebook_is_that_of_bitsandbytes():
    assert torch.equal(dynamic_map_values(), bnb.create_dynamic_map())


@pytest.mark.parametrize("codebook", [NF4, FP4, INT4, INT4_SYMMETRIC, INT3], ids=repr)
def test_codebook_fits_its_bits_and_reaches_one(codebook):
    assert len(codebook.values) <= 2**codebook.bits
    assert codebook.values.abs().max() == 1


def made_up(count: int) -> torch.Tensor:
    return torch.linspace(-1, 1, count)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_codebook_of_any_number_of_bits_packs_every_code(bits):
    """Up to 4 bits two codes share a byte, beyond that each has one: unpacked, the codes are there again."""
    codebook = Codebook("mine", bits, made_up(2**bits))
    weight = gaussian(7, 65)  # odd
    quantized = quantize(weight, codebook)
    assert set(quantized.codes.unique().tolist()) <= set(range(2**bits)) and quantized.codes.max() == 2**bits - 1
    packed = quantized.packed
    unpacked = packed if bits > 4 else torch.stack([packed >> 4, packed & 15], 1).flatten()
    assert torch.equal(unpacked[: weight.numel()], quantized.codes.flatten())
    stored = [packed, quantized.absmax, codebook.values, *vars(quantized.nested).values()]
    assert quantized.nbytes == sum(part.nbytes for part in stored)
    scaled = weight.flatten() / quantize(weight, codebook, double_quant=False).scales().repeat_interleave(64)[:455]
    errors = (codebook.values[quantized.codes.flatten().int()] - scaled).abs()
    assert errors.max() <= 1 / (2**bits - 1) + 1e-6  # half a step


def test_the_dynamic_8_bit_codebook_can_quantise_weights():
    weight = gaussian(64, 64)
    quantized = quantize(weight, Codebook("dynamic", 8, dynamic_map_values()), double_quant=False)
    theirs, state = bnb.quantize_blockwise(weight, code=bnb.create_dynamic_map(), blocksize=64)
    assert torch.equal(quantized.absmax, state.absmax)
    assert (quantized.packed.view(64, 64) != theirs).float().mean() < 0.01  # it looks codes up in a table


@pytest.mark.parametrize(
    ("bits", "values", "fault"),
    [
        (0, made_up(2), "bits=0: must be a whole number, 1 to 8"),
        (9, made_up(300), "bits=9: must be a whole number, 1 to 8"),
        (True, made_up(2), "bits=True: must be a whole number"),
        (4.0, made_up(16), "bits=4.0: must be a whole number"),
        (8, made_up(257), r"values has the shape \(257,\): a codebook of 8 bits is a row of 2 to 256 values"),
        (4, made_up(17), r"values has the shape \(17,\): a codebook of 4 bits is a row of 2 to 16 values"),
        (4, made_up(1), r"values has the shape \(1,\)"),
        (4, torch.empty(0), r"values has the shape \(0,\)"),
        (4, made_up(16).view(4, 4), r"values has the shape \(4, 4\)"),
        (4, torch.tensor([-1.0, float("nan"), 1.0]), "values has nan: each must lie between -1 and 1"),
        (4, torch.tensor([-1.0, float("inf")]), "values has inf: each must lie"),
        (4, torch.tensor([-1.0, 1.5]), "values has 1.5: each must lie"),
        (4, made_up(16).double(), r"values is of torch\.float64 on cpu: pass a tensor of float32"),
        (4, torch.empty(16, device="meta"), r"values is of torch\.float32 on meta"),
        (4, [-1.0, 1.0], "values is list: pass a tensor"),
    ],
)
def test_a_codebook_that_no_code_can_hold_is_refused(bits, values, fault):
    with pytest.raises(ValueError, match=fault):
        Codebook("mine", bits, values)


def test_a_codebook_may_be_in_any_order_and_repeat_itself():
    shuffled = made_up(16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    weight = gaussian(64, 64)
    for values in (shuffled, torch.cat([made_up(8), made_up(8)])):
        once = quantize(weight, Codebook("sorted", 4, values.unique()))
        assert torch.equal(dequantize(quantize(weight, Codebook("mine", 4, values))), dequantize(once))


# What a format costs


@pytest.mark.parametrize(
    ("codebook", "double_quant", "bits"),
    [(NF4, False, 4.5), (NF4, True, 4.12695), (FP4, True, 4.12695), (INT3, False, 3.5), (INT3, True, 3.12695)],
)
def test_bits_per_parameter_of_a_large_weight(codebook, double_quant, bits):
    assert quantize(gaussian(1024, 1024), codebook, 64, double_quant).bits_per_parameter == pytest.approx(
        bits, abs=1e-5
    )


def test_bytes_are_those_that_bitsandbytes_stores():
    weight = gaussian(513, 65)  # odd: the last byte is half used, and the last block is partial
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert quantize(weight).nbytes == sum(part.nbytes for part in parts)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert quantize(weight, double_quant=False).nbytes == sum(
        part.nbytes for part in (packed, state.absmax, state.code)
    )


def relative_error(weight, codebook):
    decoded = dequantize(quantize(weight, codebook, 64, double_quant=False))
    return ((decoded - weight).square().mean() / weight.square().mean()).sqrt().item()


@pytest.mark.parametrize(("codebook", "error"), [(NF4, 0.0920), (FP4, 0.1220)], ids=repr)
def test_relative_error_on_gaussian_weights(codebook, error):
    assert relative_error(gaussian(1024, 1024), codebook) == pytest.approx(error, abs=0.0005)


def test_formats_in_the_order_of_their_error_on_gaussian_weights():
    errors = [relative_error(gaussian(1024, 1024), book) for book in (NF4, INT4, INT4_SYMMETRIC, FP4, INT3)]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("codebook", "values"),
    [
        (INT4, [-1 + 2 * code / 15 for code in range(16)]),
        (INT4_SYMMETRIC, [code / 7 for code in range(-7, 8)]),
        (INT3, [-1 + 2 * code / 7 for code in range(8)]),
    ],
    ids=repr,
)
def test_integer_formats_have_equal_steps_from_minus_one_to_one(codebook, values):
    assert codebook.values.tolist() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("codebook", [INT4, INT4_SYMMETRIC, INT3], ids=repr)
def test_each_value_goes_to_the_nearest_of_a_codebook_that_bitsandbytes_lacks(codebook):
    weight = gaussian(64, 64)
    quantized = quantize(weight, codebook, 64, double_quant=False)
    scaled = weight / quantized.absmax.unsqueeze(1)  # one block per row
    nearest = (scaled.unsqueeze(2) - codebook.values).abs().amin(2)
    torch.testing.assert_close((scaled - codebook.values[quantized.codes.int()]).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (7, 9), (3, 5, 7)], ids=str)
def test_round_trip_keeps_shape_and_dtype(shape, dtype):
    quantized = quantize(gaussian(*shape, dtype=dtype), INT4, 64)
    decoded = dequantize(quantized)
    assert quantized.shape == decoded.shape == shape
    assert decoded.dtype == dtype


def test_quantising_leaves_the_weight_alone():
    weight = gaussian(65, 65)
    before = weight.clone()
    dequantize(quantize(weight))
    assert torch.equal(weight, before)


def test_a_matrix_that_is_not_contiguous_is_taken_in_its_own_order():
    for weight in (
        gaussian(64, 96).t(),
        gaussian(64, 96)[::2, 1::3],
        gaussian(3, 5, 7).permute(2, 0, 1),
        gaussian(1).expand(70),
    ):
        assert not weight.is_contiguous()
        assert torch.equal(quantize(weight).codes, quantize(weight.contiguous()).codes)
        assert_equal_to_bitsandbytes(weight.contiguous(), "nf4", 64, double_quant=True)


def test_quantising_takes_at_most_three_times_as_long_as_bitsandbytes():
    weight = gaussian(4096, 4096)
    ours, theirs = [], []
    for _ in range(3):  # alternating, so that anything else on the machine slows down both
        started = time.perf_counter()
        quantize(weight)
        between = time.perf_counter()
        bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        ours.append(between - started)
        theirs.append(time.perf_counter() - between)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"4096 x 4096: {statistics.median(ours):.2f} s, {ratio:.2f} times bitsandbytes' {statistics.median(theirs):.2f} s"
    )
    assert ratio <= 3


# What is refused


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused(value):
    weight = gaussian(64, 64)
    weight[3, 5] = weight[8, 8] = value
    with pytest.raises(ValueError, match="weight holds 2 values that are infinite or NaN"):
        quantize(weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_another_dtype_is_refused(dtype):
    with pytest.raises(TypeError, match=f"weight is {dtype}: pass a tensor of float32, bfloat16 or float16"):
        quantize(torch.ones(64, dtype=dtype))


def test_something_other_than_a_tensor_is_refused():
    with pytest.raises(TypeError, match="weight is list"):
        quantize([1.0, 2.0])


@pytest.mark.parametrize("block_size", [0, -64, True, 1.5, 64.0, "64", None], ids=repr)
def test_a_block_size_that_is_not_a_positive_whole_number_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size!r}: must be a whole number, 1 or more"):
        quantize(torch.ones(64), block_size=block_size)


@pytest.mark.parametrize("block_size", [64, 65, 10**12, 2**63 - 1])
@pytest.mark.parametrize("shape", [(64,), (), (1,)], ids=str)
def test_a_block_longer_than_the_weight_is_one_partial_block(block_size, shape):
    weight = gaussian(*shape)
    quantized = quantize(weight, block_size=block_size, double_quant=False)
    assert quantized.absmax.tolist() == [weight.abs().max().item()]
    assert dequantize(quantized).shape == weight.shape


def test_what_is_no_codebook_or_no_switch_is_refused():
    for codebook in ("nf4", None, NF4.values):
        with pytest.raises(TypeError, match=r"codebook is \w+: pass a Codebook, such as NF4"):
            quantize(torch.ones(64), codebook)
    for double_quant in ("no", 1, None):
        with pytest.raises(ValueError, match=r"double_quant=.*: must be True or False"):
            quantize(torch.ones(64), double_quant=double_quant)


@pytest.mark.parametrize("shape", [(0,), (4, 0)], ids=str)
def test_an_empty_weight_is_refused(shape):
    with pytest.raises(ValueError, match="holds no values"):
        quantize(torch.empty(shape))


def test_a_weight_that_is_not_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match=r"weight is on meta: pass weight\.cpu\(\)"):
        quantize(torch.empty(64, device="meta"))


def test_importing_quantize_and_hardware_loads_none_of_the_large_libraries():
    script = (
        "import sys, qlora_helpers.quantize, qlora_helpers.hardware;"
        "print(*{'transformers', 'peft', 'trl', 'bitsandbytes', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_scales_whose_mean_overflows_are_refused():
    with pytest.raises(ValueError, match="overflows float32: use double_quant=False"):
        quantize(torch.full((512, 64), 3e38))
