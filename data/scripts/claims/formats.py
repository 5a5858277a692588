"""Claims about number formats: NF4 and its rivals, scales, float16 and bfloat16."""

import json
import math
import statistics
from functools import cache
from unittest import mock

import bitsandbytes as bnb
import torch

from data.scripts.claims.rules import Finding, by_setting, claim, number
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_gpu
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import INT4, INT4_SYMMETRIC, NF4, dequantize, quantize
from qlora_helpers.statistics import qq_correlation


@cache
def shipped_weights() -> dict[str, torch.Tensor]:
    """The linear weights of the shipped model, in float32."""
    model = load_model(quantization=None, hardware=detect("cpu"))
    return {name: layer.weight.detach() for name, layer in linear_layers(model)}


@cache
def gaussian() -> torch.Tensor:
    """16,384 blocks of 64 values from a normal distribution."""
    return torch.randn(16_384, 64, generator=torch.Generator().manual_seed(0))


@cache
def in_nf4(double_quant: bool = True):
    """The packed bytes and the state that bitsandbytes makes from a weight of the shipped model."""
    weight = shipped_weights()["model.layers.1.mlp.up_proj"]
    return bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)


def squared_error(book, data: torch.Tensor) -> float:
    return (dequantize(quantize(data, book, 64, double_quant=False)) - data).square().mean().item()


def gaps(values: torch.Tensor) -> torch.Tensor:
    """The distances between neighbouring values of a format."""
    return values.sort().values.diff()


# ---- the sizes of the parts, read from bitsandbytes' own tensors


@claim("A8.1")
def bytes_of_float32() -> Finding:
    return number("4", torch.float32.itemsize, "bytes")


@claim("A9.1")
def bytes_of_float16() -> Finding:
    return number("2", torch.float16.itemsize, "bytes")


@claim("A10.1")
def bytes_of_int8() -> Finding:
    return number("1", torch.int8.itemsize, "bytes")


@claim("A24.1", "B37.1")
def linear_layers_become_4_bit() -> Finding:
    model = load_model(quantization="nf4", hardware=detect("cpu"))
    layers = [layer for _, layer in linear_layers(model)]
    return by_setting(all(isinstance(layer, bnb.nn.Linear4bit) for layer in layers), value=f"{len(layers)} layers")


@claim("A30.1", "B41.2")
def a_scale_is_32_bits() -> Finding:
    _, state = in_nf4(double_quant=False)
    return number("32", 8 * state.absmax.itemsize, "bits")


@claim("A34.1")
def a_scale_for_64_weights() -> Finding:
    packed, state = in_nf4(double_quant=False)
    return number("64", 2 * packed.numel() / state.absmax.numel(), "weights")


@claim("A27.1", "A30.2", "A38.1")
def scales_become_8_bits() -> Finding:
    _, state = in_nf4()
    return number("8", 8 * state.absmax.itemsize, "bits")


@claim("B41.3")
def the_8_bit_scales_are_fp8() -> Finding:
    _, state = in_nf4()
    table = set(state.state2.code.tolist())
    every_byte = torch.arange(256, dtype=torch.uint8)
    outcomes = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = every_byte.view(dtype).float()
        values = values[values.isfinite()]
        outcomes.append(set((values / values.max()).tolist()) == table)
    return by_setting(*outcomes, value=f"{len(table)} values")


# ---- NF4


@claim("A20.1", "B39.3")
def weights_are_nearly_normal() -> Finding:
    median = statistics.median(qq_correlation(weight) for weight in shipped_weights().values())
    return by_setting(median > 0.99, value=f"{median:.4f}")


@claim("A20.2", "B39.6")
def nf4_is_denser_near_zero() -> Finding:
    steps = gaps(NF4.values)
    return by_setting(steps.min() < 0.5 * steps[-1], value=f"{steps.min():.3f} to {steps.max():.3f}")


@claim("A25.1")
def nf4_is_a_type() -> Finding:
    values = bnb.functional.get_4bit_type("nf4", device="cpu")
    return by_setting(torch.equal(values, NF4.values), shown=[f"{len(values)}"])


@claim("B39.2")
def four_bit_formats_are_uniform() -> Finding:
    books = [INT4.values, bnb.functional.get_4bit_type("fp4", device="cpu").unique()]
    return by_setting(*(bool(gaps(values).max() < 1.01 * gaps(values).min()) for values in books))


