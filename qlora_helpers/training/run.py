"""One fine-tuning run, from the first step or a checkpoint to the saved result."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, ProgressCallback

from qlora_helpers import validation
from qlora_helpers.adapters.files import save_adapter
from qlora_helpers.chats import Chat
from qlora_helpers.folder_locks import locked
from qlora_helpers.freed_memory import keep_freed_memory
from qlora_helpers.hardware import Hardware, given_or_detected
from qlora_helpers.launch import launch_of_this_process, settings_in
from qlora_helpers.models.decoded_once import decoded_once
from qlora_helpers.models.fingerprint import KEPT
from qlora_helpers.models.saving import save_model
from qlora_helpers.settings import Settings
from qlora_helpers.threads import say_if_slowed
from qlora_helpers.training.best import KeepCheckpoints, WatchValidation, best_checkpoint, best_of, patience_ended
from qlora_helpers.training.budget import peak_beside
from qlora_helpers.training.callbacks import LossBar, LossWatch, Recorder, SaveAsAsked
from qlora_helpers.training.checkpoints import (
    VALIDATION_LOSS,
    CheckOptimizer,
    SaveByTheClock,
    WriteChecksums,
    check_tensors,
    failed_writing_explained,
    load_weights,
    log_history,
    logged,
    record_of,
    refuse_other_sharding,
    say_what_changes,
    where_to_start,
    write_record,
)
from qlora_helpers.training.interrupts import Interrupted, StopWhenAsked
from qlora_helpers.training.layer_options import compiled_until_the_end
from qlora_helpers.training.merge_aware import MergeAware, first_aware_step
from qlora_helpers.training.run_folder import (
    RESULT,
    gone_if_refused,
    make_run_folder,
    refuse_foreign,
    step_of,
    steps_saved,
)
from qlora_helpers.training.sharded import whole_weights
from qlora_helpers.training.spikes import Spike
from qlora_helpers.training.together import Together, begin_together, silent_unless_first
from qlora_helpers.training.trainer import build_trainer, check_settings
from qlora_helpers.training.validation_data import chats_of_the_run

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Run", "train"]


@dataclass
class Run:
    """A finished run.

    Attributes:
        model: the PEFT model with its adapters (after full fine-tuning, the model itself), in evaluation mode. With
            validation, its weights are those of `best_step`. Of a sharded run each process has a part of it: load what is in
            `saved_path` to use it. After merge-aware
            steps it is the model that was trained once it is merged (`qlora_helpers.adapters.merge`).
        history: (step, loss) as logged, the loss averaged over the steps since the last entry.
        validation_history: (step, loss) of each evaluation, the first at step 0; the mean over the validation chats'
            answer tokens, in nats per token. Without validation it is empty.
        best_step: the step with the lowest validation loss, whose weights are kept and saved; None without validation.
        stopped_early: whether patience ended before the last step did; `validation_history` ends where it stopped.
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
    validation_history: list[tuple[int, float]] = field(repr=False)
    best_step: int | None
    stopped_early: bool
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
    validation_chats: list[Chat] | None = None,
    hardware: Hardware | None = None,
    resume: bool = False,
    progress_bar: bool = False,
    on_loss: Callable[..., None] | None = None,
    request: dict[str, Any] | None = None,
) -> Run:
    """Fine-tune a model on chats, with the loss on the assistant's tokens alone, and save what was trained.

    On a CPU, the 4-bit weights of a tiny model are decoded once, not at each step (`qlora_helpers.models.decoded_once`),
    and freed memory is kept (`qlora_helpers.freed_memory`). Neither changes a bit of what is trained.

    Args:
        model: from `load_model`. It is changed: adapters are added to it, or its own weights are trained.
        chats: each a list of messages (`qlora_helpers.chats.read_chats`).
        output_dir: gets `run.json`, `checkpoint-N/` as the settings say, and at the end `adapter/`, or `model/` for
            "full".
        validation_chats: what the run is validated on, instead of `settings.validation`.
        resume: continue from the last complete checkpoint in `output_dir`, even in another process; from the start if
            there is none. On the same device, with as many threads and the same versions of the libraries, the run then
            ends as it would have ended uninterrupted; a change of these is said.
        progress_bar: show one, for a terminal.
        on_loss: called with the history so far each time the loss is logged, for a live plot; in a run with validation
            with the validation history, too, and also after each evaluation.
        request: what else `run.json` is to say of how the run was begun; a resumed run may be given another one.

    Several processes, launched with torchrun or `accelerate launch`, make one run (`qlora_helpers.launch`): each computes its
    share of every step, and the first alone prints and writes. It learns what one process would learn, but for rounding and
    the inputs that are dropped out. All of them return or raise the same, where the fault is not of one alone.

    Raises:
        FileExistsError: `output_dir` already holds a run, and `resume` is not set; or it holds files, but no run.
        FolderInUse: another process is writing into `output_dir` (`qlora_helpers.folder_locks`).
        OSError: `output_dir` is a file, or cannot be written to; or its disk is full. Or the file of the validation
            chats cannot be read.
        ValueError: the processes were launched in a way that does not do what it says (`check_launch` and `settings_in`); a
            chat is too long; the chats cannot be split; the last checkpoint is damaged, or the best one; the run
            in `output_dir` is finished, or was begun with other settings, chats, validation chats, or another model.
        TrainingDiverged: a loss is NaN or infinite, or the gradients overflow float16.
        Interrupted: Ctrl-C, a notebook's interrupt or SIGTERM. The step is finished and saved first; a second one stops
            the run at once. It is a KeyboardInterrupt.
    """
    settings, hardware, output_dir = settings or Settings(), given_or_detected(hardware), Path(output_dir)
    resume, progress_bar = validation.switch("resume", resume), validation.switch("progress_bar", progress_bar)
    launch = launch_of_this_process()
    settings = settings_in(launch, settings)
    check_settings(model, settings, hardware)
    with silent_unless_first(launch):
        together = begin_together(hardware)
        if not launch.leads:
            progress_bar, on_loss = False, None
        return _train(
            model,
            tokenizer,
            chats,
            output_dir,
            settings,
            validation_chats,
            hardware,
            resume,
            progress_bar,
            on_loss,
            request,
            together,
        )


