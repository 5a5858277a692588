"""One fine-tuning run through TRL's SFTTrainer: LoRA on a 4-bit base (QLoRA) or on an unquantised one, or all weights.

Which of the first two it is depends on the model alone (`qlora_helpers.models.load_model`); everything else is the same,
so that a comparison compares what it says. In particular what is trained is float32 in every run: TRL makes the adapters
of a 4-bit base bfloat16, which would confound the comparison, break float16 training and not survive a resume.
"""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

import torch

from qlora_helpers.adapters import save_adapter
from qlora_helpers.chats import Chat, lengths_of
from qlora_helpers.checkpoints import (
    WEIGHTS,
    SaveByTheClock,
    log_history,
    logged,
    record_of,
    steps_done,
    where_to_start,
    write_record,
)
from qlora_helpers.hardware import Hardware, detect
from qlora_helpers.interrupts import Interrupted, StopWhenAsked
from qlora_helpers.models import save_model
from qlora_helpers.quiet import quieten
from qlora_helpers.run_folder import RESULT, make, steps_saved
from qlora_helpers.spikes import Spike, SpikeWatch
from qlora_helpers.threads import say_if_slowed

quieten()

import datasets
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

# Names of transformers for each. Its own "constant" has no warm-up, whatever warmup_steps says.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Settings:
    """The knobs of a run. The defaults are those of the course's run with the shipped model.

    Attributes:
        method: "lora" trains adapters in a frozen base, "full" all weights of an unquantised model.
        steps: optimizer steps.
        batch_size: chats that go through the model at once.
        accumulation: so many batches make one optimizer step.
        learning_rate: the peak; linear warm-up over `warmup_steps`, then as `schedule` says.
        schedule: after the warm-up: "linear" or "cosine" decay to zero, or "constant".
        max_grad_norm: longer gradients are clipped to this length; None for no clipping.
        rank, alpha, dropout, target_modules: of LoRA; see `peft.LoraConfig`. Not used by "full".
        max_length: the longest chat in tokens. A longer one is refused, not cut.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        optimizer: a name that transformers' `optim` takes; None for paged 8-bit AdamW on a GPU and AdamW on a CPU.
        save_steps: write a checkpoint every so many steps; None for none.
        save_minutes: write a checkpoint at the first step after every so many minutes; None for none.
        keep_checkpoints: the newest so many are kept. With two, a kill while one is written leaves the other.
        log_steps: log loss and gradient norm every so many steps; None for twenty times in a run. On a GPU logging waits
            for the step to end.
        seed: of the adapters' first values, the order of the chats, and dropout.
    """

    method: str = "lora"
    steps: int = 300
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 15
    schedule: str = "linear"
    max_grad_norm: float | None = 1.0
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    max_length: int = 64
    gradient_checkpointing: bool = False
    optimizer: str | None = None
    save_steps: int | None = None
    save_minutes: float | None = None
    keep_checkpoints: int = 2
    log_steps: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.method not in RESULT:
            raise ValueError(f"method={self.method!r}: choose one of {', '.join(RESULT)}")
        positive = ("steps", "batch_size", "accumulation", "learning_rate", "rank", "alpha", "max_length")
        for name in positive:
            value = getattr(self, name)
            if not (isinstance(value, Real) and value > 0):
                raise ValueError(f"{name}={value!r}: must be more than 0")
            if name in ("steps", "batch_size", "accumulation", "rank", "max_length") and not isinstance(
                value, Integral
            ):
                raise ValueError(f"{name}={value!r}: must be a whole number")
        if not (isinstance(self.warmup_steps, Real) and self.warmup_steps >= 0):
            raise ValueError(f"warmup_steps={self.warmup_steps!r}: must be 0 or more")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r}: must be more than 0, or None for no clipping")
        if self.log_steps is not None and self.log_steps < 1:
            raise ValueError(f"log_steps={self.log_steps!r}: must be 1 or more, or None for twenty times in a run")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: must be at least 0 and less than 1")
        if self.save_steps is not None and self.save_steps < 1:
            raise ValueError(f"save_steps={self.save_steps!r}: must be 1 or more, or None for no checkpoints")
        if self.save_minutes is not None and not self.save_minutes >= 0:
            raise ValueError(f"save_minutes={self.save_minutes!r}: must be 0 or more, or None for no checkpoints")
        if not self.keep_checkpoints >= 2:
            raise ValueError(
                f"keep_checkpoints={self.keep_checkpoints!r}: must be 2 or more, else a kill can leave none"
            )


@dataclass
class Run:
    """A finished run.

    Attributes:
        model: the PEFT model, adapters attached (of a full fine-tuning, the model itself), in evaluation mode.
        history: (step, loss) as logged, the loss averaged over the steps since the last entry.
        step_losses: (step, loss) of every step since the last start or resume.
        gradient_norms: (step, norm) as logged: of the adapters' gradients at that step, before clipping.
        spikes: the loss spikes among `step_losses`; the rule is that of `qlora_helpers.spikes`.
        seconds: in `trainer.train()`, since the last start or resume.
        trainable_parameters, all_parameters: as PEFT counts them.
        saved_path: the folder with what was trained: `adapter/`, or `model/` of a full fine-tuning.
        skipped_steps: those whose gradients overflowed float16, since the last start. The loss scale was halved instead of a step.
    """

    model: torch.nn.Module
    history: list[tuple[int, float]] = field(repr=False)
    step_losses: list[tuple[int, float]] = field(repr=False)
    gradient_norms: list[tuple[int, float]] = field(repr=False)
    seconds: float
    trainable_parameters: int
    all_parameters: int
    saved_path: Path
    skipped_steps: list[int]
    spikes: list[Spike]


