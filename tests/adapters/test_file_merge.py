"""A merge from file to file gives what a merge in memory gives, and refuses what it cannot do."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.adapters.files import WrongBase
from tests.support.merged_models import BASE, SHIPPED, merged_models, weights


@pytest.fixture(scope="module")
def models():
    return merged_models()


def test_a_merge_from_file_to_file_is_the_merge_in_memory(models, tmp_path):
    folder = merge_files(BASE, SHIPPED, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, weight in weights(found).items():
        assert torch.equal(weight, weights(models["16bit"])[name].to(torch.bfloat16)), name
    before, after = load_file(BASE / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {k for k in before if torch.equal(before[k], after[k])} == {k for k in before if "proj" not in k}
    assert (folder / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()


def test_several_files_are_merged_one_after_the_other(tmp_path):
    base = shutil.copytree(BASE, tmp_path / "tiny-llama")
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    (base / "model.safetensors").unlink()
    for number, part in enumerate((names[:10], names[10:])):
        save_file({name: tensors[name] for name in part}, base / f"model-{number}.safetensors", {"format": "pt"})
    merged = merge_files(base, SHIPPED, tmp_path / "merged")
    whole = load_file(merge_files(BASE, SHIPPED, tmp_path / "whole") / "model.safetensors")
    parts = load_file(merged / "model-0.safetensors") | load_file(merged / "model-1.safetensors")
    assert all(torch.equal(parts[name], whole[name]) for name in names)
    with safe_open(merged / "model-0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"use_dora": True}, ValueError, "has use_dora set: merge it with merge"),
        ({"rank_pattern": {"q_proj": 4}}, ValueError, "has rank_pattern set"),
        ({"base_model_name_or_path": "another"}, WrongBase, "was trained on 'another', and base is 'tiny-llama'"),
    ],
)
def test_what_a_file_merge_cannot_do_is_refused_and_leaves_nothing(change, error, match, tmp_path):
    adapter = shutil.copytree(SHIPPED, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=match):
        merge_files(BASE, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_weight_that_the_base_does_not_have_is_named(tmp_path):
    adapter = shutil.copytree(SHIPPED, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    odd = {key.replace("layers.3", "layers.7"): tensor for key, tensor in tensors.items()}
    save_file(odd, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"changes 7 weights that .* does not have, such as model.layers.7"):
        merge_files(BASE, adapter, tmp_path / "merged")
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    save_file(tensors | {key: tensors[key][:, :8].contiguous()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj.weight has the shape \(256, 256\)"):
        merge_files(BASE, adapter, tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        merge_files(tmp_path, SHIPPED, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
