"""A run with validation: its losses, the step that is kept, where it stops; and that a kill changes none of it."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import Trainer
from trl import SFTTrainer

from qlora_helpers import evaluation
from qlora_helpers.chats.split import split
from qlora_helpers.models.loading import load_model
from qlora_helpers.safe_folders import NEW
from qlora_helpers.settings import Settings
from qlora_helpers.training import checkpoints
from qlora_helpers.training.best import best_of, drop_superseded, patience_ended
from qlora_helpers.training.callbacks import TrainingDiverged
from qlora_helpers.training.checkpoints import log_history
from qlora_helpers.training.checksums import CHECKSUMS
from qlora_helpers.training.interrupts import Interrupted
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import complete_checkpoints, numbered_checkpoints, step_of
from tests.support.short_runs import CHATS, CPU, TOKENIZER, adapter, differing, run, trainer_of

# The rate is so high that the validation loss falls and then rises: step 4 is the best, and patience ends at step 8.
WATCHED = Settings(
    steps=12, batch_size=4, warmup_steps=2, rank=4, dropout=0.1, learning_rate=2e-2, log_steps=1, save_steps=3,
    validation=0.25, eval_steps=2, patience=2,
)  # fmt: skip
TRAINING, HELD_OUT = split(CHATS, 0.25, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run of these settings, not interrupted; it keeps so many checkpoints that a test can begin from any."""
    return run(tmp_path_factory.mktemp("finished"), replace(WATCHED, keep_checkpoints=9))


@pytest.fixture
def evaluations(monkeypatch):
    """A list of the steps at which the trainer evaluates."""
    seen, evaluate = [], Trainer.evaluate

    def noted(self, *args, **options):
        seen.append(self.state.global_step)
        return evaluate(self, *args, **options)

    monkeypatch.setattr(Trainer, "evaluate", noted)
    return seen


def left_at(step, finished, folder):
    """The folder of the same run, as a kill after the checkpoint of this step leaves it."""
    source = finished.saved_path.parent
    shutil.copy(source / "run.json", folder)
    for checkpoint in numbered_checkpoints(source):
        if step_of(checkpoint) <= step:
            shutil.copytree(checkpoint, folder / checkpoint.name)
    return folder


def same_end(resumed, finished):
    assert differing(adapter(resumed.saved_path), adapter(finished.saved_path)) == []
    for name in ("history", "validation_history", "best_step", "stopped_early", "gradient_norms"):
        assert getattr(resumed, name) == getattr(finished, name), name


# The best of a history


def test_the_best_is_the_first_of_the_lowest_and_the_untrained_model_does_not_count():
    assert best_of([]) is best_of([(0, 1.0)]) is None
    assert best_of([(0, 1.0), (2, 4.0), (4, 3.0), (6, 3.0), (8, 5.0)]) == (4, 3.0)


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([], False),
        ([3], False),
        ([3, 4], False),
        ([3, 4, 5], True),
        ([3, 4, 2], False),
        ([3, 3, 3], True),
        ([5, 4, 3], False),
    ],
)
def test_patience_ends_after_so_many_evaluations_without_a_lower_loss(losses, ends):
    history = [(0, 1.0), *enumerate(losses, start=1)]
    assert patience_ended(history, 2) is ends
    assert patience_ended(history, None) is False


# In a run


def test_a_run_keeps_the_step_with_the_lowest_validation_loss_and_stops_where_patience_ends(finished):
    losses = dict(finished.validation_history)
    assert list(losses) == [0, 2, 4, 6, 8]
    assert min(losses.values()) == losses[4] < losses[0]
    assert finished.best_step == 4 and finished.stopped_early
    assert [step for step, _ in finished.history] == list(range(1, 9))


def test_what_is_saved_and_in_the_model_is_the_best_checkpoint_s_bit_for_bit(finished):
    folder = finished.saved_path.parent
    best, last = (adapter(folder / f"checkpoint-{step}") for step in (4, 8))
    assert differing(adapter(finished.saved_path), best) == []
    assert len(differing(best, last)) == len(best)
    in_model = {
        name.replace(".default", ""): value for name, value in finished.model.named_parameters() if "lora_" in name
    }
    assert differing(in_model, best) == []
    assert not finished.model.training


