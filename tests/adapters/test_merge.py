"""Merging: each way against a formula, and what it changes."""

from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from qlora_helpers.adapters.drift import drift, logits
from qlora_helpers.adapters.merge import BASES, load_base, merge
from qlora_helpers.chats import read_chats
from qlora_helpers.evaluation import seconds_per_token
from qlora_helpers.memory import find_shape, predict_merge
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.saving import save_model
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import NF4, dequantize, quantize
from qlora_helpers.settings import GPU_RUN
from tests.support.merged_models import SHIPPED, merged_models, weights
from tests.support.short_runs import CPU, TOKENIZER

CHATS = read_chats(data_path("chats", "test.jsonl"))[:50]

LLAMA_8B = find_shape("meta-llama/Llama-3.1-8B")


@pytest.fixture(scope="module")
def deltas():
    """B A alpha / rank of every layer, from the adapter's file."""
    tensors, found = load_file(SHIPPED / "adapter_model.safetensors"), {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[name] = tensors[key.replace("lora_A", "lora_B")] @ a * (32 / 16)
    assert len(found) == 28
    return found


@pytest.fixture(scope="module")
def models():
    return merged_models()


@pytest.fixture(scope="module")
def drifts(models):
    wanted = logits(models["unmerged"], TOKENIZER, CHATS)
    return {into: drift(logits(models[into], TOKENIZER, CHATS), wanted) for into in BASES}


@pytest.mark.parametrize("into", ["16bit", "dequantised"])
def test_a_merge_in_16_bits_adds_the_difference_to_each_weight(into, models, deltas):
    before = weights(load_base(into, hardware=CPU))
    for name, weight in weights(models[into]).items():
        assert torch.equal(weight, before[name] + deltas[name]), name


def test_a_merge_into_4_bits_is_decoded_added_and_rounded_again(models, deltas):
    decoded = weights(load_base("dequantised", hardware=CPU))
    for name, layer in linear_layers(models["4bit"]):
        ours = dequantize(quantize(decoded[name] + deltas[name], NF4, 64, double_quant=True))
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(theirs, ours), name
        assert not layer.support_avx512bf16_for_cpu  # the switch that keeps bitsandbytes from repacking is still off


def test_the_models_are_plain_ones_afterwards(models):
    for into in BASES:
        assert not any("lora_" in name for name, _ in models[into].named_parameters())
        four_bits = sum(isinstance(layer, bnb.nn.Linear4bit) for _, layer in linear_layers(models[into]))
        assert four_bits == (28 if into == "4bit" else 0)


def test_the_dequantised_base_is_what_was_trained_and_the_others_are_not(drifts):
    assert drifts["dequantised"].largest < 1e-2 and drifts["dequantised"].same_choice > 0.999
    assert drifts["4bit"].mean > 0.1 and drifts["16bit"].mean > 0.1


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="into='8bit': choose one of 4bit, dequantised, 16bit"):
        merge(SHIPPED, "8bit")
    with pytest.raises(ValueError, match="into='8bit': choose one of 4bit, dequantised, 16bit"):
        predict_merge(LLAMA_8B, "8bit")
    with pytest.raises(ValueError, match=r"settings.method='full'"):
        predict_merge(LLAMA_8B, "16bit", replace(GPU_RUN, method="full"))


def test_a_token_takes_time(models):
    assert 0 < seconds_per_token(models["16bit"], TOKENIZER, CHATS[0][:1], tokens=4) < 5


def test_a_model_that_was_saved_in_4_bits_is_no_16_bit_base(tmp_path):
    folder = str(save_model(load_model(hardware=CPU), TOKENIZER, tmp_path / "tiny-llama"))
    assert load_base("4bit", folder, hardware=CPU).is_quantized
    with pytest.raises(ValueError, match=r"^into='16bit': '.*tiny-llama' was saved in 4 bits: name the 16-bit model"):
        load_base("16bit", folder, hardware=CPU)
