"""Schedules, clipping and logging: what each setting does, and what a run from before them does."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

from qlora_helpers.models.loading import load_model
from qlora_helpers.settings import Settings
from qlora_helpers.training.run_folder import brought_up_to_date
from qlora_helpers.training.trainer import build_trainer
from tests.support.short_runs import CHATS, CPU, SHORT, TOKENIZER, adapter, differing, run, trainer_of

# Settings


def test_the_defaults_are_those_of_runs_before_these_settings_existed(tmp_path):
    arguments = build_trainer(load_model(hardware=CPU), TOKENIZER, CHATS[:1], tmp_path, Settings(), CPU).args
    assert (arguments.lr_scheduler_type, arguments.max_grad_norm, arguments.logging_steps) == ("linear", 1.0, 15)


def test_a_constant_rate_has_its_warm_up(tmp_path):
    trainer = trainer_of(tmp_path, settings=Settings(steps=10, warmup_steps=4, schedule="constant", learning_rate=1.0))
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    rates = []
    for _ in range(8):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_clipping_bounds_the_step_of_plain_descent_and_none_does_not(tmp_path):
    def moved(name, clip):
        settings = Settings(
            steps=2, batch_size=2, warmup_steps=1, learning_rate=1e-3, rank=4, optimizer="sgd", max_grad_norm=clip,
            log_steps=1,
        )  # fmt: skip
        done = run(tmp_path / name, settings)
        start = dict(trainer_of(tmp_path / "start", settings=settings).model.named_parameters())
        differences = [(p - start[n]).norm() for n, p in done.model.named_parameters() if "lora_" in n]
        return torch.stack(differences).norm().item(), done.gradient_norms[-1][1]

    clipped, norm = moved("clipped", 0.01)
    unclipped, same = moved("unclipped", None)
    assert norm == pytest.approx(same) and norm > 0.1  # logged as before clipping in both
    assert clipped == pytest.approx(1e-3 * 0.01, rel=0.01)
    assert unclipped == pytest.approx(1e-3 * norm, rel=0.01)


def stop_at(step):
    def stop(history):
        if history[-1][0] == step:
            raise KeyboardInterrupt

    return stop


def interrupted(folder, settings, change):
    """Begin a run, stop it after its first checkpoint, and change its record."""
    with pytest.raises(KeyboardInterrupt):
        run(folder, settings, on_loss=stop_at(4))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(change(record)))


def without_the_new_settings(record):
    """As an older version wrote it, which had one word for LoRA on a 4-bit base and on any other."""
    kept = {name: value for name, value in record.items() if name not in ("schedule", "max_grad_norm")}
    return kept | {"method": "lora"}


def test_a_run_begun_before_these_settings_existed_continues_as_before(tmp_path):
    interrupted(tmp_path / "old", SHORT, without_the_new_settings)
    resumed = run(tmp_path / "old", resume=True)
    whole = run(tmp_path / "whole")
    assert differing(adapter(resumed.saved_path), adapter(whole.saved_path)) == []
    assert resumed.gradient_norms == whole.gradient_norms


def test_a_run_begun_before_these_settings_existed_does_not_continue_with_others(tmp_path):
    interrupted(tmp_path, SHORT, without_the_new_settings)
    with pytest.raises(ValueError, match=r"begun differently: schedule was 'linear' and is now 'cosine'\."):
        run(tmp_path, replace(SHORT, schedule="cosine"), resume=True)


def test_the_interval_of_logging_may_change_when_a_run_is_resumed(tmp_path):
    interrupted(tmp_path, SHORT, lambda record: record)
    resumed = run(tmp_path, replace(SHORT, log_steps=3), resume=True)
    assert [step for step, _ in resumed.history] == [1, 2, 3, 6]


def test_a_record_from_before_these_settings_is_completed_with_what_every_run_did():
    """Those versions named neither: they had the trainer's own clipping and schedule."""
    arguments = TrainingArguments()
    record = brought_up_to_date(without_the_new_settings({"method": "qlora", "schedule": None, "max_grad_norm": None}))
    assert (record["schedule"], record["max_grad_norm"]) == (arguments.lr_scheduler_type, arguments.max_grad_norm)
    kept = {"schedule": "cosine", "max_grad_norm": None, "method": "qlora"}
    assert brought_up_to_date(kept) == kept
