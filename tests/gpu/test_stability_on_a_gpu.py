"""Real float16: a run that overflows skips steps, names its spike, and reads its losses only when it logs."""

import torch

from qlora_helpers.chats import read_chats
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.callbacks import TrainingDiverged
from qlora_helpers.training.run import train
from qlora_helpers.training.trainer import build_trainer

CHATS = read_chats(data_path("chats", "train.jsonl"))[:128]


def test_float16_skips_the_steps_whose_gradients_overflow(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_GEAR", "t4")
    settings = Settings(steps=16, batch_size=8, warmup_steps=2, learning_rate=0.1)
    try:
        run = train(load_model(), load_tokenizer(), CHATS, tmp_path, settings)
    except TrainingDiverged as error:  # then the loss has overflowed float16, and the message says so
        assert "the loss is" in str(error) or "overflowed" in str(error)
    else:
        assert run.spikes and run.spikes[0].step <= 8
        said = capsys.readouterr().out
        print(said, "skipped:", run.skipped_steps)
        assert bool(run.skipped_steps) is ("gradients overflowed" in said)


def test_a_healthy_float16_run_has_no_spike_and_skips_few_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_GEAR", "t4")
    run = train(load_model(), load_tokenizer(), CHATS, tmp_path, Settings(steps=16, batch_size=8, warmup_steps=2))
    assert run.spikes == [] and len(run.skipped_steps) < 4
    assert len(run.step_losses) == 16


def test_losses_are_read_only_when_they_are_logged(tmp_path, monkeypatch):
    """No loss leaves the GPU between two logs."""
    monkeypatch.setenv("QLORA_GEAR", "ampere")
    from qlora_helpers.hardware import detect

    settings = Settings(steps=4, batch_size=4, log_steps=4)
    trainer = build_trainer(load_model(), load_tokenizer(), CHATS, tmp_path, settings, detect())
    trainer.train()
    assert [step for step, _ in trainer.step_losses] == [1, 2, 3, 4]
    assert all(isinstance(loss, torch.Tensor) and loss.is_cuda for _, loss in trainer.step_losses)
