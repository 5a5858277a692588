"""A merge from file to file gives what a merge in memory gives, and refuses what it cannot do."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.adapters.files import WrongBase, load_adapter, save_adapter
from qlora_helpers.models.fingerprint import fingerprint
from qlora_helpers.models.loading import load_model
from tests.support.merged_models import BASE, SHIPPED, merged_models, weights
from tests.support.short_runs import CPU


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


def changed(folder, options=None, change=None):
    """A copy of the shipped adapter with other options in its config, and other tensors in its file.

    It has no fingerprint of its base, so that the name of the base decides.
    """
    adapter = shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("base.json"))
    config = json.loads((adapter / "adapter_config.json").read_text()) | (options or {})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(change(tensors) if change else tensors, adapter / "adapter_model.safetensors")
    return adapter


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"use_dora": True}, ValueError, "use_dora=True: .*: merge it with merge"),
        ({"fan_in_fan_out": True}, ValueError, "fan_in_fan_out=True: .*: merge it with merge"),
        ({"lora_bias": True}, ValueError, "lora_bias=True: .*: keep the adapter beside its base"),
        ({"r": 64}, ValueError, r"lora_A.weight in the shape \(16, \d+\), but its config .* need \(64, \d+\)"),
        (
            {"rank_pattern": {"v_proj": 4}},
            ValueError,
            r"v_proj.lora_A.weight in the shape \(16, 256\), .* need \(4, 256\)",
        ),
        ({"target_modules": ["q_proj"]}, ValueError, "no place for on this base, such as .*down_proj.lora_A.weight"),
        ({"base_model_name_or_path": "another"}, WrongBase, "was trained on 'another', and this model is 'tiny-llama'"),
        ({"base_model_name_or_path": None}, ValueError, "names no base: write base_model_name_or_path"),
    ],
)
def test_what_a_file_merge_cannot_do_is_refused_and_leaves_nothing(options, error, match, tmp_path):
    adapter = changed(tmp_path / "adapter", options)
    with pytest.raises(error, match=match):
        merge_files(BASE, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{Q_PROJ}.lora_A.weight"}, f"such as {Q_PROJ}.lora_A"),
        (lambda t: {k: v for k, v in t.items() if k != f"{Q_PROJ}.lora_B.weight"}, f"such as {Q_PROJ}.lora_B"),
        (lambda t: {k: v for k, v in t.items() if "q_proj" not in k}, f"such as {Q_PROJ}.lora_A"),
        (lambda t: t | {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(256)}, "no place for .*lora_magnitude_vector"),
        (lambda t: t | {f"{Q_PROJ}.base_layer.bias": torch.ones(256)}, "no place for .*base_layer.bias"),
        (lambda t: t | {f"{Q_PROJ}.lora_B.bias": torch.ones(256)}, "no place for .*lora_B.bias"),
        (lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(16, 1216)}, "lora_embedding_A"),
        (lambda t: {k.replace("layers.3", "layers.7"): v for k, v in t.items()}, "such as .*layers.3.mlp.down_proj.lora_A"),
        (lambda t: t | {f"{Q_PROJ}.lora_A.weight": t[f"{Q_PROJ}.lora_A.weight"][:, :8].contiguous()}, r"shape \(16, 8\)"),
        (lambda t: t | {f"{Q_PROJ}.lora_B.weight": t[f"{Q_PROJ}.lora_B.weight"][:, :8].contiguous()}, r"shape \(256, 8\)"),
    ],
)  # fmt: skip
def test_a_file_with_a_tensor_too_many_too_few_or_of_another_shape_is_refused(change, match, tmp_path):
    adapter = changed(tmp_path / "adapter", change=change)
    with pytest.raises(ValueError, match=f"adapter'.* its adapter_model.safetensors (has|lacks) .*{match}"):
        merge_files(BASE, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_base_written_as_a_path_is_the_model_in_that_folder(tmp_path):
    """As PEFT writes it: the path on the machine of the run."""
    for number, path in enumerate((str(BASE), "/home/someone/models/tiny-llama", "./tiny-llama", "a/b/tiny-llama")):
        merge_files(
            BASE, changed(tmp_path / f"{number}", {"base_model_name_or_path": path}), tmp_path / f"merged-{number}"
        )
    for name, path in (("path", "/home/someone/another"), ("hub", "someone/another")):
        with pytest.raises(WrongBase, match=f"was trained on '{'another' if name == 'path' else path}'"):
            merge_files(BASE, changed(tmp_path / name, {"base_model_name_or_path": path}), tmp_path / "merged")
    wanted = merge_files(BASE, SHIPPED, tmp_path / "wanted") / "model.safetensors"
    assert (tmp_path / "merged-0" / "model.safetensors").read_bytes() == wanted.read_bytes()


def test_a_base_may_be_written_as_a_path_with_dots(tmp_path, monkeypatch):
    monkeypatch.chdir(BASE)
    merge_files(".", SHIPPED, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "was saved in 4 bits"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
        ({"model_type": "t5"}, "model_type='t5'"),
        ({"num_hidden_layers": 3}, "no place for on this base, such as .*layers.3"),
        ({"hidden_size": 128, "head_dim": 32}, r"in the shape .*, but its config .* and the base need"),
    ],
)
def test_a_base_that_is_no_16_bit_model_of_this_shape_is_refused(entries, match, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "tiny-llama")
    config = json.loads((base / "config.json").read_text()) | entries
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        merge_files(base, SHIPPED, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-llama"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: None, "changes 1 weights that .* does not have, such as model.layers.0.self_attn.q_proj.weight"),
        (lambda w: w[:128].contiguous(), r"q_proj.weight has the shape \(128, 256\) in BF16"),
        (lambda w: w.to(torch.float8_e4m3fn), r"q_proj.weight has the shape \(256, 256\) in F8_E4M3"),
    ],
)
def test_a_weight_of_the_base_that_is_not_as_the_adapter_needs_it_is_named(change, match, tmp_path, tmp_path_factory):
    adapter = changed(tmp_path_factory.mktemp("adapter") / "sentences")
    base = shutil.copytree(BASE, tmp_path / "tiny-llama")
    tensors, name = load_file(base / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = change(tensors[name])
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, base / "model.safetensors")
    with pytest.raises(ValueError, match=match):
        merge_files(base, adapter, tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        merge_files(tmp_path, SHIPPED, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"^base='.*sentences': is the folder of an adapter"):
        merge_files(SHIPPED, SHIPPED, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-llama"}


def test_a_second_copy_of_the_base_s_weights_is_not_put_beside_the_merged_ones(tmp_path):
    base = shutil.copytree(BASE, tmp_path / "tiny-llama")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "tiny.Q4.gguf"):
        (base / name).write_bytes(b"the base's weights")
    merged = merge_files(base, SHIPPED, tmp_path / "merged")
    assert {path.name for path in merged.iterdir()} == {path.name for path in BASE.iterdir()}
    unmerged = {"README.md", "config.json", "tokenizer.json"}
    assert all((merged / name).read_bytes() == (BASE / name).read_bytes() for name in unmerged)


def test_another_model_of_the_same_name_is_refused(tmp_path):
    base = shutil.copytree(BASE, tmp_path / "tiny-llama")
    saved = save_adapter(load_adapter(load_model(str(base), hardware=CPU), SHIPPED), tmp_path / "adapter")
    merge_files(BASE, saved, tmp_path / "merged")
    tensors = load_file(base / "model.safetensors")
    save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, base / "model.safetensors")
    with pytest.raises(WrongBase, match=f"weights {fingerprint(BASE)}, .* weights {fingerprint(base)}: load the files"):
        merge_files(base, saved, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
