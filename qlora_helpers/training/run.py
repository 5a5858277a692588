"""One fine-tuning run, from the first step or a checkpoint to the saved result."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback

from qlora_helpers import validation
from qlora_helpers.adapters.files import save_adapter
from qlora_helpers.chats import Chat
from qlora_helpers.folder_locks import locked
from qlora_helpers.hardware import Hardware, given_or_detected
from qlora_helpers.models.fingerprint import KEPT
from qlora_helpers.models.saving import save_model
from qlora_helpers.settings import Settings
from qlora_helpers.threads import say_if_slowed
from qlora_helpers.training.callbacks import LossBar, LossWatch, Recorder, SaveAsAsked
from qlora_helpers.training.checkpoints import (
    WEIGHTS,
    CheckOptimizer,
    SaveByTheClock,
    WriteChecksums,
    check_tensors,
    failed_writing_explained,
    log_history,
    record_of,
    say_what_changes,
    where_to_start,
    write_record,
)
from qlora_helpers.training.interrupts import Interrupted, StopWhenAsked
from qlora_helpers.training.run_folder import (
    RESULT,
    gone_if_refused,
    make_run_folder,
    refuse_foreign,
    step_of,
    steps_saved,
)
from qlora_helpers.training.spikes import Spike
from qlora_helpers.training.trainer import build_trainer, check_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Run", "train"]


@dataclass
class Run:
    """A finished run.

    Attributes:
        model: the PEFT model with its adapters (after full fine-tuning, the model itself), in evaluation mode.
        history: (step, loss) as logged, the loss averaged over the steps since the last entry.
        step_losses: (step, loss) of every step since the last start or resume.
        gradient_norms: (step, norm) as logged: of the gradients at that step, before clipping.
        spikes: the loss spikes among `step_losses`, as `qlora_helpers.training.spikes` defines them.
        seconds: spent in `trainer.train()` since the last start or resume.
        trainable_parameters, all_parameters: as PEFT counts them.
        saved_path: the folder of what was trained: `adapter/`, or `model/` after full fine-tuning.
        skipped_steps: those whose gradients overflowed float16, since the last start or resume. They were skipped and
            halved the loss scale.
    """

    model: PreTrainedModel | PeftModel
    history: list[tuple[int, float]] = field(repr=False)
    step_losses: list[tuple[int, float]] = field(repr=False)
    gradient_norms: list[tuple[int, float]] = field(repr=False)
    seconds: float
    trainable_parameters: int
    all_parameters: int
    saved_path: Path
    skipped_steps: list[int]
    spikes: list[Spike]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    output_dir: str | Path,
    settings: Settings | None = None,
    *,
    hardware: Hardware | None = None,
    resume: bool = False,
    progress_bar: bool = False,
    on_loss: Callable[[list[tuple[int, float]]], None] | None = None,
) -> Run:
    """Fine-tune a model on chats, with the loss on the assistant's tokens alone, and save what was trained.

    Args:
        model: from `load_model`. It is changed: adapters are added to it, or its own weights are trained.
        chats: each a list of messages (`qlora_helpers.chats.read_chats`).
        output_dir: gets `run.json`, `checkpoint-N/` as the settings say, and at the end `adapter/`, or `model/` for
            "full".
        resume: continue from the last complete checkpoint in `output_dir`, even in another process; from the start if
            there is none. On the same device, with as many threads and the same versions of the libraries, the run then
            ends as it would have ended uninterrupted; a change of these is said.
        progress_bar: show one, for a terminal.
        on_loss: called with the history so far each time the loss is logged, for a live plot.

    Raises:
        FileExistsError: `output_dir` already holds a run, and `resume` is not set; or it holds files, but no run.
        FolderInUse: another process is writing into `output_dir` (`qlora_helpers.folder_locks`).
        OSError: `output_dir` is a file, or cannot be written to; or its disk is full.
        ValueError: a chat is too long; the last checkpoint is damaged; the run in `output_dir` is finished, or was begun
            with other settings, chats, or another model.
        TrainingDiverged: the loss is NaN or infinite, or the gradients overflow float16.
        Interrupted: Ctrl-C, a notebook's interrupt or SIGTERM. The step is finished and saved first; a second one stops
            the run at once. It is a KeyboardInterrupt.
    """
    settings, hardware, output_dir = settings or Settings(), given_or_detected(hardware), Path(output_dir)
    if not chats:
        raise ValueError(f"chats={chats!r}: there is nothing to learn. Pass a list of chats, as read_chats returns")
    resume, progress_bar = validation.switch("resume", resume), validation.switch("progress_bar", progress_bar)
    check_settings(model, settings, hardware)
    with gone_if_refused(output_dir):
        make_run_folder(output_dir, "output_dir")
        with locked(output_dir, "output_dir"):
            record = record_of(model, chats, settings, hardware)
            checkpoint = where_to_start(output_dir, record, resume, float16=hardware.compute_dtype == torch.float16)
            refuse_foreign(output_dir, "output_dir")
            trainer = build_trainer(model, tokenizer, chats, output_dir, settings, hardware)
            if checkpoint:
                check_tensors(trainer.model, checkpoint, settings.method)
            say_what_changes(output_dir, checkpoint, record)
            if not checkpoint:  # a record says how and where the run was begun, so a resumed one keeps it
                with failed_writing_explained(output_dir):
                    write_record(output_dir, record)
            return _run(trainer, tokenizer, checkpoint, output_dir, settings, hardware, progress_bar, on_loss)


def _run(trainer, tokenizer, checkpoint, output_dir: Path, settings: Settings, hardware, progress_bar, on_loss) -> Run:
    """Train, and save what was trained."""
    recorder, watch, stop = Recorder(on_loss), LossWatch(trainer), StopWhenAsked()
    _add_callbacks(trainer, settings, progress_bar, recorder, stop, watch, checkpoint)
    if hardware.device == "cpu":
        say_if_slowed(torch.get_num_threads())
    with stop:
        started = time.perf_counter()
        _train_to_the_end(trainer, checkpoint, settings, output_dir, recorder, stop)
        seconds = time.perf_counter() - started
        model = trainer.model.eval()
        with failed_writing_explained(output_dir):
            trainable, total, saved_path = _save(
                model, tokenizer, output_dir / RESULT[settings.method], settings.method
            )
    _say_what_was_skipped(watch.skipped, settings.steps)
    if stop.signal is not None:  # it came in the last step, or while what was trained was being saved
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


def _add_callbacks(trainer, settings: Settings, progress_bar: bool, recorder, stop, watch, checkpoint) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress_bar:
        trainer.add_callback(LossBar)
    trainer.add_callback(recorder)
    trainer.add_callback(SaveAsAsked)
    trainer.add_callback(stop)
    trainer.add_callback(WriteChecksums)
    if checkpoint:
        trainer.add_callback(CheckOptimizer(checkpoint))
    if settings.save_minutes is not None:
        trainer.add_callback(SaveByTheClock(settings.save_minutes))
    trainer.add_callback(watch)  # after all those that ask for a checkpoint


def _save(model, tokenizer, folder: Path, method: str) -> tuple[int, int, Path]:
    """Save what was trained. Returns the numbers of trainable and of all parameters, and the folder."""
    if method == "full":
        setattr(model, KEPT, None)  # its weights are no longer those of its files
        return model.num_parameters(), model.num_parameters(), save_model(model, tokenizer, folder)
    return *model.get_nb_trainable_parameters(), save_adapter(model, folder)


def _say_what_was_skipped(skipped: list[int], steps: int) -> None:
    if skipped:
        print(
            f"float16: gradients overflowed at {len(skipped)} of {steps} steps (the last is step {skipped[-1]}). These steps "
            "were skipped and the loss scale halved. A few at the start are normal; if it goes on, lower the learning rate."
        )


def _train_to_the_end(
    trainer, checkpoint: Path | None, settings, output_dir: Path, recorder: Recorder, stop: StopWhenAsked
):
    """Train from a checkpoint, or from the start, to the last step.

    Raises:
        Interrupted: it was stopped before the end of the last step.
    """
    if checkpoint and step_of(checkpoint) >= settings.steps:
        # killed between its last checkpoint and the end: the trainer would train one more step
        if settings.method == "full":
            weights = load_file(checkpoint / WEIGHTS["full"])
            trainer.model.load_state_dict(weights, strict=False)  # tied weights are stored once
        else:
            set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint)))
        recorder.take(log_history(checkpoint))
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LossBar):
                callback.close()
        saved = steps_saved(output_dir)
        where = f"in step {trainer.state.global_step + 1} of {settings.steps}; " + (
            f"the last checkpoint is that of step {saved}" if saved else "nothing was saved"
        )
        raise Interrupted(where, output_dir, signal=stop.signal or signal.SIGINT) from None
    if stop.stopped_at is not None:
        where = f"after step {stop.stopped_at} of {settings.steps}, which is saved"
        raise Interrupted(where, output_dir, signal=stop.signal)