class TrainingDiverged(RuntimeError):
    """The loss is no number any more, or float16 cannot hold the gradients; the message says since which step."""


# Loss scaling begins at 2^16 and halves at each overflow: after so many in a row the scale is below 1.
MOST_SKIPPED_IN_A_ROW = 17
MOST_SPIKES_SAID = 5


class _Recorder(TrainerCallback):
    """Collect the losses and gradient norms, and hand the history to whoever draws it."""

    def __init__(self, on_loss: Callable[[list[tuple[int, float]]], None] | None):
        self.history: list[tuple[int, float]] = []
        self.gradient_norms: list[tuple[int, float]] = []
        self.on_loss = on_loss

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            # the state's own log, which a resumed run finds in its checkpoint
            self.take(state.log_history)
            if self.on_loss:
                self.on_loss(self.history)

    def take(self, log: list[dict]):
        self.history, self.gradient_norms = logged(log), logged(log, "grad_norm")


class _Bar(TrainerCallback):
    """A progress bar with the loss behind it, in place of the trainer's, which prints a dictionary beside it."""

    bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        if self.bar is not None:
            self.bar.close()


class _Trainer(SFTTrainer):
    """An SFTTrainer that keeps the loss of each step, as tensors: reading them at every step would hold the GPU up."""

    def __init__(self, *args, **kwargs):
        self.step_losses: list[tuple[int, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step + 1
        if self.step_losses and self.step_losses[-1][0] == step:  # with accumulation each batch has a part of the loss
            loss_so_far = self.step_losses.pop()[1]
            self.step_losses.append((step, loss_so_far + loss.detach()))
        else:
            self.step_losses.append((step, loss.detach()))
        return loss


class _SaveAsAsked(TrainerCallback):
    """Save and log as often as the settings say now: a resumed trainer takes that over from its checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps


class _Watch(TrainerCallback):
    """Name loss spikes; stop at a loss that is no number, before it is logged or saved; count what float16 skipped.

    The losses are read when the trainer logs or saves, all at once: reading each would hold a GPU up.
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
        if control.should_log or control.should_save or control.should_training_stop:
            self.look(args)

    def look(self, args):
        unread, self.trainer.step_losses = self.trainer.step_losses, []
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


def build_trainer(model, tokenizer, chats: list[Chat], output_dir: Path, settings: Settings, hardware: Hardware):
    """The SFTTrainer of a run, what it trains in float32.

    Raises:
        ValueError: a chat is longer than `settings.max_length` tokens; or all weights of a 4-bit model are to be trained.
    """
    full = settings.method == "full"
    if full and getattr(model, "is_quantized", False):
        raise ValueError(
            "method='full': 4-bit weights cannot be trained. Load the model with quantization=None, or use 'lora'"
        )
    for number, length in enumerate(lengths_of(chats, tokenizer), start=1):
        if length > settings.max_length:
            raise ValueError(
                f"chat {number} has {length} tokens, over max_length={settings.max_length}: its answer would be cut. "
                "Raise max_length or shorten the chat"
            )
    on_gpu = hardware.device == "cuda"
    dtype = hardware.compute_dtype
    config = SFTConfig(
        output_dir=str(output_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_grad_norm or 0.0,  # the trainer takes 0 for no clipping
        optim=settings.optimizer or ("paged_adamw_8bit" if on_gpu else "adamw_torch"),
        max_length=settings.max_length,
        assistant_only_loss=True,
        packing=False,  # it is meant for FlashAttention, which a T4 has not
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=not on_gpu,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        logging_steps=settings.log_steps or max(1, settings.steps // 20),
        disable_tqdm=True,  # else a notebook gets a progress table of the trainer's own
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.keep_checkpoints,
        logging_nan_inf_filter=False,  # it would show the mean of the losses before in place of a NaN
        report_to="none",
        seed=settings.seed,
        dataloader_pin_memory=on_gpu,
    )
    if config.n_gpu > 1:
        print(f"{config.n_gpu} GPUs are here. This run uses the first one: TRL refuses to split a batch over several.")
        config._n_gpu = 1
    targets = settings.target_modules
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    set_seed(settings.seed)  # the adapters' first values are drawn while the trainer is built
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        trainer = _Trainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in chats]),
            processing_class=tokenizer,
            peft_config=None if full else lora,
        )
    finally:
        if bars:
            datasets.enable_progress_bars()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # after the trainer, which makes adapters bfloat16 itself; float16 gradients could not be unscaled
            parameter.data = parameter.data.float()
    return trainer


def train(
    model,
    tokenizer,
    chats: list[Chat],
    output_dir: str | Path,
    settings: Settings | None = None,
    *,
    hardware: Hardware | None = None,
    resume: bool = False,
    progress_bar: bool = False,
    on_loss: Callable[[list[tuple[int, float]]], None] | None = None,
) -> Run:
    """Fine-tune a model on chats, the loss on the assistant's tokens alone; save what was trained.

    Args:
        model: from `load_model`. It is changed: adapters are put into it, or its own weights are trained.
        chats: each a list of messages (`qlora_helpers.chats.read_chats`).
        output_dir: gets `run.json`, `checkpoint-N/` as the settings say, and in the end `adapter/`, or `model/` for "full".
        resume: go on from the last whole checkpoint in `output_dir`, also in another process; from the start if there is
            none. The run then ends as it would have ended uninterrupted.
        progress_bar: show one, for a terminal.
        on_loss: called with the history so far each time the loss is logged, for a live plot.

    Raises:
        FileExistsError: `output_dir` holds a run already, and `resume` is not set.
        OSError: `output_dir` is a file, or cannot be written to.
        ValueError: a chat is too long; the last checkpoint lacks a part; the run in `output_dir` is finished, or was begun
            with other settings, chats, or another model.
        TrainingDiverged: the loss is no number any more, or float16 cannot hold the gradients.
        Interrupted: Ctrl-C, a notebook's interrupt or SIGTERM. The step is finished and saved first; a second one stops at
            once. It is a KeyboardInterrupt.
    """
    settings, hardware, output_dir = settings or Settings(), hardware or detect(), Path(output_dir)
    if not chats:
        raise ValueError(f"chats={chats!r}: there is nothing to learn. Pass a list of chats, as read_chats gives")
    record = record_of(model, chats, settings, hardware.compute_dtype)
    checkpoint = where_to_start(output_dir, record, resume, float16=hardware.compute_dtype == torch.float16)
    make(output_dir, "output_dir")
    trainer = build_trainer(model, tokenizer, chats, output_dir, settings, hardware)
    write_record(output_dir, record)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress_bar:
        trainer.add_callback(_Bar)
    recorder, watch, stop = _Recorder(on_loss), _Watch(trainer), StopWhenAsked()
    trainer.add_callback(recorder)
    trainer.add_callback(_SaveAsAsked)
    trainer.add_callback(stop)
    if settings.save_minutes is not None:
        trainer.add_callback(SaveByTheClock(settings.save_minutes))
    trainer.add_callback(watch)  # after all that ask for a checkpoint
    if hardware.device == "cpu":
        say_if_slowed(torch.get_num_threads())
    with stop:
        started = time.perf_counter()
        _let_it_train(trainer, checkpoint, settings, output_dir, recorder, stop)
        seconds = time.perf_counter() - started
        model = trainer.model.eval()
        if settings.method == "full":
            trainable = total = model.num_parameters()
            saved_path = save_model(model, tokenizer, output_dir / RESULT["full"])
        else:
            trainable, total = model.get_nb_trainable_parameters()
            saved_path = save_adapter(model, output_dir / RESULT["lora"])
    if watch.skipped:
        print(
            f"float16: gradients overflowed at {len(watch.skipped)} of {settings.steps} steps (the last is step "
            f"{watch.skipped[-1]}). These steps were skipped and the loss scale halved. A few at the start are normal; if it "
            "goes on, lower the learning rate."
        )
    if stop.signal is not None:  # it came in the last step, or while what was trained was saved
        where = f"after the last of {settings.steps} steps; what was trained is in {saved_path}"
        raise Interrupted(where, output_dir, finished=True, signal=stop.signal)
    return Run(
        model=model,
        history=recorder.history,
        step_losses=watch.losses,
        gradient_norms=recorder.gradient_norms,
        seconds=seconds,
        trainable_parameters=trainable,
        all_parameters=total,
        saved_path=saved_path,
        skipped_steps=watch.skipped,
        spikes=watch.spike_watch.spikes,
    )


def _let_it_train(
    trainer, checkpoint: Path | None, settings, output_dir: Path, recorder: _Recorder, stop: StopWhenAsked
):
    """Train from a checkpoint, or from the start, to the last step.

    Raises:
        Interrupted: it did not come to the last step.
    """
    if checkpoint and steps_done(checkpoint) >= settings.steps:
        # killed between its last checkpoint and the end; the trainer would train one step more
        if settings.method == "full":
            weights = load_file(checkpoint / WEIGHTS["full"])
            trainer.model.load_state_dict(weights, strict=False)  # tied weights lie there once
        else:
            set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint)))
        recorder.take(log_history(checkpoint))
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, _Bar):
                callback.close()
        saved = steps_saved(output_dir)
        where = f"in step {trainer.state.global_step + 1} of {settings.steps}; " + (
            f"the last checkpoint is that of step {saved}" if saved else "nothing was saved"
        )
        raise Interrupted(where, output_dir, signal=stop.signal or signal.SIGINT) from None
    if stop.stopped_at is not None:
        where = f"after step {stop.stopped_at} of {settings.steps}, which is saved"
        raise Interrupted(where, output_dir, signal=stop.signal)
