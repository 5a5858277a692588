"""Short runs of the shipped model on a CPU, for the tests of training and of checkpoints."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qlora_helpers.chats import read_chats
from qlora_helpers.hardware import Hardware
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train
from qlora_helpers.training.trainer import build_trainer

CPU = Hardware("cpu", "gear", None, 0, None, False, 1, 0)
TOKENIZER = load_tokenizer()
CHATS = read_chats(data_path("chats", "train.jsonl"))[:20]  # less than two epochs of the runs below
# dropout and the order of chats both need the checkpoint's random state
SHORT = Settings(steps=6, batch_size=4, warmup_steps=2, rank=4, dropout=0.1, save_steps=3)


def run(output_dir, settings=SHORT, chats=CHATS, **options):
    return train(load_model(hardware=CPU), TOKENIZER, chats, output_dir, settings, hardware=CPU, **options)


def trainer_of(output_dir, quantization="nf4", settings=SHORT, chats=CHATS):
    model = load_model(quantization=quantization, hardware=CPU)
    settings = replace(settings, method="qlora" if quantization else "lora")
    return build_trainer(model, TOKENIZER, chats, output_dir, settings, CPU)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def differing(one, other):
    """The names of the tensors that are not bit-identical."""
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


def assert_learnt_the_same(one, other, losses=1e-4, adapters=2e-3):
    """Within rounding: the losses of each step, and the adapters at the end."""
    for (_, a), (_, b) in zip(one.step_losses, other.step_losses, strict=True):
        assert a == pytest.approx(b, rel=losses)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        if a.requires_grad:
            assert (a - b).norm() <= adapters * a.norm()
