"""Adapters as files: reading them, saving and loading them to the last bit, and refusing them on another base."""

import json
import os
import shutil
import signal
import sys

import peft.peft_model
import pytest
import torch
from peft import PeftModel

from notebooks.scripts import forking
from qlora_helpers import evaluation
from qlora_helpers.adapters.files import WrongBase, _base_name, describe, load_adapter, same_name, save_adapter
from qlora_helpers.chats import read_chats, split_question
from qlora_helpers.models.loading import load_model, name_in, name_of
from qlora_helpers.paths import data_path
from tests.support.short_runs import CPU, TOKENIZER, adapter, differing

SHIPPED = data_path("adapters", "sentences")
QUESTIONS = [split_question(chat)[0] for chat in read_chats(data_path("chats", "test.jsonl"))[:6]]


def base(quantization="nf4"):
    return load_model(quantization=quantization, hardware=CPU)


@pytest.fixture(scope="module")
def model():
    """The shipped adapter and a second one, with every B halved, on one 4-bit base."""
    model = load_adapter(base(), SHIPPED, "sentences")
    load_adapter(model, SHIPPED, "quiet")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.quiet" in name:
                parameter /= 2
    return model


def test_the_shipped_adapter_is_what_its_card_says():
    files = describe(SHIPPED)
    assert (files.base, files.rank, files.alpha) == ("tiny-llama", 16, 32)
    assert files.modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert files.parameters == sum(tensor.numel() for tensor in adapter(SHIPPED).values()) == 262_144
    assert files.bytes == (SHIPPED / "adapter_model.safetensors").stat().st_size
    assert json.loads((SHIPPED / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"


def test_the_shipped_adapter_answers_as_its_card_says():
    scores = json.loads((SHIPPED / "scores.json").read_text())
    chats = read_chats(data_path("chats", "test.jsonl"))[:200]
    found = evaluation.exact_match(load_adapter(base(), SHIPPED), TOKENIZER, chats)
    card = (SHIPPED.parent / "README.md").read_text()
    assert f"answers {scores['exact_match']:.1%}".replace("%", " %") in card
    assert scores["test_chats"] == 500 and abs(found - scores["exact_match"]) <= 0.05


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_named(missing, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "adapter")
    (tmp_path / "adapter" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}: it is not the folder of an adapter"):
        describe(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("said", "name"),
    [("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"), ("tiny-llama", "tiny-llama"), ("/home/me/models/tiny-llama", "tiny-llama"),
     ("./models/tiny-llama", "tiny-llama"), ("data/models/tiny-llama", "tiny-llama")],
)  # fmt: skip
def test_the_base_of_an_adapter_that_peft_saved_is_found(said, name):
    assert _base_name(said) == name


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("Qwen/Qwen2.5-7B", "Qwen2.5-7B", True), ("Qwen/Qwen2.5-7B", "someone/Qwen2.5-7B", False),
     ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", False), ("tiny-llama", "tiny-llama", True), ("a", "b", False)],
)  # fmt: skip
def test_a_local_copy_is_the_same_model(one, other, same):
    assert same_name(one, other) is same_name(other, one) is same


def test_a_model_of_the_hub_is_known_by_its_name_in_the_cache(tmp_path):
    assert name_in(tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / "0123abc") == "Qwen/Qwen2.5-7B"
    assert name_in(tmp_path / "my-model") == "my-model"


def test_saved_and_loaded_it_is_the_same_to_the_last_bit(model, tmp_path):
    for name in ("sentences", "quiet"):
        saved = save_adapter(model, tmp_path / name, name)
        assert {path.name for path in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert describe(saved).base == "tiny-llama"
    assert differing(adapter(tmp_path / "sentences"), adapter(SHIPPED)) == []
    halved = {key: tensor / 2 if "lora_B" in key else tensor for key, tensor in adapter(SHIPPED).items()}
    assert differing(adapter(tmp_path / "quiet"), halved) == []


def test_plain_peft_loads_it_too(model, tmp_path):
    plain = PeftModel.from_pretrained(base(), save_adapter(model, tmp_path / "a", "sentences")).eval()
    model.set_adapter("sentences")
    assert evaluation.answer(plain, TOKENIZER, QUESTIONS) == evaluation.answer(model, TOKENIZER, QUESTIONS)


def test_a_name_that_the_model_does_not_have_is_refused(model, tmp_path):
    with pytest.raises(KeyError, match="name='whole': this model's adapters are quiet, sentences"):
        save_adapter(model, tmp_path / "a", "whole")
    with pytest.raises(ValueError, match="name='quiet': the model has an adapter of this name"):
        load_adapter(model, SHIPPED, "quiet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["half", "train", "", "a.b"])
def test_a_name_that_torch_uses_is_refused(name, model):
    with pytest.raises(ValueError, match=f"name='{name}' is one that torch uses itself"):
        load_adapter(model, SHIPPED, name)


def test_an_adapter_is_not_overwritten_silently(model, tmp_path):
    folder = save_adapter(model, tmp_path / "a", "sentences")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_adapter(model, folder, "quiet")
    assert differing(adapter(folder), adapter(SHIPPED)) == []
    save_adapter(model, folder, "quiet", overwrite=True)
    assert differing(adapter(folder), adapter(SHIPPED)) != []


def crash_while_saving(folder):
    """Run in a separate process: die in the middle of writing the adapter's file."""
    model = load_adapter(load_model(), SHIPPED)
    whole = peft.peft_model.safe_save_file

    def half(tensors, path, **options):
        whole(tensors, path, **options)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    peft.peft_model.safe_save_file = half
    save_adapter(model, folder, overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_crash_while_an_adapter_is_saved_leaves_the_old_one_whole(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "adapter")
    crashed = forking.start(crash_while_saving, folder)
    crashed.join()
    assert crashed.exitcode == -signal.SIGKILL
    assert (tmp_path / "adapter.part" / "adapter_model.safetensors").exists()  # it came in the middle of the file
    assert differing(adapter(folder), adapter(SHIPPED)) == []
    assert describe(folder).parameters == 262_144


def test_an_adapter_is_refused_by_another_base_with_the_two_names(tmp_path):
    other = tmp_path / "another-llama"
    shutil.copytree(data_path("tiny-llama"), other)
    model = load_model(str(other), hardware=CPU)
    assert name_of(model) == "another-llama"
    with pytest.raises(
        WrongBase, match=r"was trained on 'tiny-llama', and this model is 'another-llama': load 'tiny-llama'"
    ):
        load_adapter(model, SHIPPED)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_each_row_of_a_batch_may_have_its_own_adapter(model):
    alone = {}
    for name in ("sentences", "quiet"):
        model.set_adapter(name)
        alone[name] = evaluation.answer(model, TOKENIZER, QUESTIONS)
    with model.disable_adapter():
        alone["__base__"] = evaluation.answer(model, TOKENIZER, QUESTIONS)
    names = ["sentences", "quiet", "__base__"] * 2
    mixed = evaluation.answer(model, TOKENIZER, QUESTIONS, adapters=names, batch_size=4)
    assert mixed == [alone[name][row] for row, name in enumerate(names)]
    assert len({alone[name][0] for name in alone}) > 1


def test_a_batch_needs_an_adapter_for_each_row(model):
    with pytest.raises(ValueError, match="adapters has 1 names for 6 questions"):
        evaluation.answer(model, TOKENIZER, QUESTIONS, adapters=["sentences"])
