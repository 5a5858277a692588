"""Attention with repeated keys and values gives the same result as that of transformers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.hardware import Hardware
from qlora_helpers.models.attention import REPEATED_KV
from qlora_helpers.models.loading import load_model

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(params=["llama", "qwen2"])
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SHAPE), dtype=torch.float32)


def both(model, **batch):
    """The model's output and the gradient of its embeddings, with transformers' attention and with repeated keys."""
    results = []
    for name in ("sdpa", REPEATED_KV):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().mean().backward()
        results.append((logits.detach(), model.get_input_embeddings().weight.grad.clone()))
    return results


@pytest.fixture
def shared_heads(monkeypatch):
    """The (query heads, key heads, enable_gqa) of every call to torch's attention."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, **options):
        calls.append((query.shape[1], key.shape[1], options.get("enable_gqa", False)))
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return calls


def test_without_a_mask_output_and_gradient_are_the_same_and_no_kernel_must_share_heads(model, shared_heads):
    (out, grad), (our_out, our_grad) = both(model, input_ids=torch.arange(40).view(2, 20))
    torch.testing.assert_close(our_out, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grad, grad, rtol=1e-4, atol=1e-7)
    assert shared_heads[:2] == [(8, 2, True)] * 2  # transformers leaves the sharing to torch
    assert shared_heads[2:] == [(8, 8, False)] * 2


def test_with_padding_on_either_side_the_output_is_the_same(model):
    for mask in ([[1] * 20, [0] * 6 + [1] * 14], [[1] * 20, [1] * 14 + [0] * 6]):
        mask = torch.tensor(mask)
        (out, _), (our_out, _) = both(model, input_ids=torch.arange(40).view(2, 20), attention_mask=mask)
        torch.testing.assert_close(our_out[mask.bool()], out[mask.bool()], rtol=1e-5, atol=1e-6)


def test_a_later_token_changes_nothing_before_it(model):
    model.set_attn_implementation(REPEATED_KV)
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        ids[0, 12] = 96
        after = model(input_ids=ids).logits
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_generating_with_a_cache_gives_the_same_tokens(model):
    said = []
    for name in ("sdpa", REPEATED_KV):
        model.set_attn_implementation(name)
        said.append(model.generate(torch.arange(1, 7).view(1, 6), max_new_tokens=10, do_sample=False, pad_token_id=0))
    assert said[0].shape == (1, 16)
    assert torch.equal(*said)


@pytest.mark.parametrize(("gear", "wanted"), [("cpu", "sdpa"), ("t4", REPEATED_KV), ("ampere", "sdpa")])
def test_only_the_t4_gear_repeats(gear, wanted, monkeypatch):
    hardware = Hardware(gear, "gear", None, 0, None, False, 1, 0)
    monkeypatch.setattr(Hardware, "device", "cpu")  # another gear, on this machine
    assert load_model(quantization=None, hardware=hardware).config._attn_implementation == wanted
