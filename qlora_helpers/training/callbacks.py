"""Callbacks that watch a run: its losses, spikes and skipped steps, and its progress bar."""

import math
from collections.abc import Callable

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from qlora_helpers.training.checkpoints import VALIDATION_LOSS, logged
from qlora_helpers.training.spikes import SpikeWatch
from qlora_helpers.training.trainer import _Trainer

__all__ = ["MOST_SPIKES_SAID", "TrainingDiverged"]


class TrainingDiverged(RuntimeError):
    """The loss is NaN or infinite, or the gradients overflow float16; the message names the step."""


# Loss scaling begins at 2^16 and halves at each overflow: after this many in a row the scale is below 1.
MOST_SKIPPED_IN_A_ROW = 17
MOST_SPIKES_SAID = 5


class Recorder(TrainerCallback):
    """Collect the losses and gradient norms, and pass the history on to a live plot."""

    def __init__(self, on_loss: Callable[..., None] | None):
        self.history: list[tuple[int, float]] = []
        self.validation_history: list[tuple[int, float]] = []
        self.gradient_norms: list[tuple[int, float]] = []
        self.on_loss = on_loss

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and ("loss" in logs or VALIDATION_LOSS in logs):
            # the log in the trainer's state, which a resumed run finds in its checkpoint
            self.take(state.log_history)
            if self.on_loss and self.validation_history:
                self.on_loss(self.history, self.validation_history)
            elif self.on_loss:
                self.on_loss(self.history)

    def take(self, log: list[dict]):
        self.history, self.gradient_norms = logged(log), logged(log, "grad_norm")
        self.validation_history = logged(log, VALIDATION_LOSS)


class LossBar(TrainerCallback):
    """A progress bar with the losses after it, instead of the trainer's, which also prints dictionaries."""

    bar = None

    def __init__(self):
        self.said: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, title in (("loss", "loss"), (VALIDATION_LOSS, "validation")):
            if logs and name in logs:
                self.said[title] = float(logs[name])
                self.bar.set_postfix_str(", ".join(f"{title} {loss:.3f}" for title, loss in self.said.items()))

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        if self.bar is not None:
            self.bar.close()


class SaveAsAsked(TrainerCallback):
    """Save and log as often as the current settings say: a resumed trainer would do as its checkpoint says."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps


class LossWatch(TrainerCallback):
    """Name loss spikes; stop at a loss that is NaN or infinite, before it is logged or saved; count skipped steps.

    The losses are read all at once, when the trainer logs, evaluates or saves: reading each at its step would hold up a GPU.
    """

    def __init__(self, trainer: _Trainer):
        self.trainer = trainer
        self.losses: list[tuple[int, float]] = []
        self.spike_watch = SpikeWatch()
        self.skipped: list[int] = []
        self.in_a_row = 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.skipped.append(state.global_step)
            self.in_a_row += 1
            if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"step {state.global_step}: the gradients have overflowed float16 {self.in_a_row} times in a row, and "
                    f"the loss scale cannot fall further. Lower learning_rate={args.learning_rate:g}, or run on a GPU with "
                    "native bfloat16"
                )
        else:
            self.in_a_row = 0
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.look(args)

    def look(self, args):
        unread, self.trainer.step_losses = self.trainer.step_losses, []
        if unread and self.trainer.together.group is not None:  # each process has its share of each loss
            shares = torch.stack([loss for _, loss in unread])
            losses = self.trainer.together.summed(shares) / self.trainer.together.launch.processes
            unread = [(step, loss) for (step, _), loss in zip(unread, losses, strict=True)]
        for step, loss in unread:
            if not math.isfinite(value := loss.item()):
                if args.fp16:
                    advice = (
                        "float16 can also overflow inside the model, whatever the learning rate: then only another model or a "
                        "GPU with native bfloat16 helps"
                    )
                elif self.spike_watch.spikes:
                    advice = f"Before it came a {self.spike_watch.spikes[-1]}"
                else:
                    advice = "Look at the losses before it: did they rise?"
                raise TrainingDiverged(
                    f"step {step}: the loss is {value}. Lower learning_rate={args.learning_rate:g} or raise "
                    f"warmup_steps={args.warmup_steps:g}, and start again in a new folder. {advice}"
                )
            self.losses.append((step, value))
            if spike := self.spike_watch.add(step, value):
                found = len(self.spike_watch.spikes)
                if found <= MOST_SPIKES_SAID:
                    print(spike)
                if found == MOST_SPIKES_SAID:
                    print("Further spikes are only counted: run.spikes has them all.")
