"""Block-wise absmax quantisation from scratch: codebooks, encode, decode, double quantisation.

The arithmetic follows bitsandbytes 0.50 on a CPU operation by operation, so that packed bytes, scales and decoded
values are bit-identical to what its torch code gives (`tests/test_quantize.py` compares them). Its compiled code differs
from that in two cases, both where decoded values are rounded to 16 bits: its CUDA builds round float16 ties on the CPU
away from zero instead of to even, and its CPU build, on a processor with AVX512-BF16, makes bfloat16 values below 2**-126
zero. Only torch is needed.

Source of the formats: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3.
"""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch

from qlora_helpers import validation

__all__ = [
    "FP4",
    "INT3",
    "INT4",
    "INT4_SYMMETRIC",
    "NF4",
    "Codebook",
    "NestedAbsmax",
    "Quantized",
    "dequantize",
    "dynamic_map_values",
    "float4_values",
    "normal_float_values",
    "quantize",
]

NESTED_BLOCK_SIZE = 256  # scales that share one second-level scale; fixed in bitsandbytes, too
SMALLEST_ABSMAX = 1e-38  # keeps 1 / absmax finite for a block of zeros


@dataclass(frozen=True, eq=False)
class Codebook:
    """The values that a code can stand for, each between -1 and 1.

    Attributes:
        name: for tables and plots.
        bits: bits per code, 1 to 8. bitsandbytes has 4-bit codebooks only.
        values: float32 tensor of 2 to 2**bits values; `values[code]` is the value of a code. It need not be sorted,
            and may repeat (FP4 is not sorted, and has two zeros).

    Raises:
        ValueError: `bits` or `values` are not as described.
    """

    name: str
    bits: int
    values: torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", validation.whole("bits", self.bits, at_most=8))
        values, codes = self.values, 2**self.bits
        if not isinstance(values, torch.Tensor) or values.dtype != torch.float32 or values.device.type != "cpu":
            found = (
                f"of {values.dtype} on {values.device}" if isinstance(values, torch.Tensor) else type(values).__name__
            )
            raise ValueError(f"values is {found}: pass a tensor of float32 on a CPU")
        if values.dim() != 1 or not 2 <= len(values) <= codes:
            found = f"values has the shape {tuple(values.shape)}"
            raise ValueError(f"{found}: a codebook of {self.bits} bits is a row of 2 to {codes} values")
        if not (values.abs() <= 1).all():  # NaN included
            bad = values[~(values.abs() <= 1)][0].item()
            raise ValueError(f"values has {bad}: each must lie between -1 and 1, as weights divided by their absmax do")

    def __repr__(self) -> str:
        return f"Codebook({self.name}, {self.bits} bits, {len(self.values)} values)"


def normal_float_values() -> torch.Tensor:
    """The 16 values of NF4: quantiles of the normal distribution, scaled so that the largest is 1.

    Eight values on the positive side, seven on the negative one, and an exact zero. The precision of each step is part
    of the definition: probabilities in float32, the inverse normal CDF in double, the result stored and divided by its
    maximum in float32. With float64 throughout, several values would differ in the last bit.
    """

    def tail(count: int) -> list[float]:
        probabilities = torch.linspace(0.9677083, 0.5, count + 1)[:-1]  # float32
        return [NormalDist().inv_cdf(p) for p in probabilities.tolist()]  # double

    values = torch.tensor([-v for v in tail(7)] + [0.0] + tail(8), dtype=torch.float32).sort().values
    return values / values.max()


def float4_values() -> torch.Tensor:
    """The 16 values of bitsandbytes' FP4: a sign bit and eight magnitudes, divided by the largest, in code order.

    The magnitudes are in bitsandbytes' own order (0, 1/16, 8, 12, 4, 6, 2, 3), not by size.
    """
    magnitudes = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0])
    return torch.cat([magnitudes, -magnitudes]) / 12.0


