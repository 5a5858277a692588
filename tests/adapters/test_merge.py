"""Merging: each way compared with a formula, its effect with the measured tables, and nothing lost in files."""

import json
import shutil
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.scripts.measure import merging as measure_merging
from qlora_helpers.adapters.drift import drift, logits
from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.adapters.files import WrongBase, load_adapter
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
from tests.support.short_runs import CPU, TOKENIZER

SHIPPED, BASE = data_path("adapters", "sentences"), data_path("tiny-llama")
CHATS = read_chats(data_path("chats", "test.jsonl"))[:50]
LLAMA_8B = find_shape("meta-llama/Llama-3.1-8B")


def weights(model):
    return {name: layer.weight.detach() for name, layer in linear_layers(model)}


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
    """The unmerged model, and the merged one of each way."""
    merged = {into: merge(SHIPPED, into, hardware=CPU) for into in BASES}
    return {"unmerged": load_adapter(load_model(hardware=CPU), SHIPPED)} | merged


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


def test_drift_is_counted_over_tokens_and_not_over_padding(models):
    short = [CHATS[0], CHATS[1] + CHATS[2]]
    together, alone = logits(models["unmerged"], TOKENIZER, short), logits(models["unmerged"], TOKENIZER, short[:1])
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-3, rtol=1e-3)


def test_drift_of_known_numbers():
    found = drift(torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[1.0, 2.5], [1.0, 0.0]]))
    assert (found.largest, found.mean, found.same_choice) == (4.0, 1.375, 0.5)
    with pytest.raises(ValueError, match=r"found has the shape \(2, 2\), wanted \(1, 2\)"):
        drift(torch.zeros(2, 2), torch.zeros(1, 2))


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="into='8bit': choose one of 4bit, dequantised, 16bit"):
        merge(SHIPPED, "8bit")
    with pytest.raises(ValueError, match="into='8bit': choose one of 4bit, dequantised, 16bit"):
        predict_merge(LLAMA_8B, "8bit")
    with pytest.raises(ValueError, match=r"settings.method='full'"):
        predict_merge(LLAMA_8B, "16bit", replace(GPU_RUN, method="full"))


def test_a_token_takes_time(models):
    assert 0 < seconds_per_token(models["16bit"], TOKENIZER, CHATS[0][:1], tokens=4) < 5


# Files


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


def test_a_saved_model_is_loaded_by_plain_transformers(models, tmp_path):
    folder = save_model(models["16bit"], TOKENIZER, tmp_path / "merged", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.bfloat16 and models["16bit"].dtype == torch.float32
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(models["16bit"])[name].to(torch.bfloat16)), name
    four = save_model(models["4bit"], TOKENIZER, tmp_path / "merged-4bit")
    again = load_model(str(four), hardware=CPU)
    assert drift(logits(again, TOKENIZER, CHATS), logits(models["4bit"], TOKENIZER, CHATS)).largest < 1e-3


def test_a_model_is_not_saved_over_another_nor_with_its_adapters_beside(models, tmp_path):
    folder = save_model(models["16bit"], TOKENIZER, tmp_path / "merged")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_model(models["dequantised"], TOKENIZER, folder)
    with pytest.raises(ValueError, match="model has adapters attached: merge them first"):
        save_model(models["unmerged"], TOKENIZER, tmp_path / "other")
    with pytest.raises(ValueError, match="the model is 4-bit"):
        save_model(models["4bit"], TOKENIZER, tmp_path / "other", dtype=torch.bfloat16)
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


# At full size


@pytest.fixture(scope="module")
def measured():
    return {r["way"]: r for r in json.loads(data_path("measured", "merging.json").read_text())["rows"]}


@pytest.mark.parametrize("into", BASES)
def test_the_memory_of_a_merge_is_predicted(into, measured):
    plan, row = predict_merge(LLAMA_8B, into), measured[into]
    assert plan.peak_bytes == pytest.approx(max(row["base_peak_bytes"], row["merge_peak_bytes"]), rel=0.01)
    if into != "dequantised":  # there, unused memory had not been released yet when it was measured
        assert plan.base_bytes == pytest.approx(row["base_bytes"], rel=0.002)
    assert plan.merged_bytes == pytest.approx(row["bytes"], rel=0.01)


def test_a_larger_rank_and_fewer_layers_change_the_memory_of_a_merge():
    small, large = (predict_merge(LLAMA_8B, "16bit", replace(GPU_RUN, rank=rank)) for rank in (16, 64))
    assert large.peak_bytes - small.peak_bytes == large.adapter_bytes - small.adapter_bytes == 3 * small.adapter_bytes
    narrow = predict_merge(LLAMA_8B, "16bit", replace(GPU_RUN, target_modules=("q_proj",)))
    assert narrow.peak_bytes - narrow.base_bytes - narrow.adapter_bytes == 8 * 4096 * 4096


def test_every_way_was_measured_at_full_size(measured):
    assert list(measured) == [*measure_merging.WAYS, "16bit, from file to file"]
    assert measured["16bit, from file to file"]["differing_values"] == 0


def test_what_a_step_is_compared_with_is_measured_first():
    assert measure_merging.steps_of(None) == [*measure_merging.WAYS, "files"]
    assert measure_merging.steps_of(["4bit"]) == ["unmerged", "4bit"]
    assert measure_merging.steps_of(["files"]) == ["unmerged", "16bit", "files"]


def test_the_script_measures_each_way(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_merging, "STEPS", 2)
    monkeypatch.setattr(measure_merging, "TOKENS", 32)
    base, adapter, merged = (tmp_path / name for name in ("tiny-llama", "adapter", "merged"))
    shutil.copytree(BASE, base)
    trained = measure_merging.train_adapter(base, adapter)
    assert trained["trained_parameters"] == 262_144 and len(trained["losses"]) == 2
    rows = {
        way: measure_merging.measure(way, base, adapter, merged, tmp_path / "logits.pt")
        for way in ("unmerged", "16bit", "16bit, then 4bit")
    }
    assert rows["unmerged"]["largest"] == 0 < rows["16bit, then 4bit"]["mean"]
    assert rows["16bit"]["disk_bytes"] == (merged / "model.safetensors").stat().st_size
    assert measure_merging.file_merge(base, adapter, merged)["tensors"] == 39
