"""Only loss spikes are named as such; clipping and schedule reach the trainer; lesson 8 is right about its faults."""

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl

from data.scripts.measure import stability as measure_stability
from qlora_helpers import evaluation
from qlora_helpers.chats import read_chats
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.callbacks import MOST_SPIKES_SAID, TrainingDiverged
from qlora_helpers.training.faulty_runs import collator_run, sft_trainer
from qlora_helpers.training.spikes import NATS, SHARE, SPREADS, WINDOW, SpikeWatch, find_spikes
from qlora_helpers.training.trainer import build_trainer
from tests.support.short_runs import CHATS, CPU, SHORT, TOKENIZER, adapter, differing, run, trainer_of

# the loss of every step: the course's own run (300 steps of 16), and runs of 200 steps with smaller batches
HEALTHY = json.loads((Path(__file__).parent / "healthy_losses.json").read_text())
MEASURED = json.loads(data_path("measured", "stability.json").read_text())


def numbered(losses):
    return list(enumerate(losses, start=1))


# The rule


def noisy(count, level, spread, seed=0):
    draw = random.Random(seed)
    return [level + draw.gauss(0, spread) for _ in range(count)]


def test_a_made_up_spike_is_named_with_its_step():
    losses = noisy(60, level=1.0, spread=0.05)
    losses[40] = 3.0
    (spike,) = find_spikes(numbered(losses))
    assert (spike.step, spike.loss, spike.peak, spike.steps) == (41, 3.0, 3.0, 1)
    assert spike.usual == statistics.median(losses[20:40])
    assert str(spike) == f"loss spike at step 41: 3, where {spike.usual:.4g} is usual (limit {spike.limit:.4g})"


def test_the_limit_is_the_rule_computed_by_hand():
    before = [2.0, 2.2, 1.9, 2.1, 2.4]  # median 2.1; distances 0.1, 0.1, 0.2, 0, 0.3: median 0.1
    limit = 2.1 + max(SPREADS * 1.4826 * 0.1, SHARE * 2.1, NATS)
    assert find_spikes(numbered([*before, limit - 1e-6])) == []
    (spike,) = find_spikes(numbered([*before, limit + 1e-6]))
    assert spike.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "losses",
    [
        [10 * 0.95**step for step in range(100)],  # falling
        noisy(500, level=1.0, spread=0.1),
        [0.05, 0.04, 0.05, 0.06, 0.05, 0.2],  # four times the usual, yet not a spike
        [1.0, 1.0, 9.0],  # too early to tell
        [],
    ],
)
def test_what_is_not_a_spike(losses):
    assert find_spikes(numbered(losses)) == []


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_none(name):
    assert len(HEALTHY[name]) >= 200
    assert find_spikes(numbered(HEALTHY[name])) == []


