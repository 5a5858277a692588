"""What a loaded model's weights take, and rounding and shuffling them in place."""

import pytest
import torch

from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.weights import bytes_by_part, linear_layers, quantize_dequantize, shuffle_linear_weights
from qlora_helpers.quantize import INT3, INT4, NF4, dequantize, quantize

CPU = detect("cpu")


@pytest.fixture
def unquantised():
    return load_model(quantization=None, hardware=CPU)


def weights(model):
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(model)}


def test_bytes_by_part_of_an_unquantised_model_are_those_of_its_parameters(unquantised):
    parts = bytes_by_part(unquantised)
    assert parts["linear weights"] == 2_359_296 * 4
    assert sum(parts.values()) == sum(p.nbytes for p in unquantised.parameters())


@pytest.mark.parametrize(
    ("double_quant", "scales"), [(False, 36_864 * 4), (True, 36_864 + 144 * 4 + 28 * (4 + 256 * 4))]
)
def test_bytes_of_a_4_bit_model_are_codes_scales_and_tables(double_quant, scales):
    """36,864 blocks of 64, 144 blocks of 256 scales, 28 matrices with a table of 16 values each."""
    parts = bytes_by_part(load_model(double_quant=double_quant, hardware=CPU))
    assert parts["4-bit weights"] == 2_359_296 // 2
    assert parts["quantisation constants"] == scales + 28 * 16 * 4


def test_the_4_bit_model_holds_what_quantize_gives(unquantised):
    four_bit = load_model(hardware=CPU)
    for name, weight in weights(unquantised).items():
        q = quantize(weight, NF4, 64, double_quant=True)
        assert torch.equal(four_bit.get_submodule(name).weight.flatten(), q.packed), name


def test_the_linear_layers_leave_out_the_output_head(unquantised):
    names = [name for name, _ in linear_layers(unquantised)]
    assert len(names) == 4 * 7
    assert not any("lm_head" in name for name in names)


def test_quantize_dequantize_rounds_every_linear_weight_and_nothing_else(unquantised):
    before, head = weights(unquantised), unquantised.lm_head.weight.detach().clone()
    quantize_dequantize(unquantised, INT4, 64)
    for name, weight in weights(unquantised).items():
        assert torch.equal(weight, dequantize(quantize(before[name], INT4, 64, False))), name
    assert torch.equal(unquantised.lm_head.weight, head)


def test_int3_leaves_eight_values_in_a_block(unquantised):
    quantize_dequantize(unquantised, INT3, 64)
    for weight in weights(unquantised).values():
        assert len(weight.flatten()[:64].unique()) <= 8


def test_shuffling_keeps_the_values_and_moves_them(unquantised):
    before = weights(unquantised)
    shuffle_linear_weights(unquantised)
    for name, weight in weights(unquantised).items():
        assert torch.equal(weight.flatten().sort().values, before[name].flatten().sort().values)
        assert not torch.equal(weight, before[name])
