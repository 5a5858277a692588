"""Model shapes counted by formula, checked against transformers and PEFT on the "meta" device."""

import json
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from qlora_helpers.memory import ModelShape, catalogue
from qlora_helpers.memory.shape import FAMILIES
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import linear_layers

KNOWN = json.loads(catalogue.TABLE.read_text())["models"]
# one of each family, small enough to be wrapped in PEFT several times
EXAMPLES = {
    "llama": "HuggingFaceTB/SmolLM2-135M", "mistral": "mistralai/Mistral-7B-v0.1", "qwen2": "Qwen/Qwen2.5-0.5B",
    "qwen3": "Qwen/Qwen3-0.6B", "gemma2": "google/gemma-2-2b", "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "gpt_neox": "EleutherAI/pythia-410m", "gptj": "EleutherAI/gpt-j-6b",
}  # fmt: skip
PARTIAL = {
    "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj", "o_proj"], "gptj": ["q_proj", "v_proj", "fc_in"],
}  # fmt: skip


def with_two_layers(config: dict) -> dict:
    """All layers are alike: two are enough to count, and quicker to build."""
    return config | {"n_layer" if config["model_type"] == "gptj" else "num_hidden_layers": 2}


def counted(config: dict) -> tuple[int, int]:
    model = meta_model(config)
    return model.num_parameters(), sum(layer.weight.numel() for _, layer in linear_layers(model))


@pytest.mark.parametrize("name", KNOWN)
def test_the_counts_of_known_models_are_those_of_transformers(name):
    config = with_two_layers(KNOWN[name])
    shape = ModelShape.from_config(config)
    assert (shape.parameters, shape.linear_parameters) == counted(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_fields_take_transformers_defaults(family):
    shape = ModelShape.from_config({"model_type": family})
    assert (shape.parameters, shape.linear_parameters) == counted({"model_type": family})  # of all layers


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "head_dim": 96, "num_key_value_heads": 4},
        {"model_type": "mistral", "head_dim": 160},
        {"model_type": "qwen3", "attention_bias": True},
        {"model_type": "gpt_neox", "attention_bias": False, "tie_word_embeddings": True},
        {"model_type": "gptj", "n_inner": 3_000},
        {"model_type": "phi3", "num_key_value_heads": 8},
        {"model_type": "qwen2", "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_biases_head_sizes_and_ties_are_counted(change):
    small = {"num_hidden_layers": 2, "n_layer": 2} if change["model_type"] == "gptj" else {"num_hidden_layers": 2}
    shape = ModelShape.from_config(small | change)
    assert (shape.parameters, shape.linear_parameters) == counted(small | change)


@pytest.mark.parametrize("family", EXAMPLES)
def test_trainable_parameters_are_those_of_peft(family):
    config = with_two_layers(KNOWN[EXAMPLES[family]])
    shape = ModelShape.from_config(config)
    for targets in ("all-linear", PARTIAL.get(family, ["q_proj", "v_proj"])):
        for rank in (8, 64):
            lora = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
            trainable, _ = get_peft_model(meta_model(config), lora).get_nb_trainable_parameters()
            assert shape.lora_parameters(rank, targets) == trainable


def test_a_config_comes_as_dict_object_file_or_folder(tmp_path):
    config = KNOWN["Qwen/Qwen2.5-0.5B"]
    wanted = ModelShape.from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {key: value for key, value in config.items() if key != "model_type"}
    for given in (
        AutoConfig.for_model(config["model_type"], **options),
        tmp_path,
        str(tmp_path / "config.json"),
    ):
        assert ModelShape.from_config(given).parameters == wanted.parameters
    assert ModelShape.from_config(tmp_path) == wanted


def test_a_shape_made_by_hand_has_no_biases_no_window_and_turns_whole_heads():
    plain = ModelShape("llama", 32_000, 4_096, 11_008, 32, 32, 32, 128, False)
    assert plain == replace(ModelShape.from_config({"model_type": "llama"}), max_position_embeddings=None)
    assert not plain.use_parallel_residual and plain.rotary_dim == 0 and plain.sliding_window is None


def test_a_null_is_as_many_heads_as_there_are_or_no_window():
    few = {"model_type": "qwen2", "num_attention_heads": 14, "hidden_size": 896, "num_key_value_heads": None}
    assert ModelShape.from_config(few).num_key_value_heads == 14
    assert ModelShape.from_config({"model_type": "mistral"}).sliding_window == 4_096
    assert ModelShape.from_config({"model_type": "mistral", "sliding_window": None}).sliding_window is None
    windowed = {"model_type": "qwen2", "sliding_window": 1_024}
    assert ModelShape.from_config(windowed).sliding_window is None
    assert ModelShape.from_config(windowed | {"use_sliding_window": True}).sliding_window == 1_024
    assert ModelShape.from_config({"model_type": "gptj", "rotary_dim": None}).rotary_dim == 0
    with pytest.raises(ValueError, match=r"rotary_pct='0\.25': must be a number above 0"):
        ModelShape.from_config({"model_type": "gpt_neox", "rotary_pct": "0.25"})
    with pytest.raises(ValueError, match="sliding_window='4096': must be a whole number"):
        ModelShape.from_config({"model_type": "mistral", "sliding_window": "4096"})


def test_what_is_wrong_with_a_config_is_said(tmp_path):
    with pytest.raises(ValueError, match="model_type='mamba': known families are llama"):
        ModelShape.from_config({"model_type": "mamba"})
    with pytest.raises(ValueError, match="model_type=None"):
        ModelShape.from_config({"hidden_size": 64})
    with pytest.raises(ValueError, match="hidden_size=-1"):
        ModelShape.from_config({"model_type": "llama", "hidden_size": -1})
    with pytest.raises(ValueError, match="n_embd='wide'"):
        ModelShape.from_config({"model_type": "gptj", "n_embd": "wide"})
    with pytest.raises(ValueError, match="must be a multiple of num_key_value_heads=5"):
        ModelShape.from_config({"model_type": "llama", "num_key_value_heads": 5})
    with pytest.raises(ValueError, match="config is a int"):
        ModelShape.from_config(7)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ModelShape.from_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        ModelShape.from_config(tmp_path)


def test_targets_that_match_nothing_are_refused():
    shape = ModelShape.from_config({"model_type": "phi3"})
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\]: none of them is in phi3, which has qkv_proj"):
        shape.targets(["q_proj"])
    with pytest.raises(ValueError, match="target_modules='q_proj'"):
        shape.targets("q_proj")
    assert [linear.name for linear in shape.targets(["self_attn.o_proj", "proj"])] == ["self_attn.o_proj"]