def dynamic_map_values() -> torch.Tensor:
    """The 256 values of bitsandbytes' signed 8-bit "dynamic" format, sorted; double quantisation uses it for scales.

    Seven decades, from 1e-6 to 1; decade i holds 2**i midpoints on each side of zero, so that large values get most of
    the codes. Zero and 1.0 complete the 256. Source: Dettmers, arXiv 1511.04561, and bitsandbytes' `create_dynamic_map`.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        boundaries = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        midpoints = 10 ** (decade - 6) * ((boundaries[:-1] + boundaries[1:]) / 2.0)
        values += midpoints.tolist() + (-midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


NF4 = Codebook("NF4", 4, normal_float_values())
FP4 = Codebook("FP4", 4, float4_values())
INT4 = Codebook("INT4", 4, torch.linspace(-1, 1, 16))  # 16 equally spaced values without a zero
INT4_SYMMETRIC = Codebook("INT4 symmetric", 4, torch.arange(-7, 8) / 7)  # 15 values with a zero; one code is unused
INT3 = Codebook("INT3", 3, torch.linspace(-1, 1, 8))


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """The second level of double quantisation: how the 8-bit scales are decoded.

    Attributes:
        absmax: float32, one per 256 first-level scales.
        offset: float32 scalar, the mean that was subtracted from the scales.
        values: the 256 values of the 8-bit codebook.
    """

    absmax: torch.Tensor
    offset: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised tensor and everything needed to decode it.

    Attributes:
        codes: uint8, one code per value, in the shape of the weight.
        absmax: the scale of each block: float32, or uint8 codes under double quantisation (`scales()` decodes them).
        nested: how the 8-bit scales are decoded; None without double quantisation.
        codebook, block_size: what it was quantised with.
        dtype: the weight's dtype, which `dequantize` restores.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    nested: NestedAbsmax | None
    codebook: Codebook
    block_size: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.codes.shape

    @property
    def packed(self) -> torch.Tensor:
        """The codes, two to a byte, the first in the high half: uint8, (ceil(values / 2),).

        An odd last value is paired with the code of zero. A code of fewer than 4 bits takes half a byte here, too, and one
        of more than 4 bits a whole byte: then it is one code to a byte.
        """
        flat = self.codes.flatten()
        if self.codebook.bits > 4:
            return flat
        if flat.numel() % 2:
            flat = torch.cat([flat, _nearest(torch.zeros(1), self.codebook)])
        return (flat[::2] << 4) | flat[1::2]

    def scales(self) -> torch.Tensor:
        """The absmax of each block as `dequantize` uses it: float32, (blocks,)."""
        if self.nested is None:
            return self.absmax
        second_level = self.nested.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: self.absmax.numel()]
        return self.nested.values[self.absmax.long()] * second_level + self.nested.offset

    @property
    def bits_per_parameter(self) -> float:
        """Bits per value: the code, its share of the scales, its share of the second-level scales.

        The codebooks and the offset, a constant number of bytes per tensor, are only counted in `nbytes`.
        """
        bits = self.codebook.bits * self.codes.numel() + 8 * self.absmax.nbytes
        if self.nested is not None:
            bits += 8 * self.nested.absmax.nbytes
        return bits / self.codes.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of everything that has to be stored: packed codes, scales, codebooks, offset."""
        codes = self.codes.numel()
        total = codes if self.codebook.bits > 4 else (codes + 1) // 2
        total += self.absmax.nbytes + self.codebook.values.nbytes
        if self.nested is not None:
            total += self.nested.absmax.nbytes + self.nested.offset.nbytes + self.nested.values.nbytes
        return total


