"""The layers that are said to come in 4 bits are those that do, and asking changes nothing."""

import logging

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_helpers.models.four_bit_rule import quantised_layers
from qlora_helpers.models.meta import meta_model
from tests.models.tiny_families import CONFIGS, saved

COUNTS = {  # layers of one decoder layer that are quantised, two layers each; and of gemma3's tower: six of each, two in its head
    "llama": 14, "tied": 14, "qwen3_moe": 8, "qwen2_moe": 16, "gpt_oss": 8, "olmoe": 8, "mixtral": 8, "gpt2": 8, "falcon": 0,
    "gemma3": 28,
}  # fmt: skip


def loaded(folder, **options):
    quantization = BitsAndBytesConfig(load_in_4bit=True, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": "cpu"})


def layers_in_4_bits(model):
    return [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_named_layers_are_those_of_a_real_load(family, tmp_path):
    named = quantised_layers(meta_model(CONFIGS[family]))
    assert named == layers_in_4_bits(loaded(saved(family, tmp_path)))
    assert len(named) == COUNTS[family]


def test_layers_to_skip_are_skipped_as_in_a_real_load(tmp_path):
    skip = ["model.layers.1", "up_proj"]
    named = quantised_layers(meta_model(CONFIGS["llama"]), skip)
    assert named == layers_in_4_bits(loaded(saved("llama", tmp_path), llm_int8_skip_modules=skip))
    assert "lm_head" in named and len(named) == 7  # a list of one's own replaces transformers'


def test_the_model_stays_as_it_is(caplog):
    for family in ("tied", "falcon"):
        model = meta_model(CONFIGS[family])
        before, attributes = list(model.named_modules()), dict(vars(model))
        dtype, random_state = torch.get_default_dtype(), torch.get_rng_state()
        with caplog.at_level(logging.WARNING):
            quantised_layers(model)
        assert list(model.named_modules()) == before and dict(vars(model)) == attributes
        assert torch.get_default_dtype() == dtype and torch.equal(torch.get_rng_state(), random_state)
    assert not caplog.records  # transformers would speak of eetq