def test_the_validation_loss_is_the_mean_of_all_answer_tokens(finished):
    """Of batches of 4 and 1 chats, with answers of different lengths: the mean of their means would be another."""
    losses = dict(finished.validation_history)
    assert losses[4] == pytest.approx(evaluation.loss(finished.model, TOKENIZER, HELD_OUT), rel=1e-5)
    assert losses[0] == pytest.approx(evaluation.loss(load_model(hardware=CPU), TOKENIZER, HELD_OUT), rel=1e-5)
    of_batches = [evaluation.loss(finished.model, TOKENIZER, chats) for chats in (HELD_OUT[:4], HELD_OUT[4:])]
    assert abs(sum(of_batches) / 2 - losses[4]) > 1e-3


def test_validation_changes_nothing_in_the_training(finished, tmp_path):
    plain = run(
        tmp_path, replace(WATCHED, keep_checkpoints=9, validation=None, eval_steps=None, patience=None), TRAINING
    )
    assert plain.history[:8] == finished.history
    assert plain.validation_history == [] and plain.best_step is None and not plain.stopped_early
    for name in ("checkpoint-3", "checkpoint-6"):  # after the evaluations of steps 0, 2, 4 and 6
        assert differing(adapter(finished.saved_path.parent / name), adapter(tmp_path / name)) == []


def test_what_is_kept_and_why_it_stopped_is_said(tmp_path, capsys):
    done = run(tmp_path, WATCHED)
    losses = dict(done.validation_history)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "Stopped after step 8 of 12: 2 evaluations in a row brought no lower validation loss.",
        f"The validation loss was lowest at step 4: {losses[4]:.4f}, from {losses[0]:.4f} before the run. What was trained up "
        f"to then is kept. At the last step, 8, it was {losses[8]:.4f}.",
    ]
    assert {step_of(path) for path in numbered_checkpoints(tmp_path)} == {4, 6, 8}  # two, and the best


def test_a_run_that_teaches_nothing_of_the_validation_chats_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        SFTTrainer, "prediction_step", lambda self, *args, **options: (torch.tensor(1.0 + self.state.global_step), 0, 0)
    )
    done = run(tmp_path, Settings(steps=2, batch_size=1, rank=4), validation_chats=HELD_OUT)
    assert done.best_step == 1
    assert "It never fell below that of the untrained model" in capsys.readouterr().out


def test_evaluations_come_as_often_as_is_said_and_after_the_last_step(tmp_path, evaluations):
    done = run(tmp_path, Settings(steps=5, batch_size=1, rank=4, eval_steps=3), validation_chats=HELD_OUT)
    assert evaluations == [step for step, _ in done.validation_history] == [0, 3, 5]
    assert not done.stopped_early


def test_a_run_of_epochs_has_their_steps(tmp_path):
    done = run(tmp_path, Settings(epochs=1.5, batch_size=4, accumulation=2, rank=4, log_steps=1))
    assert [step for step, _ in done.history] == [1, 2, 3, 4, 5]  # 20 chats: 3 steps, the last of one batch
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 5


def test_the_live_plot_gets_both_histories(tmp_path):
    seen = []
    settings = Settings(steps=4, batch_size=1, rank=4, log_steps=2, eval_steps=2)
    done = run(
        tmp_path, settings, validation_chats=HELD_OUT, on_loss=lambda *both: seen.append([list(one) for one in both])
    )
    assert [(len(history), len(validation)) for history, validation in seen] == [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3)]
    assert seen[-1] == [done.history, done.validation_history]


def test_the_progress_bar_has_both_losses(tmp_path, capfd):
    settings = Settings(steps=2, batch_size=1, rank=4)
    done = run(tmp_path, settings, validation_chats=HELD_OUT, progress_bar=True)
    shown = capfd.readouterr().err
    assert f"loss {done.history[-1][1]:.3f}" in shown and f"validation {done.validation_history[-1][1]:.3f}" in shown


