"""Weights that are decoded once give the same as those that are decoded each time, bit for bit."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from qlora_helpers.models.decoded_once import decoded_once
from qlora_helpers.models.loading import load_model
from qlora_helpers.training import run as training_run
from tests.support.short_runs import CPU, SHORT, adapter, differing, run

import bitsandbytes as bnb  # isort: skip (qlora_helpers quietens it first)


def layer_of(in_features=256, out_features=128, bias=False, quant_type="nf4", nested=True, compute_dtype=torch.float32):
    torch.manual_seed(0)
    options = {"quant_type": quant_type, "compress_statistics": nested, "compute_dtype": compute_dtype}
    layer = bnb.nn.Linear4bit(in_features, out_features, bias=bias, **options).to("cpu")  # this quantises
    layer.support_avx512bf16_for_cpu = False
    return layer


def output_and_gradient(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = layer(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 22, 256), (3, 256), (1, 1, 256)])
def test_a_layer_gives_the_same_bits_and_so_does_its_gradient(quant_type, nested, bias, shape):
    layer = layer_of(bias=bias, quant_type=quant_type, nested=nested)
    own, own_gradient = output_and_gradient(layer, shape)
    with decoded_once(layer) as size:
        assert size == 4 * 256 * 128
        kept, kept_gradient = output_and_gradient(layer, shape)
    assert torch.equal(own, kept) and torch.equal(own_gradient, kept_gradient)


def test_a_layer_does_not_decode_within_the_block_and_does_so_again_after_it(monkeypatch):
    layer, decoded = layer_of(), []
    decode = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args: decoded.append(1) or decode(*args))
    with decoded_once(layer):
        for _ in range(3):
            output_and_gradient(layer, (4, 256))
    assert len(decoded) == 1
    output_and_gradient(layer, (4, 256))
    assert len(decoded) == 2  # in the backward pass; in the forward pass, bitsandbytes calls another function


def test_the_layers_are_their_own_again_even_after_an_error():
    model = load_model(hardware=CPU)
    with pytest.raises(ZeroDivisionError), decoded_once(model) as size:
        assert size == 4 * 2_359_296 and sum("forward" in vars(module) for module in model.modules()) == 28
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_nothing_is_added_to_what_is_saved():
    layer = layer_of()
    before = set(layer.state_dict())
    with decoded_once(layer):
        assert set(layer.state_dict()) == before and len(list(layer.parameters())) == 1


def test_a_model_that_is_too_large_decodes_anew():
    layer = layer_of()
    with decoded_once(layer, most_bytes=4 * 256 * 128 - 1) as size:
        assert size == 0 and "forward" not in vars(layer)


def test_a_layer_that_computes_in_another_dtype_or_has_a_hook_stays_as_it_is():
    for layer in (layer_of(compute_dtype=torch.bfloat16), layer_of()):
        if layer.compute_dtype == torch.float32:
            layer.forward = lambda x: x
        before = vars(layer).get("forward")
        with decoded_once(layer) as size:
            assert size == 0 and vars(layer).get("forward") is before
        assert vars(layer).get("forward") is before


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"validation": 0.2}])
def test_a_run_learns_the_same_bit_for_bit(options, tmp_path, monkeypatch):
    settings = replace(SHORT, **options)
    kept = run(tmp_path / "kept", settings)
    monkeypatch.setattr(training_run, "decoded_once", lambda model: nullcontext(0))
    anew = run(tmp_path / "anew", settings)
    assert kept.step_losses == anew.step_losses and len(kept.step_losses) == settings.steps
    assert kept.gradient_norms == anew.gradient_norms and kept.validation_history == anew.validation_history
    assert not differing(adapter(kept.saved_path), adapter(anew.saved_path))
