"""Ctrl-C, a notebook's interrupt or SIGTERM while a run trains: the step is finished and saved, and one is told how to go on."""

import contextlib
import signal
import sys
import threading
from pathlib import Path

from transformers import TrainerCallback


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, the kernel's interrupt or SIGTERM.

    It is a KeyboardInterrupt, so that what comes after it does not run: the cells below, the rest of a script.

    Attributes:
        where: where it stopped, and what is saved; the beginning of a sentence.
        output_dir: the run's folder.
        finished: whether all steps are done and what was trained is saved.
        signal: the number of the signal.
    """

    def __init__(self, where: str, output_dir: Path, finished: bool = False, signal: int = signal.SIGINT):
        self.where, self.output_dir, self.finished, self.signal = where, output_dir, finished, int(signal)
        cure = (
            ""
            if finished
            else f" To go on, load the model again and call train with {str(output_dir)!r} and resume=True."
        )
        super().__init__(f"stopped {where}.{cure}")

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence alone."""
        return [f"KeyboardInterrupt: {self}"]


class StopWhenAsked(TrainerCallback):
    """Within `with`, the first interrupt ends and saves the run's current step, and a second one stops at once.

    Who has set what an interrupt does, or ignores it, as a job in the background does, is left alone; so is any thread but
    the main one, which has no signals.

    Attributes:
        signal: the number of the signal that came first; None if none came.
        stopped_at: the step behind which the trainer was stopped; None if it was not.
    """

    def __init__(self):
        self.signal: int | None = None
        self.stopped_at: int | None = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *raised):
        while self._before:
            signal.signal(*self._before.popitem())

    def _asked(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another print: this line is lost
            print("\nStopping at the end of this step. Interrupt again to stop at once.", file=sys.stderr, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.signal is not None and state.global_step < state.max_steps:  # else it ends by itself
            self.stopped_at = state.global_step
            # logged, so that no loss is averaged over steps of which the resumed run knows nothing
            control.should_log = control.should_save = control.should_training_stop = True