@pytest.mark.parametrize("step", [0, 2])
def test_a_validation_loss_of_nan_stops_the_run(step, tmp_path, monkeypatch):
    predict = SFTTrainer.prediction_step

    def spoiled(self, *args, **options):
        loss, *rest = predict(self, *args, **options)
        return (loss * math.nan if self.state.global_step == step else loss), *rest

    monkeypatch.setattr(SFTTrainer, "prediction_step", spoiled)
    with pytest.raises(
        TrainingDiverged, match=f"^step {step}: the validation loss is nan, though the training losses are"
    ):
        run(tmp_path, WATCHED)
    assert not (tmp_path / f"checkpoint-{step}").exists() and not (tmp_path / "adapter").exists()


def test_a_training_loss_of_nan_is_found_before_an_evaluation(tmp_path, monkeypatch, evaluations):
    step = SFTTrainer.training_step
    monkeypatch.setattr(SFTTrainer, "training_step", lambda self, *args: step(self, *args) * math.nan)
    with pytest.raises(TrainingDiverged, match=r"^step 1: the loss is nan"):
        run(tmp_path, replace(WATCHED, log_steps=100, save_steps=None))
    assert evaluations == [0]


def test_full_fine_tuning_keeps_its_best_step_too(tmp_path):
    settings = replace(WATCHED, method="full", steps=8, learning_rate=5e-3, save_steps=None)
    model = load_model(quantization=None, hardware=CPU)
    done = train(model, TOKENIZER, CHATS, tmp_path, settings, hardware=CPU)
    assert done.best_step < done.validation_history[-1][0]
    assert evaluation.loss(done.model, TOKENIZER, HELD_OUT) == pytest.approx(
        dict(done.validation_history)[done.best_step], rel=1e-5
    )
    model_file = (
        tmp_path / "model" / "model.safetensors",
        tmp_path / f"checkpoint-{done.best_step}" / "model.safetensors",
    )
    assert len({file.read_bytes() for file in model_file}) == 1


# Resuming


@pytest.mark.parametrize("step", [2, 3, 4, 6, 8])
def test_a_resumed_run_ends_as_an_uninterrupted_one(step, finished, tmp_path, evaluations):
    """Step 2: the best is still to come. 6: it lies behind. 8: patience has ended, only the result is missing."""
    resumed = run(left_at(step, finished, tmp_path), WATCHED, resume=True)
    same_end(resumed, finished)
    assert evaluations == [at for at in (4, 6, 8) if at > step]


def test_a_run_killed_while_its_result_was_saved_is_not_trained_further(finished, tmp_path, monkeypatch, capsys):
    left_at(8, finished, tmp_path)
    (tmp_path / f".adapter.0123abcd{NEW}").mkdir()
    monkeypatch.setattr(SFTTrainer, "training_step", None)
    same_end(run(tmp_path, WATCHED, resume=True), finished)
    assert "Stopped after step 8 of 12" in capsys.readouterr().out


def test_a_run_killed_during_an_evaluation_evaluates_again(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        predict = SFTTrainer.prediction_step

        def killed(self, *args, **options):
            if self.state.global_step == 6:
                raise KeyboardInterrupt
            return predict(self, *args, **options)

        patch.setattr(SFTTrainer, "prediction_step", killed)
        with pytest.raises(Interrupted, match="the last checkpoint is that of step 4"):
            run(tmp_path, WATCHED)
    same_end(run(tmp_path, WATCHED, resume=True), finished)


def test_a_folder_may_be_moved_before_it_is_resumed(finished, tmp_path, caplog):
    (tmp_path / "before").mkdir()
    left_at(6, finished, tmp_path / "before").rename(tmp_path / "after")
    same_end(run(tmp_path / "after", WATCHED, resume=True), finished)
    assert {step_of(path) for path in numbered_checkpoints(tmp_path / "after")} == {4, 6, 8}
    assert caplog.text == ""


def test_validation_may_be_given_in_another_way_as_long_as_the_chats_are_the_same(finished, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in HELD_OUT), encoding="utf-8")
    (tmp_path / "run").mkdir()
    settings = replace(WATCHED, validation=str(path))
    same_end(run(left_at(6, finished, tmp_path / "run"), settings, TRAINING, resume=True), finished)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"validation": 0.4}, r"chats was '\w+' and is now '\w+'; validation_chats was '\w+' and is now '\w+'"),
        ({"eval_steps": 3}, "eval_steps was 2 and is now 3"),
        ({"patience": 3}, "patience was 2 and is now 3"),
        ({"patience": None}, "patience was 2 and is not set now"),
    ],
)
def test_a_run_with_another_validation_is_not_resumed(changed, said, finished, tmp_path):
    with pytest.raises(ValueError, match=f"was begun differently: {said}. Resume it as it was begun"):
        run(left_at(3, finished, tmp_path), replace(WATCHED, **changed), resume=True)


