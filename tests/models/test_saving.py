"""A saved model is loaded by plain transformers, and overwrites nothing."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_helpers.adapters.drift import drift, logits
from qlora_helpers.chats import read_chats
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.saving import save_model
from qlora_helpers.paths import data_path
from qlora_helpers.safe_folders import OLD
from tests.support.merged_models import merged_models, weights
from tests.support.short_runs import CPU, TOKENIZER

CHATS = read_chats(data_path("chats", "test.jsonl"))[:50]


@pytest.fixture(scope="module")
def models():
    return merged_models()


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


def test_a_model_that_lost_its_name_to_a_kill_is_found(models, tmp_path):
    """A kill between the two renames of a new save; then the name was looked up on the Hub."""
    folder = save_model(models["16bit"], TOKENIZER, tmp_path / "merged")
    folder.rename(tmp_path / f".merged.0123abcd{OLD}")
    assert load_tokenizer(str(folder)).vocab_size == TOKENIZER.vocab_size
    assert load_model(str(folder), quantization=None, hardware=CPU).num_parameters() > 10**6
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_model_that_was_loaded_from_4_bit_files_is_saved_too(tmp_path):
    """transformers would reverse the unpacking, which has no reverse."""
    packed = save_model(load_model(hardware=CPU), TOKENIZER, tmp_path / "packed")
    again = save_model(load_model(str(packed), hardware=CPU), TOKENIZER, tmp_path / "again")
    one, other = (load_file(folder / "model.safetensors") for folder in (packed, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    decoded = load_model(str(packed), hardware=CPU).dequantize()
    wanted = {name: weight.clone() for name, weight in decoded.state_dict().items()}
    folder = save_model(decoded, TOKENIZER, tmp_path / "decoded")
    assert all(torch.equal(wanted[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())
    assert not getattr(AutoModelForCausalLM.from_pretrained(folder), "is_quantized", False)
