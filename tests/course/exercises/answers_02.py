"""Right and wrong answers to the exercises of lesson 2."""

import numpy as np
import torch

from qlora_helpers.quantize import NF4, dequantize, quantize
from tests.course.exercises.tried import Tried

# ---- 2.1, computed


def relative_error(data: torch.Tensor) -> float:
    decoded = dequantize(quantize(data, NF4, 64, double_quant=False))
    return ((decoded - data).square().mean().sqrt() / data.square().mean().sqrt()).item()


def what_happens() -> list[str]:
    plain = torch.randn(16384, 64, generator=torch.Generator().manual_seed(0))
    spiked = plain.clone()
    spiked[:, 0] = 10
    order = torch.randperm(plain.numel(), generator=torch.Generator().manual_seed(1))
    changed = [plain * 1000, plain.flatten()[order], plain.flatten().sort().values, spiked]
    ratios = [relative_error(data) / relative_error(plain) for data in changed]
    return ["larger" if ratio > 1.05 else "smaller" if ratio < 0.95 else "the same" for ratio in ratios]


# ---- 2.2


def coded(blocks, scales, values):
    return torch.bucketize(blocks / scales, (values[:-1] + values[1:]) / 2)


def a_search(blocks, values, shares=13, lowest=0.7):
    absmax = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    codes, scales, best = 0, absmax, torch.inf
    for share in torch.linspace(lowest, 1, shares).tolist():
        tried = coded(blocks, share * absmax, values)
        error = (values[tried] * share * absmax - blocks).square().sum(dim=1, keepdim=True)
        codes, scales = torch.where(error < best, tried, codes), torch.where(error < best, share * absmax, scales)
        best = torch.where(error < best, error, best)
    return codes, scales


def a_coarse_search(blocks, values):
    return a_search(blocks, values, shares=4)


def block_by_block(blocks, values):
    codes, scales = torch.zeros(blocks.shape, dtype=torch.uint8), torch.ones(len(blocks))
    for row, block in enumerate(blocks):
        best = torch.inf
        for share in (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0):
            scale = share * block.abs().max() + 1e-30
            found = coded(block, scale, values)
            error = (values[found] * scale - block).square().sum()
            if error < best:
                best, codes[row], scales[row] = error, found.to(torch.uint8), scale
    return codes, scales


def all_shares_at_once(blocks, values):
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) * torch.linspace(0.65, 1, 15)
    codes = torch.bucketize(blocks.unsqueeze(2) / scales.unsqueeze(1), (values[:-1] + values[1:]) / 2)
    errors = (values[codes] * scales.unsqueeze(1) - blocks.unsqueeze(2)).square().sum(dim=1)
    best = errors.argmin(dim=1, keepdim=True)
    return codes.gather(2, best.unsqueeze(1).expand(-1, blocks.shape[1], 1)).squeeze(2), scales.gather(1, best)


def with_numpy(blocks, values):
    codes, scales = a_search(blocks, values)
    return codes.numpy().astype(np.int64), scales.numpy()


def searched_and_refitted(blocks, values):
    """After the search, the best scale for the codes that were found."""
    codes, scales = a_search(blocks, values)
    chosen = values[codes]
    refitted = (chosen * blocks).sum(dim=1, keepdim=True) / chosen.square().sum(dim=1, keepdim=True).clamp(min=1e-30)
    return [codes, torch.where(refitted > 0, refitted, scales)]


def with_the_absmax(blocks, values):
    absmax = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return coded(blocks, absmax, values), absmax


def with_two_standard_deviations(blocks, values):
    scales = 2 * blocks.std(dim=1, keepdim=True).clamp(min=1e-30)
    return coded(blocks, scales, values), scales


def with_one_scale_for_all(blocks, values):
    scale = blocks.abs().max().reshape(1, 1)
    return coded(blocks, scale, values), scale


def without_care_for_zeros(blocks, values):
    codes, scales = a_search(blocks, values)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return codes, scales * (absmax / absmax)


def already_decoded(blocks, values):
    codes, scales = a_search(blocks, values)
    return values[codes] * scales


def values_in_place_of_codes(blocks, values):
    codes, scales = a_search(blocks, values)
    return values[codes], scales


# ---- 2.3


