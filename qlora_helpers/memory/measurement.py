"""The memory that a run really takes, measured phase by phase."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from transformers import TrainerCallback

from qlora_helpers.hardware import detect
from qlora_helpers.memory.phases import FIRST_STEP, STEADY_STEPS
from qlora_helpers.units import in_words

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["LOOK_EVERY", "Measurement", "MemoryCallback", "Phase"]

LOOK_EVERY = 0.01  # seconds between two samples of main memory


@dataclass(frozen=True)
class Phase:
    """What one phase took, in bytes; the GPU's figures are None where none was measured.

    Attributes:
        allocated_bytes: in torch's tensors when the phase ended, after garbage collection.
        peak_allocated_bytes, peak_reserved_bytes: the most in torch's tensors, and the most that its allocator held for
            them, both during the phase. What was there before it counts, too.
        device_used_bytes: in use on the whole card when the phase ended (`torch.cuda.mem_get_info`): this process with
            its CUDA context and paged states, and whatever else runs there.
        resident_bytes: the most main memory that this process was seen to hold, mapped file pages included. It is
            sampled every 10 ms; a shorter peak can be missed.
    """

    allocated_bytes: int | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    device_used_bytes: int | None
    resident_bytes: int


class _ResidentMemory:
    """The most main memory of this process, sampled by a thread.

    The kernel's own peak cannot be reset without spoiling `hardware.peak_memory_bytes` for everyone else.
    """

    def __init__(self):
        self.process = psutil.Process()
        self.highest = 0
        self.look()
        # The thread holds no strong reference, so it also ends when a run fails and drops its measurement.
        threading.Thread(target=self._watch, args=(weakref.ref(self),), daemon=True).start()

    def look(self) -> int:
        self.highest = max(self.highest, self.process.memory_info().rss)
        return self.highest

    @staticmethod
    def _watch(reference) -> None:
        while (watched := reference()) is not None:
            watched.look()
            del watched
            time.sleep(LOOK_EVERY)


class Measurement:
    """The memory of a run, phase by phase, in the order in which the phases ended.

    Args:
        on_gpu: read the GPU's figures, too; by default if this machine's gear uses one.
    """

    def __init__(self, on_gpu: bool | None = None) -> None:
        self.on_gpu = detect().device == "cuda" if on_gpu is None else on_gpu
        self.phases: dict[str, Phase] = {}
        self.running: str | None = None
        self._resident: _ResidentMemory | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside the `with`; it is not recorded if it fails.

        Raises:
            RuntimeError: another phase is running; only one peak can be read at a time.
        """
        self.begin(name)
        try:
            yield
        except BaseException:
            self.drop()
            raise
        self.end()

    def begin(self, name: str, clean: bool = True) -> None:
        """Begin a phase; see `phase`. `clean` frees unused memory first, so that no earlier phase is counted."""
        if self.running:
            raise RuntimeError(
                f"the phase {name!r} cannot begin while {self.running!r} is being measured: end that one first"
            )
        if clean:
            gc.collect()
        if self.on_gpu:
            if clean:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.running, self._resident = name, _ResidentMemory()

    def end(self) -> None:
        """End the running phase and record it; one of the same name is replaced."""
        name, resident = self.running, self._resident.look()
        self.drop()
        peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if self.on_gpu else [None, None]
        gc.collect()
        allocated = used = None
        if self.on_gpu:
            allocated = torch.cuda.memory_allocated()
            free, total = torch.cuda.mem_get_info()
            used = total - free
        self.phases.pop(name, None)  # so that it moves to the end
        self.phases[name] = Phase(allocated, *peaks, used, resident)

    def drop(self) -> None:
        """End the running phase and forget it."""
        self.running = self._resident = None

    def __str__(self) -> str:
        columns = ("after it", "peak", "peak reserved", "on the card", "main memory")
        lines = [f"{'measured':26}" + "".join(f"{column:>15}" for column in columns)]
        for name, phase in self.phases.items():
            sizes = vars(phase).values()
            lines.append(f"{name:26}" + "".join(f"{in_words(size):>15}" for size in sizes))
        return "\n".join(lines)


class MemoryCallback(TrainerCallback):
    """Measures training: the first step that changes the weights, and all steps after it.

    The optimizer makes its states in the first step, so the peak of a run is that of the steady steps. Steps whose
    gradients overflow float16 change nothing; those at the beginning count towards the first step.
    """

    def __init__(self, measurement: Measurement | None = None) -> None:
        self.measurement = measurement or Measurement()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.measurement.running in (FIRST_STEP, STEADY_STEPS):
            self.measurement.drop()  # an earlier training failed
        self.measurement.begin(FIRST_STEP)
        self.steps = 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        self.steps += 1
        if self.steps == 1:
            self.measurement.end()
            self.measurement.begin(STEADY_STEPS, clean=False)  # leaves the allocator as it is

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.steps > 1:
            self.measurement.end()
        else:
            self.measurement.drop()
