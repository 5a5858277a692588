"""The best checkpoint of a run with validation: which it is, that it is kept, and when patience ends.

All of it follows from the validation losses in the trainer's log, which every checkpoint holds. So a resumed run knows
what the killed one knew, and finds the best checkpoint also where its folder was moved. The library's own means do not
hold that far: `load_best_model_at_end` finds the checkpoint by an absolute path, and allows none between two
evaluations; `save_strategy="best"` drops a checkpoint that an interrupt has asked for; and a run that
`EarlyStoppingCallback` has stopped trains on if it is killed before its result is saved.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from qlora_helpers.training.callbacks import TrainingDiverged
from qlora_helpers.training.checkpoints import VALIDATION_LOSS, WEIGHTS, faults_in, logged
from qlora_helpers.training.checksums import CHECKSUMS
from qlora_helpers.training.run_folder import complete_checkpoints, numbered_checkpoints, step_of, trainer_state
from qlora_helpers.training.together import ALONE, Together

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = [
    "KeepCheckpoints",
    "WatchValidation",
    "best_checkpoint",
    "best_of",
    "drop_superseded",
    "patience_ended",
]


def best_of(validation_history: list[tuple[int, float]]) -> tuple[int, float] | None:
    """The step with the lowest validation loss, and that loss; the first of several. None before the first evaluation.

    The evaluation before step 1 does not count: nothing was trained then.
    """
    trained = [(step, loss) for step, loss in validation_history if step > 0]
    return min(trained, key=lambda entry: entry[1]) if trained else None


def patience_ended(validation_history: list[tuple[int, float]], patience: int | None) -> bool:
    """Whether the last `patience` evaluations in a row brought no lower loss; never if `patience` is None."""
    if patience is None or not (best := best_of(validation_history)):
        return False
    return sum(step > best[0] for step, _ in validation_history) >= patience


def best_checkpoint(folder: Path, validation_history: list[tuple[int, float]], method: str) -> Path | None:
    """The checkpoint with the lowest validation loss; None for a run without validation, or before its first evaluation.

    Args:
        folder: of the run.
        method: of the run, as in its `Settings`.

    Raises:
        ValueError: the checkpoint is gone, or is not as it was written.
    """
    if not (best := best_of(validation_history)):
        return None
    checkpoint = folder / f"checkpoint-{best[0]}"
    faults = faults_in(checkpoint, (WEIGHTS[method],)) if checkpoint.is_dir() else ["is gone"]
    if faults:
        raise ValueError(
            f"{checkpoint}, which has the lowest validation loss of the run, {'; '.join(faults)}. Put it back, or begin the "
            "run anew in a new folder; the other checkpoints in this one can be loaded as they are"
        )
    return checkpoint


def drop_superseded(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest complete ones and, of each of these, the best one up to then.

    Args:
        keep: how many of the newest ones stay.
    """
    newest = complete_checkpoints(folder)[:keep]
    logs = [(trainer_state(checkpoint) or {}).get("log_history", []) for checkpoint in newest]  # none in a damaged one
    bests = {best_of(logged(log, VALIDATION_LOSS)) for log in logs}
    steps = {step_of(checkpoint) for checkpoint in newest} | {best[0] for best in bests if best}
    for checkpoint in numbered_checkpoints(folder):
        if step_of(checkpoint) not in steps:
            (checkpoint / CHECKSUMS).unlink(
                missing_ok=True
            )  # first, so that what a kill leaves of it is not taken for whole
            shutil.rmtree(checkpoint, ignore_errors=True)  # the next call tries again


class KeepCheckpoints(TrainerCallback):
    """Remove old checkpoints once a new one is complete; the trainer would before its checksums are written.

    Of several processes the first removes them.
    """

    def __init__(self, keep: int, together: Together = ALONE) -> None:
        self.keep, self.together = keep, together

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.together.launch.leads:
            drop_superseded(Path(args.output_dir), self.keep)


class WatchValidation(TrainerCallback):
    """Save a checkpoint where the validation loss is lower than ever before, and stop where patience ends."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        history = logged(state.log_history, VALIDATION_LOSS)
        step, loss = history[-1]
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"step {step}: the validation loss is {loss}, though the training losses are finite. Lower "
                f"learning_rate={args.learning_rate:g}, and start again in a new folder. If it is so at step 0, the model itself "
                "overflows: choose another one, or a GPU with native bfloat16"
            )
        if step and best_of(history)[0] == step:
            control.should_save = True
        if patience_ended(history, self.patience):
            control.should_training_stop = True
            # as the trainer does after the last step
            control.should_save = control.should_save or args.save_strategy == SaveStrategy.STEPS
