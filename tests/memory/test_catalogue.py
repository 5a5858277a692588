"""Models by name, and their configs against published parameter counts."""

import json
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qlora_helpers.memory import (
    ModelShape,
    catalogue,
    find_shape,
    known_config,
)
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.paths import data_path

QWEN_7B, LLAMA_8B, LLAMA_70B, GPT_J = map(
    find_shape, ("Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "EleutherAI/gpt-j-6b")
)


@pytest.mark.parametrize(
    ("asked_for", "name"),
    [
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("qwen/QWEN2.5-7b", "Qwen/Qwen2.5-7B"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("meta-llama/llama-3.3-70b-INSTRUCT", "meta-llama/Llama-3.3-70B-Instruct"),
    ],
)
def test_a_hub_name_is_found_in_any_case(asked_for, name):
    assert find_shape(asked_for).name == name


def test_an_alias_has_the_shape_of_what_it_stands_for():
    file = json.loads(catalogue.TABLE.read_text(encoding="utf-8"))
    assert file["aliases"]
    for alias, name in file["aliases"].items():
        assert find_shape(alias) == find_shape(name) == ModelShape.from_config(file["models"][name])
    assert find_shape("meta-llama/Llama-3.1-8B-Instruct") == LLAMA_8B != QWEN_7B


def test_a_name_without_its_owner_means_one_shape():
    known = json.loads(catalogue.TABLE.read_text(encoding="utf-8"))["models"]
    assert {*known} <= {*catalogue.known_models()}
    for name in catalogue.known_models():
        assert catalogue.resolve(name.rpartition("/")[2]).name == catalogue.resolve(name).name
        assert catalogue.resolve(name).name.lower() == name.lower()  # GPT-J's is written in two ways
    for name in catalogue.predicted_models():
        assert find_shape(name.rpartition("/")[2]) == find_shape(name)


def test_folders_files_and_configs_are_taken(tmp_path, monkeypatch):
    config = json.loads(catalogue.TABLE.read_text())["models"]["Qwen/Qwen2.5-7B"]
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for model in (folder, str(folder), folder / "config.json", str(folder / "config.json")):
        assert find_shape(model) == QWEN_7B
        assert find_shape(model).name == "my-model"
    monkeypatch.chdir(folder)
    assert find_shape("config.json").name == find_shape(".").name == "my-model"
    assert find_shape(config) == QWEN_7B
    assert find_shape(config).name
    assert find_shape(config | {"_name_or_path": "me/mine"}).name == "me/mine"
    assert find_shape(QWEN_7B) is QWEN_7B


def test_a_config_object_is_taken_with_its_name():
    """One like transformers'; tests/memory/test_shape.py checks `ModelShape.from_config` with a real one."""
    config = json.loads((data_path("tiny-llama") / "config.json").read_text())
    shape = find_shape(SimpleNamespace(to_dict=lambda: config, name_or_path="me/mine"))
    assert shape == find_shape(data_path("tiny-llama"))
    assert shape.name == "me/mine"
    assert find_shape(SimpleNamespace(to_dict=lambda: config)).name


def test_a_folder_goes_before_a_hub_name_only_if_it_has_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    assert find_shape("Qwen2.5-7B") == QWEN_7B
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert find_shape("Qwen2.5-7B").model_type == "llama"


def test_an_unknown_model_is_named_with_the_cure_and_its_neighbours(tmp_path):
    with pytest.raises(ValueError, match=r"'Qwen/Qwen2\.5-8B'.*Qwen/Qwen2\.5-7B.*folder or its config\.json"):
        find_shape("Qwen/Qwen2.5-8B")
    with pytest.raises(ValueError, match="'zzzzzz'") as caught:
        find_shape("zzzzzz")
    assert "closest" not in str(caught.value)
    for missing in (tmp_path / "config.json", str(tmp_path / "config.json"), str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            find_shape(missing)


PUBLISHED = {  # all parameters; those in the linear layers of the decoder
    "Llama-3.2-1B": (1_235_814_400, 973_078_528),
    "Mistral-7B-v0.1": (7_241_732_096, 6_979_321_856),
    "Llama-3.1-8B": (8_030_261_248, 6_979_321_856),
    "Llama-2-70b-hf": (68_976_648_192, 68_451_041_280),
    "Llama-3.1-70B": (70_553_706_496, 68_451_041_280),
    "Llama-2-7b-hf": (6_738_415_616, 6_476_005_376),
    "Qwen2.5-1.5B": (1_543_714_304, 1_310_195_712),
    "Qwen2.5-3B": (3_085_938_688, 2_774_532_096),
    "Qwen2.5-7B": (7_615_616_512, 6_525_288_448),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    model = meta_model(known_config(name))
    linear = sum(layer.weight.numel() for _, layer in linear_layers(model))
    assert (model.num_parameters(), linear) == PUBLISHED[name]


# ---- The table: each config is built, and its size compared with what was published

TABLE = json.loads(catalogue.TABLE.read_text(encoding="utf-8"))
# One of each kind: dense, mixture of experts, windows, convolutions, latent attention, several modalities.
QUICK = [
    "HuggingFaceTB/SmolLM3-3B", "LiquidAI/LFM2-1.2B", "Qwen/Qwen2.5-Coder-1.5B", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-VL-2B-Instruct",
    "deepseek-ai/DeepSeek-V2-Lite", "google/gemma-3-1b-it", "google/gemma-3-4b-it", "microsoft/phi-4", "openai/gpt-oss-20b",
]  # fmt: skip
# Billions of parameters as published, for models whose names do not say it, or say something else.
# source: the model cards on the Hugging Face Hub, and for Mixtral 8x7B the model's page of the Ollama library.
STATED = {
    "deepseek-ai/DeepSeek-V3": 671, "microsoft/Phi-3-medium-4k-instruct": 14, "microsoft/Phi-3-mini-128k-instruct": 3.8,
    "microsoft/Phi-3-mini-4k-instruct": 3.8, "microsoft/phi-4": 14.7, "mistralai/Ministral-3-3B-Reasoning-2512": 3.4 + 0.4,
    "mistralai/Mixtral-8x22B-v0.1": 141, "mistralai/Mixtral-8x7B-v0.1": 46.7, "meta-llama/Llama-3.2-1B": 1.2358144,
}  # fmt: skip
# No published figure was found where one could be looked up: their sizes rest on their configs alone.
UNCONFIRMED = {
    "BSC-LT/salamandra-2b", "CohereLabs/c4ai-command-r-v01", "Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2.5-VL-7B-Instruct",
    "ai21labs/AI21-Jamba-1.5-Mini", "ai21labs/Jamba-v0.1", "baidu/ERNIE-4.5-0.3B-PT", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-ai/DeepSeek-V2-Lite", "google/gemma-2-2b", "google/gemma-2b", "google/gemma-4-E2B-it", "google/gemma-4-E4B-it",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct", "microsoft/Phi-3.5-mini-instruct", "microsoft/Phi-4-mini-instruct",
    "microsoft/Phi-4-reasoning", "microsoft/Phi-4-reasoning-plus", "mistralai/Mistral-Large-Instruct-2407",
    "mistralai/Mistral-Large-Instruct-2411", "mistralai/Mistral-Nemo-Base-2407", "mistralai/Mistral-Small-Instruct-2409",
    "tiiuae/Falcon3-1B-Base",
}  # fmt: skip


def built(config: dict):
    options = {key: value for key, value in config.items() if key != "model_type"}
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_config(AutoConfig.for_model(config["model_type"], **options))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.everything) for name in TABLE["models"]]
)
def test_the_size_in_the_table_is_that_of_transformers_model(name):
    assert built(TABLE["models"][name]).num_parameters() == TABLE["evidence"][name]["parameters"]


# Taken by their classes, though their defaults do not show it: some go into rope_parameters or layer_types.
TAKEN = {
    "full_attention_interval",
    "global_head_dim",
    "num_global_key_value_heads",
    "head_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


def test_every_field_of_a_config_is_one_of_its_class():
    """A misspelt field would be dropped, and the default taken in its place."""
    for name, config in TABLE["models"].items():
        made = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
        parts = [(config, made), *((config[key], getattr(made, key)) for key in PARTS if config.get(key))]
        for fields, part in parts:
            defaults = type(part)()
            assert {*fields} <= {*defaults.to_dict(), *defaults.attribute_map, *PARTS, *TAKEN}, name


PARTS = ("text_config", "vision_config", "audio_config")


def stated_size(name: str) -> float | None:
    """Billions of parameters, as the name has it: the first of its sizes, which of a mixture of experts is the total."""
    if name in STATED:
        return STATED[name]
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])\b", name.rpartition("/")[2], re.IGNORECASE)
    return found and float(found[1]) * (1 if found[2].upper() == "B" else 1e-3)


