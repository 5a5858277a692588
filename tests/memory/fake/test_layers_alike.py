"""Which decoder layers are alike, and models that have only some of them."""

import copy

import pytest
import torch
from torch import nn

from qlora_helpers.memory.fake.layers_alike import kinds_of, representatives, shorten
from qlora_helpers.models.decoder_layers import decoder_layers
from qlora_helpers.models.meta import meta_model
from tests.memory.fake.models import DEEPSEEK, GEMMA3, GEMMA3_OF_PICTURES, GPT_OSS, LLAMA, QWEN3_MOE


def layers_of(config):
    return decoder_layers(meta_model(config))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "model.layers"),
        (GEMMA3_OF_PICTURES, "model.language_model.layers"),  # not the vision tower, which has as many
        ({"model_type": "gpt2", "n_layer": 3, "n_embd": 64, "n_head": 2}, "transformer.h"),
    ],
)
def test_the_decoder_layers_are_found(config, name):
    found, layers = layers_of(config)
    assert found == name and len(layers) in (3, 6, 9)


def test_a_model_without_a_list_of_layers_has_none():
    model = meta_model(LLAMA)
    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])  # not as many as the config says
    assert decoder_layers(model) is None


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (LLAMA, (0, 0, 0, 0, 0, 0)),
        (GEMMA3, (0, 0, 1, 0, 0, 1, 0, 0, 1)),  # with and without a window
        (QWEN3_MOE, (0, 1, 1, 0, 1, 1, 1)),  # dense and with experts
        (DEEPSEEK, (0, 1, 1, 1, 1, 1)),
        (GPT_OSS, (0, 1, 0, 1, 0, 1)),
    ],
)
def test_layers_are_of_a_kind_if_they_take_the_same(config, kinds):
    layers = layers_of(config)[1]
    assert kinds_of(layers, 0) == kinds_of(layers, len(layers)) == kinds


def test_checkpointed_layers_differ_from_the_others_and_so_does_the_last_of_them():
    assert kinds_of(layers_of(LLAMA)[1], 3) == (0, 0, 1, 2, 2, 2)
    assert kinds_of(layers_of(LLAMA)[1], 6) == kinds_of(layers_of(LLAMA)[1], 0) == (0, 0, 0, 0, 0, 0)


def test_a_layer_with_another_width_or_dtype_is_of_another_kind():
    layers = layers_of(LLAMA)[1]
    layers[2].mlp.up_proj = nn.Linear(64, 256, bias=False, device="meta")
    layers[4].input_layernorm.to(torch.bfloat16)
    assert kinds_of(layers, 0) == (0, 0, 1, 0, 2, 0)


@pytest.mark.parametrize(
    ("kinds", "places"),
    [
        ((), []),
        ((0,), [0]),
        ((0, 0), [0, 1]),
        ((0, 0, 0, 0, 0, 0), [0, 1, 5]),
        ((0, 1, 1, 1, 1, 1), [0, 1, 5]),
        ((0, 0, 1, 0, 0, 1, 0, 0, 1), [0, 2, 3, 8]),  # the one between of the first kind is followed by its own
        ((0, 1, 0, 1, 0, 1), [0, 1, 2, 5]),
    ],
)
def test_the_first_the_last_and_one_of_each_kind_are_run(kinds, places):
    assert representatives(kinds) == places


def test_a_shortened_model_has_those_layers_and_a_config_that_says_so():
    model = meta_model(GEMMA3)
    model.config.layer_types[8] = "full_attention"
    model.config.ten_names = tuple("abcdefghij")  # of another length
    kept = [model.model.layers[place] for place in (0, 2, 8)]
    shorten(model, "model.layers", (0, 2, 8))
    assert list(model.model.layers) == kept
    config = model.config
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert len(config.ten_names) == 10


def test_a_vision_tower_with_as_many_layers_keeps_them():
    model = meta_model(GEMMA3_OF_PICTURES)
    vision, before = model.config.vision_config, copy.deepcopy(model.config.vision_config.to_dict())
    shorten(model, "model.language_model.layers", (0, 8))
    assert model.config.text_config.num_hidden_layers == 2 and len(model.config.text_config.layer_types) == 2
    assert vision.to_dict() == before
    vision_layers = [
        module for name, module in model.named_modules() if "vision" in name and isinstance(module, nn.ModuleList)
    ]
    assert [len(layers) for layers in vision_layers] == [9]