def test_other_validation_chats_alone_are_noticed(tmp_path):
    settings = Settings(steps=2, batch_size=1, rank=4, save_steps=1)
    run(tmp_path, settings, TRAINING, validation_chats=HELD_OUT)
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"begun differently: validation_chats was '\w+' and is now '\w+'\. Resume"):
        run(tmp_path, settings, TRAINING, validation_chats=HELD_OUT[1:], resume=True)
    with pytest.raises(
        ValueError, match=r"begun differently: eval_steps was 1 and is not set now; validation_chats was"
    ):
        run(tmp_path, settings, TRAINING, resume=True)


def test_epochs_and_their_steps_are_the_same_run(tmp_path):
    settings = Settings(steps=5, batch_size=4, rank=4, save_steps=2, warmup_steps=1)
    done = run(tmp_path, settings)
    shutil.rmtree(tmp_path / "adapter")
    again = run(tmp_path, replace(settings, steps=None, epochs=1), resume=True)
    assert again.history == done.history


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (shutil.rmtree, "is gone"),
        (lambda best: (best / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
        (lambda best: (best / "adapter_config.json").write_text("{}"), r"has files that are not as they were written"),
    ],
)
def test_a_best_checkpoint_that_is_damaged_is_noticed_before_the_run_goes_on(
    harm, said, finished, tmp_path, monkeypatch
):
    harm(left_at(6, finished, tmp_path) / "checkpoint-4")
    monkeypatch.setattr(SFTTrainer, "training_step", None)
    with pytest.raises(
        ValueError, match=f"checkpoint-4, which has the lowest validation loss of the run, {said}.*Put it back"
    ):
        run(tmp_path, WATCHED, resume=True)


# Which checkpoints are kept


def test_checkpoints_go_only_once_a_new_one_is_complete(tmp_path, monkeypatch):
    seen, write = [], checkpoints.write_checksums

    def noted(checkpoint, *how):
        seen.append({step_of(path) for path in complete_checkpoints(tmp_path)})
        write(checkpoint, *how)

    monkeypatch.setattr(checkpoints, "write_checksums", noted)
    run(tmp_path, Settings(steps=5, batch_size=1, rank=4, save_steps=1))
    assert seen == [set(), {1}, {1, 2}, {2, 3}, {3, 4}]
    assert {step_of(path) for path in complete_checkpoints(tmp_path)} == {4, 5}


def test_the_best_of_each_checkpoint_that_is_kept_stays(finished, tmp_path):
    """So the one before the newest is good to resume from, too."""
    left_at(6, finished, tmp_path)
    drop_superseded(tmp_path, 2)
    assert {step_of(path) for path in numbered_checkpoints(tmp_path)} == {4, 6}
    shutil.copytree(finished.saved_path.parent / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(finished.saved_path.parent / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-6" / CHECKSUMS).unlink()  # as a kill leaves it
    drop_superseded(tmp_path, 2)
    assert {step_of(path) for path in numbered_checkpoints(tmp_path)} == {2, 3, 4}
    assert log_history(tmp_path / "checkpoint-3")


def test_an_older_checkpoint_that_is_damaged_does_not_stop_a_run(finished, tmp_path):
    left_at(6, finished, tmp_path)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")
    drop_superseded(tmp_path, 2)
    assert {step_of(path) for path in numbered_checkpoints(tmp_path)} == {4, 6}


def test_evaluation_leaves_the_random_state_as_it_is(tmp_path):
    trainer = trainer_of(tmp_path, settings=Settings(steps=2, batch_size=4, rank=4))
    before = torch.get_rng_state()
    trainer.evaluate(trainer.train_dataset.select(range(5)))
    assert torch.equal(torch.get_rng_state(), before)