@claim("B39.4", "C55.2")
def each_code_is_used_equally() -> Finding:
    quantized = quantize(gaussian(), NF4, 64, double_quant=False)
    codes = quantized.codes.flatten()
    shares = torch.bincount(codes.int(), minlength=16) / codes.numel()
    equal = bool(shares.max() < 1.1 * shares.min())
    value = f"{100 * shares.min():.1f} % to {100 * shares.max():.1f} %"
    return by_setting(equal, value=value, shown=[f"{100 / 16:.2f}", f"{quantized.block_size}"])


@claim("B39.5")
def nf4_estimates_quantiles() -> Finding:
    normal = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    tables = [bnb.functional.quantize_4bit(data, quant_type="nf4")[1].code for data in (normal, normal**3)]
    return by_setting(not torch.equal(*tables))


@claim("B39.7", "B13.1")
def nf4_errs_less_than_int4() -> Finding:
    nf4, symmetric, uniform = (squared_error(book, gaussian()) for book in (NF4, INT4_SYMMETRIC, INT4))
    less = [100 * (1 - nf4 / error) for error in (symmetric, uniform)]
    return by_setting(*(share > 10 for share in less), value=f"{less[0]:.0f} % less", shown=[f"{less[1]:.0f}"])


@claim("B39.1")
def the_type_decides_what_a_model_knows() -> Finding:
    known = json.loads(data_path("tiny-llama", "scores.json").read_text(encoding="utf-8"))["recall"]
    nf4, fp4 = (100 * known[name]["64"] for name in ("NF4", "FP4"))
    double = 100 * known["NF4 + double quant"]["64"]
    return by_setting(nf4 - fp4 > nf4 - double, value=f"{nf4 - fp4:.2f} points", shown=[f"{nf4 - double:.2f}"])


@claim("C55.3")
def nf4_avoids_errors_of_outliers() -> Finding:
    blocks, spoiled = gaussian()[10:11], gaussian()[10:11].clone()
    spoiled[0, 20] = 12.0
    before, after = (math.sqrt(squared_error(NF4, data)) for data in (blocks, spoiled))
    return by_setting(after <= 1.1 * before, value=f"{after / before:.1f} times")


# ---- float16 and bfloat16


@claim("A26.1", "B43.1")
def a_4_bit_layer_computes_in_bfloat16() -> Finding:
    layer = bnb.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    result = layer(x)
    return by_setting(result.dtype == torch.float32, torch.equal(result, result.bfloat16().float()))


def exponent_bits(dtype: torch.dtype) -> int:
    """Bits of the exponent: half of its range is above one."""
    return round(math.log2(2 * math.ceil(math.log2(torch.finfo(dtype).max))))


@claim("B43.2")
def exponents_of_8_and_5_bits() -> Finding:
    bits = exponent_bits(torch.bfloat16), exponent_bits(torch.float16)
    return by_setting(bits == (8, 5), value="{} and {} bits".format(*bits), claimed="8 and 5 bits")


@claim("B43.3")
def bfloat16_neither_overflows_nor_underflows() -> Finding:
    numbers = torch.tensor([1e5, 1e-8])
    kept = [
        bool(((numbers.to(dtype) > 0) & numbers.to(dtype).isfinite()).all())
        for dtype in (torch.bfloat16, torch.float16)
    ]
    return by_setting(kept == [True, False], value=f"{torch.finfo(torch.float16).max:,.0f}")


def has_native_bfloat16(gpu: str) -> bool:
    """torch's own rule for a card of this compute capability."""
    properties = mock.Mock(major=find_gpu(gpu).compute_capability[0])
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
    ):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@claim("B43.4")
def bfloat16_is_native_from_ampere_on() -> Finding:
    newer = [has_native_bfloat16(card) for card in ("a100-40", "3060-12", "3090", "4090", "h100")]
    older = [has_native_bfloat16(card) for card in ("t4", "v100", "p100")]
    return by_setting(all(newer) and not any(older))


@claim("A146.1", "A199.1")
def bfloat16_rather_than_float16() -> Finding:
    return by_setting(*(has_native_bfloat16(card) for card in ("3060-12", "4090", "t4")))


@claim("B290.1")
def float16_is_full_precision() -> Finding:
    return number("32", torch.finfo(torch.float16).bits, "bits", shown=[f"{torch.finfo(torch.float32).bits}"])
