"""Right and wrong answers to the exercises of lesson 3."""

import decimal

import numpy as np
import torch

from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.quantize import NF4, dynamic_map_values, quantize
from tests.course.exercises.tried import Tried

# ---- 3.1, computed


def better_tables() -> list[str]:
    model = load_model(quantization=None, hardware=detect("cpu"))
    weight = dict(linear_layers(model))["model.layers.1.mlp.up_proj"].weight.detach()
    found = []
    for factor in (1, 100):
        changed = weight.clone()
        changed.view(-1)[:64] *= factor
        scales = quantize(changed, NF4, 64, double_quant=False).absmax
        blocks = (scales - scales.mean()).view(-1, 256)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        errors = {}
        for name, values in (("dynamic", dynamic_map_values()), ("equal steps", torch.linspace(-1, 1, 256))):
            codes = ((blocks / absmax).unsqueeze(2) - values).abs().argmin(dim=2)
            decoded = (values[codes] * absmax).flatten() + scales.mean()
            errors[name] = (decoded - scales)[1:].square().mean().item()
        found.append(min(errors, key=errors.get))
    return found


# ---- 3.2


def scales_of(state):
    level2 = state.state2
    groups = torch.arange(state.absmax.numel()) // level2.blocksize
    return level2.code[state.absmax.long()] * level2.absmax[groups] + state.offset


def codes_of(packed):
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], dim=1).flatten().long()


def by_views(packed, state):
    weights = state.code[codes_of(packed)].view(-1, state.blocksize) * scales_of(state).unsqueeze(1)
    return weights.view(state.shape)


def by_repeating(packed, state):
    level2 = state.state2
    second = level2.absmax.repeat_interleave(level2.blocksize)[: state.absmax.numel()]
    scales = level2.code[state.absmax.int()] * second + state.offset
    return (state.code[codes_of(packed)] * scales.repeat_interleave(state.blocksize)).reshape(state.shape)


def with_loops(packed, state):
    scales, out = scales_of(state).tolist(), []
    values = state.code.tolist()
    for byte in packed.flatten().tolist():
        for code in (byte // 16, byte % 16):
            out.append(values[code] * scales[len(out) // state.blocksize])
    return torch.tensor(out).view(state.shape)


def in_numpy(packed, state):
    flat = packed.flatten().numpy()
    codes = np.empty(2 * len(flat), dtype=np.int64)
    codes[::2], codes[1::2] = flat >> 4, flat & 15
    scales = np.repeat(scales_of(state).numpy(), state.blocksize)
    return torch.from_numpy(state.code.numpy()[codes] * scales).view(state.shape)


def in_double_precision(packed, state):
    return by_views(packed, state).double()


def halves_swapped(packed, state):
    flat = packed.flatten()
    codes = torch.stack([flat & 15, flat >> 4], dim=1).flatten().long()
    return (state.code[codes].view(-1, state.blocksize) * scales_of(state).unsqueeze(1)).view(state.shape)


def without_the_offset(packed, state):
    scales = (scales_of(state) - state.offset).unsqueeze(1)
    return (state.code[codes_of(packed)].view(-1, state.blocksize) * scales).view(state.shape)


def with_one_group(packed, state):
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax[0] + state.offset
    return (state.code[codes_of(packed)].view(-1, state.blocksize) * scales.unsqueeze(1)).view(state.shape)


def always_nf4(packed, state):
    return (NF4.values[codes_of(packed)].view(-1, state.blocksize) * scales_of(state).unsqueeze(1)).view(state.shape)


def always_blocks_of_64(packed, state):
    weights = state.code[codes_of(packed)].view(-1, 64) * scales_of(state).unsqueeze(1)
    return weights.view(state.shape)


def left_flat(packed, state):
    return by_views(packed, state).flatten()


RIGHT = {
    "tables": [
        Tried(better_tables()),
        Tried(tuple(better_tables())),
        Tried(["Equal Steps", "DYNAMIC"]),
        Tried(["equal", "dynamic"]),
        Tried(np.array(["equal-steps", "dynamic"])),
    ],
    "from_bytes": [
        Tried(by_views), Tried(by_repeating), Tried(with_loops), Tried(in_numpy), Tried(in_double_precision),
    ],
    "fixed_cost": [
        Tried([1028, 22_144]),
        Tried((1028, 22_144)),
        Tried([1028.0, 22_144.0]),
        Tried([torch.tensor(1028), torch.tensor(22_144)]),
        Tried([np.int64(1028), decimal.Decimal(22_144)]),
    ],
}  # fmt: skip

WRONG = {
    "tables": [
        Tried(["dynamic", "equal steps"], says="0 of 2 are right"),
        Tried(["dynamic", "dynamic"], says="1 of 2 is right"),
        Tried(["equal", "equal"], says="1 of 2 is right"),
        Tried(["fp8", "dynamic"], says="'fp8' in it, which is none of"),
    ],
    "from_bytes": [
        Tried(halves_swapped, says="in the case “a matrix of 256 full blocks”"),
        Tried(without_the_offset, says="16,384 weights are wrong"),
        Tried(with_one_group, says="in the case “a matrix of 300 blocks, whose second group of scales is not full”"),
        Tried(always_nf4, says="in the case “a matrix in FP4”"),
        Tried(always_blocks_of_64, says="your code raised RuntimeError"),
        Tried(left_flat, says="gives the shape (16384,) for a weight of (128, 128)"),
        Tried(torch.zeros(2), says="not a function"),
    ],
    "fixed_cost": [
        Tried([1024, 22_144], says="bytes_added: 1,024 is not right"),
        Tried([1096, 22_144], says="bytes_added"),
        Tried([1028, 22_080], says="fewest_weights: 22,080 is not right"),
        Tried([1028, 16_384], says="fewest_weights"),
        Tried(1028, says="where bytes_added and fewest_weights are asked for"),
        Tried([1028, "many"], says="fewest_weights: your answer is 'many'"),
    ],
}
