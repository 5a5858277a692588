"""Full fine-tuning: what is trained and saved, resumed to the last bit, and refused for a 4-bit model."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_helpers.models.fingerprint import fingerprint_of
from qlora_helpers.models.loading import load_model
from qlora_helpers.settings import Settings
from qlora_helpers.training.checkpoints import last_whole_checkpoint
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import unfinished_run_folder
from tests.support.short_runs import CHATS, CPU, TOKENIZER, differing

FULL = Settings(method="full", steps=4, batch_size=2, warmup_steps=1, learning_rate=1e-4, save_steps=2)


def run(folder, settings=FULL, **options):
    return train(
        load_model(quantization=None, hardware=CPU), TOKENIZER, CHATS, folder, settings, hardware=CPU, **options
    )


def trained(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "run"
    return folder, run(folder)


def test_every_weight_is_trained_and_in_float32(finished):
    _, done = finished
    before = dict(load_model(quantization=None, hardware=CPU).named_parameters())
    after = dict(done.model.named_parameters())
    assert before.keys() == after.keys()  # no adapters
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert done.trainable_parameters == done.all_parameters == sum(p.numel() for p in before.values()) == 2_984_192


def test_the_trained_model_has_no_fingerprint_of_the_files_that_it_was_loaded_from(finished):
    assert fingerprint_of(load_model(quantization=None, hardware=CPU)) is not None
    assert fingerprint_of(finished[1].model) is None


def test_the_whole_model_is_saved_and_plain_transformers_loads_it(finished):
    folder, done = finished
    assert done.saved_path == folder / "model" and not (folder / "adapter").exists()
    plain = dict(AutoModelForCausalLM.from_pretrained(done.saved_path, dtype=torch.float32).named_parameters())
    assert all(torch.equal(p, plain[name]) for name, p in done.model.named_parameters())


@pytest.mark.parametrize("last", ["checkpoint-2", "checkpoint-4"])  # in mid-run; after its last step
def test_a_killed_run_ends_as_an_uninterrupted_one(last, finished, tmp_path):
    folder, _ = finished
    shutil.copy(folder / "run.json", tmp_path)
    shutil.copytree(folder / last, tmp_path / last)
    run(tmp_path, resume=True)
    assert differing(trained(tmp_path), trained(folder)) == []


def test_a_checkpoint_without_its_weights_is_refused(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    assert last_whole_checkpoint(tmp_path, method="full") == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model.safetensors"):
        last_whole_checkpoint(tmp_path, method="full")


def test_a_finished_run_is_neither_resumed_nor_overwritten(finished, monkeypatch):
    folder, _ = finished
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(folder)
    with pytest.raises(ValueError, match="is finished: load what it trained"):
        run(folder, resume=True)
    monkeypatch.setenv("QLORA_RUNS", str(folder.parent))
    folder.rename(folder.with_name("full-1"))
    assert unfinished_run_folder("full").name == "full-2"
    folder.with_name("full-1").rename(folder)


def test_a_run_of_adapters_is_not_resumed_as_a_full_one(finished, tmp_path):
    shutil.copy(finished[0] / "run.json", tmp_path / "run.json")
    with pytest.raises(ValueError, match="method was 'full' and is now 'lora'"):
        run(tmp_path, dataclasses.replace(FULL, method="lora"), resume=True)


def test_weights_in_4_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="method='full': 4-bit weights cannot be trained"):
        train(load_model(hardware=CPU), TOKENIZER, CHATS, tmp_path, FULL, hardware=CPU)
