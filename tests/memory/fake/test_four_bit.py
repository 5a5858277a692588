"""The 4-bit layer without values, against bitsandbytes' own."""

import bitsandbytes as bnb
import pytest
import torch

from qlora_helpers.memory.fake.four_bit import Fake4bit
from qlora_helpers.memory.fake.ledger import ALIVE, Ledger
from qlora_helpers.memory.layers import DEQUANTISED


def real(bias=False, dtype=torch.float32, double_quant=True):
    return bnb.nn.Linear4bit(
        256, 128, bias=bias, compute_dtype=dtype, compress_statistics=double_quant, quant_type="nf4"
    ).to("cpu")


@pytest.fixture
def ledger(monkeypatch):
    made = Ledger()
    monkeypatch.setattr(Fake4bit, "ledger", made)
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_its_weight_and_its_results_are_those_of_bitsandbytes(ledger, bias):
    layer = real(bias)
    fake = Fake4bit(layer, torch.float32, double_quant=True, block_size=64)
    assert isinstance(fake, bnb.nn.Linear4bit)  # for PEFT and transformers
    assert fake.weight.numel() == layer.weight.numel() == 256 * 128 // 2
    assert fake.weight.dtype == layer.weight.dtype and not fake.weight.requires_grad
    x = torch.ones(3, 256, requires_grad=True)
    expected = layer(x)
    expected.sum().backward()
    of_fake = torch.empty(3, 256, device="meta", requires_grad=True)
    if bias:
        fake.bias = torch.nn.Parameter(torch.empty(128, device="meta"))
    out = fake(of_fake)
    out.sum().backward()
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert of_fake.grad.shape == x.grad.shape and of_fake.grad.dtype == x.grad.dtype


@pytest.mark.parametrize("double_quant", [False, True])
def test_each_pass_decodes_the_weight_and_keeps_nothing(ledger, double_quant):
    fake = Fake4bit(real(), torch.bfloat16, double_quant, block_size=64)
    decoded, scales = 2 * 256 * 128, 4 * 256 * 128 // 64
    once = [scales, decoded] if double_quant else [decoded]
    x = torch.empty(3, 256, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with ledger:
        out = fake(x)
        assert [s for s, k in zip(ledger.sizes, ledger.kinds, strict=True) if k == DEQUANTISED] == once
        alive = [size for size, death in zip(ledger.sizes, ledger.deaths, strict=True) if death == ALIVE]
        assert alive == [3 * 128 * 2 + 256]  # the result alone, in blocks of 512 bytes
        out.backward(torch.empty_like(out))
    assert [s for s, k in zip(ledger.sizes, ledger.kinds, strict=True) if k == DEQUANTISED] == 2 * once


def test_it_computes_in_its_dtype_and_gives_that_of_its_input(ledger):
    fake = Fake4bit(real(), torch.bfloat16, double_quant=False, block_size=64)
    x = torch.empty(3, 256, device="meta")
    with ledger:
        assert fake(x).dtype == torch.float32
    assert 2 * 256 * 128 in ledger.sizes  # decoded in 16 bits