def with_midpoints(weight, values, block_size=64):
    blocks = weight.reshape(-1, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    codes = torch.bucketize(blocks / scales, (values[:-1] + values[1:]) / 2)
    return (values[codes] * scales).view_as(weight)


def by_distance(weight, values, block_size=64):
    blocks = weight.reshape(-1, block_size, 1)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    return (values[(blocks / scales - values).abs().argmin(dim=2)] * scales.squeeze(2)).reshape(weight.shape)


def by_hand(weight, values, block_size=64):
    flat, out = weight.flatten().tolist(), []
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        scale = max(abs(w) for w in block)
        out += [min(values.tolist(), key=lambda value, w=w: abs(value - w / scale)) * scale for w in block]
    return torch.tensor(out).view(weight.shape)


def by_the_helpers(weight, values, block_size=64):
    from qlora_helpers.quantize import Codebook

    book = Codebook("mine", 4, values)
    return dequantize(quantize(weight, book, block_size, double_quant=False))


def in_double_precision(weight, values, block_size=64):
    return with_midpoints(weight.double(), values.double(), block_size)


def by_numpy(weight, values, block_size=64):
    blocks, values = weight.numpy().reshape(-1, block_size), values.numpy()
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.searchsorted((values[:-1] + values[1:]) / 2, blocks / scales)
    return (values[codes] * scales).reshape(weight.shape)


def as_it_was(weight, values, block_size=64):
    blocks = weight.reshape(-1, block_size)
    scales = blocks.amax(dim=1, keepdim=True)
    return (values[torch.bucketize(blocks / scales, values[:-1])] * scales).view_as(weight)


def rounding_repaired_alone(weight, values, block_size=64):
    blocks = weight.reshape(-1, block_size)
    scales = blocks.amax(dim=1, keepdim=True)
    codes = torch.bucketize(blocks / scales, (values[:-1] + values[1:]) / 2)
    return (values[codes] * scales).view_as(weight)


def scale_repaired_alone(weight, values, block_size=64):
    blocks = weight.reshape(-1, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    return (values[torch.bucketize(blocks / scales, values[:-1])] * scales).view_as(weight)


def always_blocks_of_64(weight, values, block_size=64):
    return with_midpoints(weight, values, 64)


def always_nf4(weight, values, block_size=64):
    return with_midpoints(weight, NF4.values, block_size)


def as_blocks(weight, values, block_size=64):
    return with_midpoints(weight, values, block_size).reshape(-1, block_size // 2)


RIGHT = {
    "changed_weights": [
        Tried(what_happens()),
        Tried(tuple(what_happens())),
        Tried(np.array(what_happens())),
        Tried([word.upper() for word in what_happens()]),
        Tried(["same", "stays the same", "less", "more"]),
    ],
    "better_scale": [
        Tried(a_search), Tried(a_coarse_search), Tried(block_by_block), Tried(all_shares_at_once), Tried(with_numpy),
        Tried(searched_and_refitted),
    ],
    "faulty_quantiser": [
        Tried(with_midpoints), Tried(by_distance), Tried(by_hand), Tried(by_the_helpers), Tried(in_double_precision),
        Tried(by_numpy),
    ],
}  # fmt: skip

WRONG = {
    "changed_weights": [
        Tried(["larger", "the same", "larger", "larger"], says="2 of 4 are right"),
        Tried(["the same", "larger", "smaller", "larger"], says="3 of 4 are right"),
        Tried(["the same"] * 4, says="2 of 4 are right"),
        Tried("larger", says="where a list of 4 words is asked for"),
        Tried(["the same", "the same", "smaller"], says="has 3 entries, where 4"),
        Tried(["the same", "the same", "tiny", "larger"], says="'tiny' in it, which is none of"),
    ],
    "better_scale": [
        Tried(
            with_the_absmax, says="in the case “normal weights in NF4” its error is 1.000 times that with the absmax"
        ),
        Tried(with_two_standard_deviations, says="times that with the absmax"),
        Tried(with_one_scale_for_all, says="gives 1 scales for 512 blocks"),
        Tried(without_care_for_zeros, says="in the case “blocks of zeros” it does not give zeros back"),
        Tried(already_decoded, says="gives Tensor, and not codes and scales"),
        Tried(values_in_place_of_codes, says="they must be whole numbers"),
        Tried(0.85, says="not a function"),
    ],
    "faulty_quantiser": [
        Tried(as_it_was, says="in the case “weights that are all positive”"),
        Tried(rounding_repaired_alone, says="in the case “a block whose largest weight is negative”"),
        Tried(scale_repaired_alone, says="in the case “weights that are all positive”"),
        Tried(always_blocks_of_64, says="in the case “a matrix in INT3, in blocks of 32”"),
        Tried(always_nf4, says="in the case “normal weights in INT4”"),
        Tried(as_blocks, says="has the shape"),
        Tried(torch.zeros(4), says="not a function"),
    ],
}
