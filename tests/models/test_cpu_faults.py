"""The faults of bitsandbytes on CPUs from which this package protects its users.

A test that shows a fault fails once bitsandbytes has fixed it: then remove the protection, and the test.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_helpers.hardware import Hardware
from qlora_helpers.models.cpu_faults import make_safe_on_cpu
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.quantize import FP4, NF4, dequantize, quantize

import bitsandbytes as bnb  # isort: skip (qlora_helpers quietens it first)

CPU = Hardware("cpu", "gear", None, 0, None, False, 1, 0)

needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="fault B needs a CPU with AVX512, and torch sees none"
)
needs_avx512_bf16 = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="fault A needs a CPU with AVX512-BF16, and bitsandbytes sees none"
)


def gaussian(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


# Fault A: the first evaluation repacks the weights in place, and later training computes wrong gradients.


def linear4bit(in_features=256, out_features=64):
    layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(gaussian(out_features, in_features), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")  # this quantises


def input_gradient(layer):
    inputs = gaussian(8, layer.in_features).requires_grad_()
    layer.train()(inputs).square().sum().backward()
    return inputs.grad


def evaluate(layer):
    with torch.no_grad():
        layer.eval()(gaussian(8, layer.in_features))


@needs_avx512_bf16
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")  # torch's only hint that something is wrong
def test_fault_a_evaluating_a_plain_layer_spoils_its_gradients():
    layer = linear4bit()
    before = input_gradient(layer)
    evaluate(layer)
    after = input_gradient(layer)
    assert after is None or relative_error(after, before) > 0.5  # 0.50.2 returns none at all


def test_evaluating_a_layer_made_safe_changes_neither_gradients_nor_bytes():
    layer = linear4bit()
    make_safe_on_cpu(layer)
    before, weight = input_gradient(layer), layer.weight.data.clone()
    evaluate(layer)
    assert torch.equal(input_gradient(layer), before)
    assert torch.equal(layer.weight.data, weight)


def adapter_gradients(model, batch):
    model.train().zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients_before_and_after_generating(make_safe):
    model, tokenizer = load_model(quantization="nf4", hardware=CPU), load_tokenizer()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and not make_safe:
            module.support_avx512bf16_for_cpu = True  # what bitsandbytes sets on such a CPU
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # B not zero: all gradients count
    model = get_peft_model(model, lora)
    batch = tokenizer("Where does Carl Kirkcroft live?", return_tensors="pt")
    before = adapter_gradients(model, batch)
    model.eval().generate(**batch, max_new_tokens=2)
    return before, adapter_gradients(model, batch)


def test_generating_with_a_loaded_model_leaves_the_gradients_of_its_adapters_as_they_were():
    before, after = gradients_before_and_after_generating(make_safe=True)
    assert len(before) == 4 * 7 * 2  # layers, linears in each, A and B
    assert all(gradient.abs().sum() > 0 for gradient in before.values())
    assert all(torch.equal(after[name], before[name]) for name in before)


@needs_avx512_bf16
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_fault_a_it_would_spoil_them_without_the_switch():
    before, after = gradients_before_and_after_generating(make_safe=False)
    assert any(relative_error(after[name], before[name]) > 0.5 for name in before)


# Fault B: the AVX512 code uses the scale of the wrong block where a row is not a whole number of blocks.


def error_of_bitsandbytes(weight, block_size, quant_type="nf4"):
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
    return relative_error(bnb.functional.dequantize_4bit(packed, state), weight)


@needs_avx512
@pytest.mark.parametrize(("shape", "block_size"), [((256, 96), 64), ((64, 192), 128), ((256, 384), 256)], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_fault_b_a_row_that_is_no_whole_number_of_blocks_decodes_wrongly(shape, block_size, quant_type):
    weight = gaussian(*shape)
    ours = dequantize(quantize(weight, {"nf4": NF4, "fp4": FP4}[quant_type], block_size, double_quant=False))
    assert error_of_bitsandbytes(weight, block_size, quant_type) > 1.5 * relative_error(ours, weight)


def test_a_row_of_whole_blocks_decodes_correctly():
    weight = gaussian(256, 384)
    for block_size in (64, 128):
        ours = relative_error(dequantize(quantize(weight, NF4, block_size, double_quant=False)), weight)
        assert error_of_bitsandbytes(weight, block_size) == pytest.approx(ours)


@pytest.mark.parametrize("in_features", [96, 32, 66, 200])
def test_a_layer_that_meets_fault_b_is_refused_by_name(in_features):
    model = torch.nn.ModuleDict({"good": linear4bit(256), "narrow": linear4bit(in_features)})
    with pytest.raises(ValueError, match=rf"narrow has in_features={in_features}, not a multiple of the block size 64"):
        make_safe_on_cpu(model)


def test_layers_of_whole_blocks_pass_and_other_linears_are_left_alone():
    other = torch.nn.Linear(33, 5)
    model = torch.nn.ModuleDict({"a": linear4bit(64), "b": linear4bit(512), "c": other})
    for layer in (model["a"], model["b"]):
        layer.support_avx512bf16_for_cpu = True  # what bitsandbytes sets on such a CPU
    before, weight = dict(vars(other)), other.weight.clone()
    make_safe_on_cpu(model)
    assert not model["a"].support_avx512bf16_for_cpu and not model["b"].support_avx512bf16_for_cpu
    assert vars(other).keys() == before.keys() and torch.equal(other.weight, weight)


# A value that is not finite


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_bitsandbytes_spoils_the_block_of_a_value_that_is_not_finite_and_says_nothing(value):
    weight = gaussian(4, 64)
    weight[1, 5] = value
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    decoded = bnb.functional.dequantize_4bit(packed, state)
    spoilt = ((decoded - weight).abs() <= 0.5).logical_not()  # true for NaN too
    assert spoilt[1].sum() > 32
    assert not spoilt[[0, 2, 3]].any()


def test_bitsandbytes_with_double_quantisation_spoils_the_whole_weight():
    weight = gaussian(4, 64)
    weight[1, 5] = float("inf")
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert not bnb.functional.dequantize_4bit(packed, state).isfinite().any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("double_quant", [False, True])
def test_this_package_refuses_such_a_weight(value, double_quant):
    weight = gaussian(4, 64)
    weight[1, 5] = value
    with pytest.raises(ValueError, match="weight holds 1 values that are infinite or NaN"):
        quantize(weight, double_quant=double_quant)
