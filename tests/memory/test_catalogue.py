"""Models by name, and their configs against published parameter counts."""

import json
from types import SimpleNamespace

import pytest

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
    file = json.loads(catalogue.TABLE.read_text())
    assert file["aliases"]
    for alias, name in file["aliases"].items():
        assert find_shape(alias) == find_shape(name) == ModelShape.from_config(file["models"][name])
    assert find_shape("meta-llama/Llama-3.1-8B-Instruct") == LLAMA_8B != QWEN_7B


def test_a_name_without_its_owner_means_one_shape():
    known = json.loads(catalogue.TABLE.read_text())["models"]
    assert {*known} <= {*catalogue.known_models()}
    for name in catalogue.known_models():
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
