"""The fields that a config leaves out, and on which the size depends: found, and no others."""

import dataclasses

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_helpers.memory.assumed import assumed_fields, decides_size
from qlora_helpers.memory.catalogue import known_config, predicted_models
from qlora_helpers.models.meta import meta_model

# A public fixture that says it is Qwen3-4B; with what transformers adds, it has 7.81 billion parameters.
INCOMPLETE = {
    "model_type": "qwen3",
    "hidden_size": 2_560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def test_an_incomplete_config_is_completed_by_the_named_fields_and_no_others():
    assumed = assumed_fields(INCOMPLETE)
    assert assumed == {"vocab_size": 151_936, "intermediate_size": 22_016, "tie_word_embeddings": False}
    parameters = meta_model(INCOMPLETE).num_parameters()
    assert parameters == meta_model(INCOMPLETE | assumed).num_parameters()
    assert 7.8e9 < parameters < 7.82e9
    assert assumed_fields(INCOMPLETE | assumed) == {}


@pytest.mark.parametrize("name", predicted_models())
def test_a_published_config_assumes_nothing(name):
    assert assumed_fields(known_config(name)) == {}


def test_what_follows_from_other_fields_is_not_assumed():
    config = known_config("Llama-3.1-8B")
    assert "head_dim" not in config and assumed_fields(config) == {}
    del config["num_key_value_heads"]  # null by default: as many as attention heads
    assert assumed_fields(config) == {}
    del config["tie_word_embeddings"]
    assert assumed_fields(config) == {"tie_word_embeddings": False}


@pytest.mark.parametrize("name", ["hidden_size", "n_embd"])
def test_a_field_may_be_stated_under_either_of_its_names(name):
    config = {"model_type": "gpt2", "vocab_size": 50_257, "n_layer": 12, "n_head": 12, "n_positions": 1_024}
    assert assumed_fields(config) == {"n_embd": 768}
    assert assumed_fields(config | {name: 768}) == {}


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_two_names(name):
    assert "num_experts" in assumed_fields({"model_type": "qwen3_moe"})
    assert "num_experts" not in assumed_fields({"model_type": "qwen3_moe", name: 4})


def test_a_part_of_a_config_is_looked_into_unless_transformers_wrote_it():
    text = {"model_type": "gemma3_text", "hidden_size": 2_560}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    assumed = assumed_fields(config)
    assert assumed["text_config.intermediate_size"] == 9_216 and "text_config.hidden_size" not in assumed
    assert assumed["vision_config.num_hidden_layers"] == 12
    assert assumed_fields(config | {"transformers_version": "4.50.0"}) == {}
    assert assumed_fields({"model_type": "gemma3"}) == {"text_config": "all defaults"}


@pytest.mark.parametrize("model_type", [None, "no_such_model", 3, ["llama"]])
def test_a_family_that_transformers_does_not_know_is_named(model_type):
    with pytest.raises(ValueError, match=r"^model_type=.*: transformers knows no such model"):
        assumed_fields({"model_type": model_type})


SMALLER = {"num_hidden_layers": 2, "n_layer": 2}


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        "gpt_neox",
        "opt",
        "gemma3_text",
        "qwen3_moe",
        "gpt_oss",
        "mixtral",
        "deepseek_v3",
        "lfm2",
        "mamba2",
    ],
)
def test_every_field_that_changes_the_number_of_parameters_is_known_to(family):
    fields = dataclasses.fields(CONFIG_MAPPING[family])
    base = {"model_type": family} | {field.name: SMALLER[field.name] for field in fields if field.name in SMALLER}
    plain, unknown = meta_model(base).num_parameters(), []
    for field in fields:
        if type(field.default) is not int or decides_size(field.name, family):
            continue
        for value in (2 * field.default, field.default + 1, field.default // 2):
            try:
                changed = meta_model(base | {field.name: value}).num_parameters() != plain
            except Exception:  # the library's refusal of a value that fits no other
                continue
            if changed:
                unknown.append(field.name)
    assert not unknown
    assert not decides_size("num_experts_per_tok", family) and not decides_size("sliding_window", family)
