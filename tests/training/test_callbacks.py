"""What watches a run: its losses, norms and spikes."""

import math

import pytest
import trl

from qlora_helpers.settings import Settings
from qlora_helpers.training.callbacks import MOST_SPIKES_SAID, TrainingDiverged
from tests.support.short_runs import CHATS, run

# In a run


def made_up(losses, monkeypatch):
    """Training steps that report these losses, whatever the model does."""
    training_step = trl.SFTTrainer.training_step

    def reporting(self, *args, **kwargs):
        return 0 * training_step(self, *args, **kwargs) + losses[self.state.global_step]

    monkeypatch.setattr(trl.SFTTrainer, "training_step", reporting)


def test_a_provoked_spike_is_named_and_in_the_run(tmp_path, capsys):
    settings = Settings(steps=10, batch_size=4, warmup_steps=4, learning_rate=0.1, rank=4)
    done = run(tmp_path, settings)
    spike = done.spikes[0]
    assert spike.step <= 8 and spike.loss > 1.5 * spike.usual
    assert dict(done.step_losses)[spike.step] == spike.loss
    assert str(spike) in capsys.readouterr().out.splitlines()


def test_a_healthy_short_run_says_nothing_and_has_its_losses_and_norms(tmp_path, capsys):
    done = run(tmp_path, Settings(steps=6, batch_size=2, rank=4, log_steps=2))
    assert done.spikes == [] and capsys.readouterr().out == ""
    assert [step for step, _ in done.step_losses] == [1, 2, 3, 4, 5, 6]
    pairs = zip(done.step_losses[::2], done.step_losses[1::2], strict=True)
    means = [(one + other) / 2 for (_, one), (_, other) in pairs]
    assert [step for step, _ in done.history] == [step for step, _ in done.gradient_norms] == [2, 4, 6]
    assert [loss for _, loss in done.history] == pytest.approx(means, rel=1e-5)
    assert all(norm > 0 for _, norm in done.gradient_norms)


def test_the_loss_of_a_step_is_that_of_all_its_batches(tmp_path):
    done = run(tmp_path, Settings(steps=3, batch_size=2, accumulation=2, rank=4, log_steps=1))
    assert [step for step, _ in done.step_losses] == [1, 2, 3]
    assert done.step_losses == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in done.history]


def test_many_spikes_are_not_all_printed(tmp_path, monkeypatch, capsys):
    made_up([1.0] * 4 + [9.0, 1.0] * 8, monkeypatch)
    done = run(tmp_path, Settings(steps=20, batch_size=1, rank=4), CHATS[:1])
    assert [spike.step for spike in done.spikes] == list(range(5, 20, 2))
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("loss spike")] == [str(s) for s in done.spikes[:MOST_SPIKES_SAID]]
    assert said[-1] == "Further spikes are only counted: run.spikes has them all."


def test_a_nan_after_a_spike_says_so(tmp_path, monkeypatch):
    made_up([1.0, 1.0, 1.0, 9.0, 1.0, math.nan], monkeypatch)
    with pytest.raises(
        TrainingDiverged, match=r"^step 6: the loss is nan\..* Before it came a loss spike at step 4: 9"
    ):
        run(tmp_path, Settings(steps=10, batch_size=1, rank=4), CHATS[:1])
