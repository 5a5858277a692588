"""Ctrl-C, a notebook's interrupt or SIGTERM during a run: finish and save the step, and say how to continue."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback

from qlora_helpers.training.together import ALONE, Together

if TYPE_CHECKING:
    from types import FrameType

    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["Interrupted", "StopWhenAsked"]


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, the kernel's interrupt or SIGTERM.

    It is a KeyboardInterrupt, so that nothing after it runs: the cells below, the rest of a script.

    Attributes:
        where: where it stopped and what is saved, as the message says it after "stopped".
        output_dir: the run's folder.
        finished: whether all steps are done and the result is saved.
        signal: the number of the signal.
    """

    def __init__(self, where: str, output_dir: Path, finished: bool = False, signal: int = signal.SIGINT) -> None:
        self.where, self.output_dir, self.finished, self.signal = where, output_dir, finished, int(signal)
        cure = (
            ""
            if finished
            else f" To continue, load the model again and call train with {str(output_dir)!r} and resume=True."
        )
        super().__init__(f"stopped {where}.{cure}")

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: only the sentence."""
        return [f"KeyboardInterrupt: {self}"]


class StopWhenAsked(TrainerCallback):
    """In a `with` block, the first interrupt stops the run after its current step and saves it; a second stops at once.

    If a signal has another handler already, or is ignored, as in a background job, that stays as it is. Outside of the
    main thread nothing changes, since other threads get no signals.

    A signal to any of several processes stops all of them after the same step.

    Attributes:
        signal: the number of the signal that came first; None if none came.
        stopped_at: the step after which the trainer was stopped; None if it was not.
    """

    def __init__(self, together: Together = ALONE) -> None:
        self.together = together
        self.signal: int | None = None
        self.stopped_at: int | None = None
        self._before = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *raised: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if not self.together.launch.leads:
            return
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another print: this line is lost
            print("\nStopping at the end of this step. Interrupt again to stop at once.", file=sys.stderr, flush=True)

    def agree(self) -> None:
        """Take over a signal that another process got."""
        self.signal = self.together.largest(self.signal or 0) or None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.agree()
        if self.signal is not None and state.global_step < state.max_steps:  # else the run ends anyway
            self.stopped_at = state.global_step
            # log now, so that no average contains losses of steps that the resumed run does not know
            control.should_log = control.should_save = control.should_training_stop = True
