"""The shape of any model that transformers can build."""

import subprocess
import sys
from dataclasses import replace
from functools import reduce

import pytest
from transformers import AutoConfig

from qlora_helpers.memory import AnyShape, ModelShape, find_shape
from qlora_helpers.models.four_bit_rule import quantised_layers
from qlora_helpers.models.meta import meta_model
from tests.memory.fake.models import DEEPSEEK, GEMMA3, GEMMA3_OF_PICTURES, GPT_OSS, LLAMA, QWEN3_MOE


def test_shapes_are_equal_if_their_configs_are_whatever_they_are_called():
    one, two = AnyShape.from_config(GEMMA3, "one"), AnyShape.from_config(dict(reversed(GEMMA3.items())), "two")
    assert one == two and hash(one) == hash(two) and (one.name, two.name) == ("one", "two")
    assert replace(one, assumed=("something",)) == one
    saved = GEMMA3 | {"transformers_version": "5", "_name_or_path": "x", "dtype": "float16", "quantization_config": {}}
    assert AnyShape.from_config(saved) == one
    assert AnyShape.from_config(GEMMA3 | {"hidden_size": 128}) != one
    assert AnyShape.from_config(GEMMA3, skip=["lm_head"]) != one
    assert one.config == GEMMA3


@pytest.mark.parametrize("config", [LLAMA, GEMMA3, QWEN3_MOE, DEEPSEEK, GPT_OSS, GEMMA3_OF_PICTURES])
def test_sizes_are_those_of_transformers_model(config):
    shape, model = AnyShape.from_config(config), meta_model(config)
    text = model.config.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings"):  # fmt: skip
        assert getattr(shape, name) == getattr(text, name), name
    assert shape.parameters == model.num_parameters()
    assert shape.largest_tensor == max(parameter.numel() for parameter in model.parameters())
    assert shape.four_bit_layers == len(quantised_layers(model, None))
    assert shape.eager_only == (config is GPT_OSS)


def test_a_model_of_text_and_pictures_has_the_sizes_of_its_text_part():
    shape, text = AnyShape.from_config(GEMMA3_OF_PICTURES), AnyShape.from_config(GEMMA3)
    assert (shape.model_type, text.model_type) == ("gemma3", "gemma3_text")
    assert (shape.hidden_size, shape.num_hidden_layers, shape.vocab_size) == (64, 9, 1_000)
    assert shape.parameters > text.parameters and shape.linear_names() == text.linear_names()


def test_families_with_their_own_names_for_sizes():
    shape = AnyShape.from_config({"model_type": "gpt2", "n_layer": 3, "n_embd": 64, "n_head": 2, "vocab_size": 500})
    assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == (64, 3, 2)
    assert shape.num_key_value_heads == 2  # it shares none


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (GEMMA3, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        (QWEN3_MOE, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_the_linear_layers_of_the_decoder_are_named(config, names):
    assert AnyShape.from_config(config).linear_names() == names


def test_a_known_family_has_the_same_sizes_on_both_roads():
    by_hand, by_run = ModelShape.from_config(LLAMA), AnyShape.from_config(LLAMA)
    for name in ("parameters", "largest_tensor", "four_bit_layers", "eager_only", "vocab_size", "hidden_size",
                 "num_hidden_layers"):  # fmt: skip
        assert getattr(by_hand, name) == getattr(by_run, name), name
    assert by_hand.linear_names() == by_run.linear_names()
    for targets in ("all-linear", ("q_proj", "down_proj")):
        assert by_hand.lora_parameters(8, targets) == by_run.lora_parameters(8, targets)


def test_find_shape_answers_any_family_and_writes_out_the_known_ones():
    assert isinstance(find_shape(LLAMA), ModelShape)
    found = find_shape(GEMMA3)
    assert found == AnyShape.from_config(GEMMA3) and found.name == "a gemma3_text model"
    assert find_shape(found) is found
    config = AutoConfig.for_model(**GEMMA3)
    assert find_shape(config).parameters == found.parameters


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma9"}, r"model_type='gemma9': the installed transformers .* a newer one may"),
        ({}, "model_type=None: the installed transformers"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]: the installed"),
        ({"model_type": "gemma3_text", "size": {1, 2}}, "config holds something that JSON cannot"),
        (
            {"model_type": "gemma3_text", "size": reduce(lambda inner, _: [inner], range(100_000), 1)},
            "nested too deeply",
        ),
    ],
)
def test_what_cannot_be_a_model_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        AnyShape.from_config(config)


NO_LIBRARIES = """
import sys
from qlora_helpers.memory import find_shape, predict, Settings
{what}
print([name for name in {libraries} if name in sys.modules])
print([name for name in sys.modules if ".modeling_" in name and name.startswith("transformers.models.")])
"""


@pytest.mark.parametrize(
    ("what", "libraries", "imported"),
    [
        ('predict(find_shape("Qwen/Qwen2.5-7B"), Settings())', ("torch", "transformers", "peft", "numpy"), []),
        # transformers' configuration classes, which bring torch, and its table of models, but no model
        (
            'assert find_shape({"model_type": "gemma3_text", "num_hidden_layers": 3}).model_type == "gemma3_text"',
            ("transformers", "peft", "trl", "bitsandbytes"),
            ["transformers"],
        ),
    ],
)
def test_the_libraries_are_imported_only_when_they_are_asked(what, libraries, imported):
    code = NO_LIBRARIES.format(what=what, libraries=libraries)
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-2] == str(imported) and lines[-1] in ("[]", "['transformers.models.auto.modeling_auto']")