def _train(
    model, tokenizer, chats, output_dir: Path, settings, validation_chats, hardware, resume, progress_bar, on_loss, request,
    together: Together,
) -> Run:  # fmt: skip
    """Find out where the run begins, and run it. Of several processes the first deals with the folder."""
    chats, validation_chats = chats_of_the_run(chats, validation_chats, tokenizer, settings)
    settings = settings.for_rows(len(chats))
    record = record_of(model, chats, settings, hardware, validation_chats)
    record |= {"request": request} if request else {}
    with ExitStack() as held:

        def begin() -> Path | None:
            held.enter_context(gone_if_refused(output_dir))
            make_run_folder(output_dir, "output_dir")
            held.enter_context(locked(output_dir, "output_dir"))
            checkpoint = where_to_start(output_dir, record, resume, float16=hardware.compute_dtype == torch.float16)
            refuse_foreign(output_dir, "output_dir")
            refuse_other_sharding(checkpoint, settings)
            return checkpoint

        def begin_writing() -> None:
            if checkpoint:
                check_tensors(trainer.model, checkpoint, settings.method)
                best_checkpoint(output_dir, logged(log_history(checkpoint), VALIDATION_LOSS), settings.method)
            say_what_changes(output_dir, checkpoint, record)
            if not checkpoint:  # a record says how and where the run was begun, so a resumed one keeps it
                with failed_writing_explained(output_dir):
                    write_record(output_dir, record)

        checkpoint = together.from_first(begin)
        trainer = build_trainer(model, tokenizer, chats, output_dir, settings, hardware, validation_chats, together)
        together.from_first(begin_writing)
        return _run(trainer, tokenizer, checkpoint, output_dir, settings, hardware, progress_bar, on_loss)