def test_the_losses_called_healthy_are_those_of_the_course_s_run(tmp_path):
    seen = []

    def watch(history):
        seen.append(history[-1][1])
        stop_at(3)(history)

    chats = read_chats(data_path("chats", "train.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Settings(log_steps=1), chats, on_loss=watch)
    assert seen == pytest.approx(HEALTHY["standard"][:3], rel=0.01)


def test_steps_in_a_row_are_one_spike_whose_losses_do_not_count_as_usual():
    losses = [*noisy(30, 1.0, 0.05), 5.0, 8.0, 6.0, *noisy(10, 1.0, 0.05, seed=1), 5.0]
    first, second = find_spikes(numbered(losses))
    assert (first.step, first.loss, first.peak, first.steps) == (31, 5.0, 8.0, 3)
    assert second.step == 44 and second.usual == pytest.approx(1.0, abs=0.05)


def test_a_level_that_stays_is_one_spike_and_the_new_usual():
    losses = [*noisy(30, 1.0, 0.05), *noisy(100, 7.0, 0.05), 30.0]
    first, second = find_spikes(numbered(losses))
    assert (first.step, first.steps) == (31, WINDOW)
    assert second.step == 131 and second.usual == pytest.approx(7.0, abs=0.1)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_nan_or_infinite_is_refused(loss):
    with pytest.raises(ValueError, match=rf"loss={loss!r} at step 3: a spike is a finite loss"):
        SpikeWatch().add(3, loss)


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
    return {name: value for name, value in record.items() if name not in ("schedule", "max_grad_norm")}


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


# Scores and faults


def test_the_share_of_answers_that_end(monkeypatch):
    end = TOKENIZER.eos_token_id
    batches = [torch.tensor([[7, end, 0], [7, 7, 7]]), torch.tensor([[7, 7, end]])]
    monkeypatch.setattr(evaluation, "_generated", lambda *args: iter(batches))
    assert evaluation.share_that_ends(None, TOKENIZER, CHATS[:3]) == 2 / 3


def test_the_base_alone_does_not_stop():
    assert evaluation.share_that_ends(load_model(hardware=CPU), TOKENIZER, CHATS[:4], max_new_tokens=8) == 0


def rows_of(folder, rows, tokenizer=TOKENIZER, **options):
    return sft_trainer(load_model(hardware=CPU), tokenizer, rows, folder, SHORT, hardware=CPU, **options).train_dataset


def test_trl_trains_on_the_question_doubles_the_bos_token_and_cuts_the_end_silently(tmp_path, capfd):
    ids = TOKENIZER.apply_chat_template(CHATS[0], return_dict=True)["input_ids"]
    messages = [{"messages": CHATS[0]}]
    assert rows_of(tmp_path, messages)[0]["labels"] == ids
    text = [{"text": TOKENIZER.apply_chat_template(CHATS[0], tokenize=False)}]
    assert rows_of(tmp_path, text)[0]["input_ids"] == [TOKENIZER.bos_token_id, *ids]
    cut = rows_of(tmp_path, messages, assistant_only_loss=True, max_length=16)[0]
    assert cut["input_ids"] == ids[:16] and TOKENIZER.eos_token_id not in cut["labels"]
    assert capfd.readouterr().out == ""


def test_plain_arguments_mean_1_024_tokens(tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.model_max_length = 4096
    long = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "piano " * 1100}]
    made = rows_of(tmp_path, [{"messages": long}], tokenizer, plain_arguments=True)
    assert len(made[0]["input_ids"]) == 1024


def test_the_collator_of_transformers_takes_the_end_out_of_the_loss_if_it_pads(tmp_path):
    for pad, learnt in ((TOKENIZER.pad_token, True), (TOKENIZER.eos_token, False)):
        tokenizer = load_tokenizer()
        tokenizer.pad_token = pad
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        labels = collate([tokenizer.apply_chat_template(CHATS[0], return_dict=True)])["labels"]
        assert bool((labels == tokenizer.eos_token_id).any()) is learnt


def test_the_collator_of_transformers_stops_with_trl_at_an_uneven_batch(tmp_path):
    trainer = trainer_of(tmp_path, chats=CHATS[:4])
    trainer.data_collator = transformers.DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    with pytest.raises(ValueError, match=r"Unable to create tensor.*`labels`"):
        next(iter(trainer.get_train_dataloader()))


def test_a_run_with_the_collator_trains_the_adapters_alone(tmp_path):
    settings = Settings(steps=2, batch_size=2, rank=4, warmup_steps=0)
    trainer = collator_run(load_model(hardware=CPU), load_tokenizer(), CHATS, tmp_path, settings, CPU)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]


def test_a_scaler_stops_at_float16_adapters():
    weight = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(torch.optim.SGD([weight], lr=1.0))


# The measured table


def test_the_table_has_the_rows_of_its_script():
    assert [row["name"] for row in MEASURED["rows"]] == list(measure_stability.ROWS)
    for row in MEASURED["rows"]:
        settings, _ = measure_stability.ROWS[row["name"]]
        assert Settings(**row["settings"]) == settings
        wanted = 3 if row["name"] in measure_stability.CLEAR else 5
        scores = ("loss", "exact_match", "ends", "empty", "highest", "spikes")
        assert {len(row[key]) for key in scores} == {wanted}
        assert len(row["losses"]) == len(row["gradient_norms"]) == settings.steps
        assert len(find_spikes(numbered(row["losses"]))) == row["spikes"][0]
        assert max(row["losses"]) == row["highest"][0]


@pytest.mark.parametrize("name", ["cut at 16 tokens", "collator, pad = end"])
def test_a_row_measured_again_begins_as_in_the_table(name, tmp_path):
    stored = next(row for row in MEASURED["rows"] if row["name"] == name)
    settings, recipe = measure_stability.ROWS[name]
    short = replace(settings, steps=3)  # within the warm-up, which the number of steps does not change
    _, losses, norms = recipe(short, measure_stability.CHATS, tmp_path)
    assert [loss for _, loss in losses] == pytest.approx(stored["losses"][:3], rel=0.02)
    assert [norm for _, norm in norms] == pytest.approx(stored["gradient_norms"][:3], rel=0.02)


def test_the_bars_of_datasets_are_left_as_they_were(tmp_path):
    datasets.enable_progress_bars()
    rows_of(tmp_path, [{"messages": CHATS[0]}])
    assert datasets.is_progress_bar_enabled()