def test_the_sizes_are_those_that_were_published():
    """A name rounds: 7B is 7.6 or 6.7. Tied or untied embeddings make a small model's size differ by 13 % and more."""
    unconfirmed = set()
    for name in TABLE["models"]:
        size, stated = TABLE["evidence"][name]["parameters"] / 1e9, stated_size(name)
        if name in UNCONFIRMED:
            unconfirmed.add(name)
            continue
        assert stated is not None, name
        assert abs(size / stated - 1) < (0.05 if name in STATED else 0.12), (name, size, stated)
    assert unconfirmed == UNCONFIRMED


def test_each_config_has_a_source_and_a_size():
    assert list(TABLE["evidence"]) == list(TABLE["models"])
    source = re.compile(r"[\w.-]+/[\w.-]+ [\w./-]+ @ [0-9a-f]{7,40}\b")
    without = {name for name, entry in TABLE["evidence"].items() if not source.search(entry["source"] or "")}
    assert without == {"huggyllama/llama-30b", "huggyllama/llama-65b", "EleutherAI/gpt-neox-20b"}
    assert all(source.search(entry["source"]) for entry in TABLE["finetunes"].values())
    assert {entry["of"] for entry in TABLE["finetunes"].values()} <= {*TABLE["models"]}


OF_2023_AND_BEFORE = (
    "Llama-2-", "llama-30b", "llama-65b", "Mistral-7B-v0.1", "Mixtral-8x7B", "gpt-neox", "pythia", "gpt-j", "TinyLlama",
)  # fmt: skip


def test_the_table_has_more_than_100_models_of_2024_to_2026():
    recent = [name for name in TABLE["models"] if not name.rpartition("/")[2].startswith(OF_2023_AND_BEFORE)]
    assert len(recent) >= 100


def test_the_longest_sequence_is_that_of_the_text():
    stated = {name: catalogue.longest_stated(config) for name, config in catalogue.known_models().items()}
    assert stated["google/gemma-3-4b-it"] == 131_072 and stated["EleutherAI/gpt-j-6b"] == 2_048
    assert [name for name, longest in stated.items() if longest is None] == ["LiquidAI/LFM2-1.2B"]