@cache
def _boundaries(codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """The midpoints between neighbouring values, and the codes in the order of their values."""
    order = torch.argsort(codebook.values, stable=True)
    ordered = codebook.values[order]
    return (ordered[:-1] + ordered[1:]) / 2, order.to(torch.uint8)


def _nearest(scaled: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """The code of the nearest value; a value on a midpoint goes to the lower neighbour."""
    midpoints, order = _boundaries(codebook)
    return order[torch.bucketize(scaled, midpoints, out_int32=True)]


def quantize(
    weight: torch.Tensor, codebook: Codebook = NF4, block_size: int = 64, double_quant: bool = True
) -> Quantized:
    """Quantise a tensor block by block: divide each block by its absmax, store the code of the nearest value.

    Blocks run along the flattened tensor; the last one may be shorter.

    Args:
        weight: float32, bfloat16 or float16, any shape, on a CPU.
        codebook: the values to choose from.
        block_size: values that share one scale.
        double_quant: store the scales in 8 bits too, with one float32 scale per 256 of them.

    Raises:
        TypeError: `weight` is not a float tensor of 16 or 32 bits, or `codebook` is no Codebook.
        ValueError: `weight` is empty, not on a CPU, or not finite; `block_size` is not a positive whole number;
            `double_quant` is not a bool.
    """
    if not isinstance(codebook, Codebook):
        raise TypeError(f"codebook is {type(codebook).__name__}: pass a Codebook, such as NF4")
    double_quant = validation.switch("double_quant", double_quant)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"weight is {found}: pass a tensor of float32, bfloat16 or float16")
    if weight.device.type != "cpu":
        raise ValueError(
            f"weight is on {weight.device}: pass weight.cpu(); equality with bitsandbytes is only tested on a CPU"
        )
    if weight.numel() == 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)} holds no values: there is nothing to quantise")
    block_size = validation.whole("block_size", block_size)
    flat = weight.detach().reshape(-1).float()
    if not torch.isfinite(flat).all():
        bad = int((~torch.isfinite(flat)).sum())
        raise ValueError(f"weight holds {bad} values that are infinite or NaN; each would spoil its whole block")

    full = flat.numel() // block_size * block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    # bitsandbytes multiplies by the reciprocal, which rounds differently from a division
    scaled = torch.clamp(blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX).unsqueeze(1)), -1, 1).view(-1)
    if full < flat.numel():  # ... but divides in a last block that is not full
        last = flat[full:].abs().max().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, torch.clamp(flat[full:] / last, -1, 1)])
    codes = _nearest(scaled, codebook).view(weight.shape)
    nested = None
    if double_quant:
        absmax, nested = _quantize_absmax(absmax)
    return Quantized(codes, absmax, nested, codebook, block_size, weight.dtype)


def dequantize(quantized: Quantized) -> torch.Tensor:
    """Decode: the value of each code times the scale of its block, in float32, rounded to the weight's dtype.

    Returns:
        A tensor of the weight's shape and dtype.
    """
    values = quantized.codebook.values[quantized.codes.flatten().int()]
    scales, block = quantized.scales(), quantized.block_size
    full = values.numel() // block * block
    values[:full].view(-1, block).mul_(scales[: full // block].unsqueeze(1))
    if full < values.numel():
        values[full:] *= scales[-1]
    return values.view(quantized.shape).to(quantized.dtype)


@cache
def _absmax_table() -> tuple[torch.Tensor, torch.Tensor]:
    """The 8-bit codebook, and the code for each of 65,536 equal steps from -1 to 1.

    bitsandbytes finds 8-bit codes on a CPU through such a table; it differs from the true nearest value in up to 0.22 %
    of the blocks, so equality needs the table.
    """
    values = dynamic_map_values()
    steps = -1 + 2 * torch.arange(65536, dtype=torch.float32) / 65535
    return values, torch.bucketize(steps, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def _quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, NestedAbsmax]:
    """The second level: subtract the mean, then quantise the scales to 8 bits in blocks of 256."""
    values, table = _absmax_table()
    offset = absmax.mean()
    if not torch.isfinite(offset):
        raise ValueError("the mean of the scales overflows float32: use double_quant=False for such large values")
    centred = absmax - offset
    count = centred.numel()
    padded = torch.nn.functional.pad(centred, (0, -count % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    second_level = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / second_level.unsqueeze(1))).clamp(-1, 1)
    # a block of equal scales gives 0 * inf = NaN, which bitsandbytes maps to code 0
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).nan_to_num(0).long()
    codes = table[step].flatten()[:count]
    return codes, NestedAbsmax(second_level, offset, values)