def _run(trainer, tokenizer, checkpoint, output_dir: Path, settings: Settings, hardware, progress_bar, on_loss) -> Run:
    """Train, and save what was trained."""
    together = trainer.together
    recorder, watch, stop = Recorder(on_loss), LossWatch(trainer), StopWhenAsked(together)
    trainable, total = _counted(trainer.model, settings.method)
    _add_callbacks(trainer, settings, progress_bar, recorder, stop, watch, checkpoint)
    merge_aware = None
    if settings.merge_aware is not None:
        merge_aware = MergeAware(first_aware_step(settings.merge_aware, settings.steps))
        trainer.add_callback(merge_aware)
    if hardware.device == "cpu":
        say_if_slowed(torch.get_num_threads())
        keep_freed_memory()
    with stop:
        started = time.perf_counter()
        with (
            compiled_until_the_end(trainer.model) if settings.compile_layers else decoded_once(trainer.model),
            merge_aware.in_layers_of(trainer.model) if merge_aware else nullcontext(),
        ):
            last_step = _train_to_the_end(trainer, checkpoint, settings, output_dir, recorder, stop)
        seconds = time.perf_counter() - started
        model = trainer.model.eval()
        if best := best_checkpoint(output_dir, recorder.validation_history, settings.method):
            if _is_sharded(model):
                trainer._load_from_checkpoint(str(best), model)
            else:
                load_weights(model, best, settings.method)
        weights = whole_weights(model) if _is_sharded(model) else None
        saved_path = together.from_first(lambda: _save(model, tokenizer, output_dir, settings.method, weights))
        stop.agree()
    if trainer.peak_bytes is not None:
        print(peak_beside(trainer.plan, trainer.peak_bytes))
    _say_what_was_skipped(watch.skipped, settings.steps)
    _say_what_is_kept(recorder.validation_history, last_step, settings)
    if merge_aware and last_step >= merge_aware.first:
        print(
            f"From step {merge_aware.first} on it was trained with the weights that a merge into 4 bits gives: merge it so "
            "(--into 4bit). Beside its base, the adapter answers otherwise."
        )
    if stop.signal is not None:  # it came in the last step, or while what was trained was being saved
        where = f"after the last of {last_step} steps; what was trained is in {saved_path}"
        raise Interrupted(where, output_dir, finished=True, signal=stop.signal)
    return Run(
        model=model,
        history=recorder.history,
        validation_history=recorder.validation_history,
        best_step=step_of(best) if best else None,
        stopped_early=last_step < settings.steps,
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
    together = trainer.together
    trainer.add_callback(WriteChecksums(together))
    trainer.add_callback(KeepCheckpoints(settings.keep_checkpoints, together))
    trainer.add_callback(WatchValidation(settings.patience))
    if checkpoint:
        trainer.args.eval_on_start = False  # its log has that evaluation
        trainer.add_callback(CheckOptimizer(checkpoint))
    if settings.save_minutes is not None:
        trainer.add_callback(SaveByTheClock(settings.save_minutes, together))
    trainer.add_callback(watch)  # after all those that ask for a checkpoint


def _counted(model, method: str) -> tuple[int, int]:
    """The numbers of trainable and of all parameters. A sharded model no longer says which weights have 4 bits."""
    if method == "full":
        return model.num_parameters(), model.num_parameters()
    return model.get_nb_trainable_parameters()


def _is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def _save(model, tokenizer, output_dir: Path, method: str, weights) -> Path:
    """Save what was trained. Returns the folder.

    Args:
        weights: of the adapters of a sharded model, gathered; else None.
    """
    folder = output_dir / RESULT[method]
    with failed_writing_explained(output_dir):
        if method == "full":
            setattr(model, KEPT, None)  # its weights are no longer those of its files
            return save_model(model, tokenizer, folder)
        return save_adapter(model, folder, weights=weights)


def _say_what_was_skipped(skipped: list[int], steps: int) -> None:
    if skipped:
        print(
            f"float16: gradients overflowed at {len(skipped)} of {steps} steps (the last is step {skipped[-1]}). These steps "
            "were skipped and the loss scale halved. A few at the start are normal; if it goes on, lower the learning rate."
        )


def _say_what_is_kept(validation_history: list[tuple[int, float]], last_step: int, settings: Settings) -> None:
    if not validation_history:
        return
    if last_step < settings.steps:
        print(
            f"Stopped after step {last_step} of {settings.steps}: {settings.patience} evaluations in a row brought no lower "
            "validation loss."
        )
    (best_step, best), before, last = best_of(validation_history), validation_history[0][1], validation_history[-1][1]
    at_the_end = "" if best_step == last_step else f" At the last step, {last_step}, it was {last:.4f}."
    print(
        f"The validation loss was lowest at step {best_step}: {best:.4f}, from {before:.4f} before the run. What was trained "
        f"up to then is kept.{at_the_end}"
    )
    if best >= before:
        print(
            "It never fell below that of the untrained model: these chats taught nothing that the validation chats ask."
        )


def _is_at_its_end(checkpoint: Path, settings: Settings) -> bool:
    """Whether a run was killed between its last checkpoint and the end: the trainer would train one more step."""
    losses = logged(log_history(checkpoint), VALIDATION_LOSS)
    return step_of(checkpoint) >= settings.steps or patience_ended(losses, settings.patience)


def _train_to_the_end(
    trainer, checkpoint: Path | None, settings, output_dir: Path, recorder: Recorder, stop: StopWhenAsked
) -> int:
    """Train from a checkpoint, or from the start, to the last step, or to where patience ends. Returns that step.

    Raises:
        Interrupted: it was stopped before the end of the last step.
    """
    if checkpoint and _is_at_its_end(checkpoint, settings):
        load_weights(trainer.model, checkpoint, settings.method)
        recorder.take(log_history(checkpoint))
        return step_of(checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LossBar):
                callback.close()
        saved = steps_saved(output_dir)
        step = min(trainer.state.global_step + 1, settings.steps)  # it may come while the last one is saved
        where = f"in step {step} of {settings.steps}; " + (
            f"the last checkpoint is that of step {saved}" if saved else "nothing was saved"
        )
        raise Interrupted(where, output_dir, signal=stop.signal or signal.SIGINT) from None
    if stop.stopped_at is not None:
        where = f"after step {stop.stopped_at} of {settings.steps}, which is saved"
        raise Interrupted(where, output_dir, signal=stop.signal)
    return trainer.state.global_step
