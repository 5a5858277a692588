"""Where memory goes within a training step: bytes against time, with the phase that each moment belongs to.

On a GPU it comes from the allocator's own history (`torch.cuda.memory`). On a CPU torch keeps none, so every storage that
an operation makes is counted until it is freed.

timeline = record_step(trainer)  # trains, and records the last step
"""

from __future__ import annotations

import functools
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import TrainerCallback

from qlora_helpers.memory.phases import BACKWARD, BETWEEN, EVALUATION, FORWARD, LOSS, SAVING, STEP
from qlora_helpers.memory.tape import rounded

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from trl import SFTTrainer

__all__ = [
    "MOST_ENTRIES",
    "AllocatorHistory",
    "PhaseTracker",
    "StorageHistory",
    "Timeline",
    "from_history",
    "record_step",
]

MOST_ENTRIES = 2_000_000  # in the allocator's history


class PhaseTracker(TrainerCallback):
    """Knows which phase a trainer is in.

    A step is "forward" (the embeddings and the decoder), "loss" (the output head), "backward", "optimizer step" (clipping
    included); evaluation and saving are one phase each.

    Args:
        on_change: called with the name of each phase as it begins.
    """

    def __init__(self, on_change: Callable[[str], None] | None = None) -> None:
        self.phase = BETWEEN
        self.on_change = on_change
        self._held = False

    def enter(self, phase: str) -> None:
        """Begin a phase; ignored inside `hold`."""
        if not self._held and phase != self.phase:
            self.phase = phase
            if self.on_change:
                self.on_change(phase)

    @contextmanager
    def hold(self, phase: str) -> Iterator[None]:
        """Count whatever runs inside as this phase, which stays the phase if that fails."""
        self.enter(phase)
        was, self._held = self._held, True
        try:
            yield
        finally:
            self._held = was
        self.enter(BETWEEN)

    def attach(self, trainer: SFTTrainer) -> PhaseTracker:
        """Watch a trainer that has not started yet; returns itself."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # hooks of the decoder: older PEFT calls the base's forward() directly, which no hook sees
        base.base_model.register_forward_pre_hook(lambda *_: self.enter(FORWARD))
        base.base_model.register_forward_hook(lambda *_: self.enter(LOSS))
        self._wrap_backward(trainer.accelerator)
        for name, phase in (("evaluate", EVALUATION), ("_save_checkpoint", SAVING), ("save_model", SAVING)):
            self._wrap(trainer, name, phase)
        trainer.add_callback(self)
        return self

    def _wrap_backward(self, accelerator) -> None:
        backward = accelerator.backward

        @functools.wraps(backward)
        def watched(*args, **kwargs):
            self.enter(BACKWARD)
            backward(*args, **kwargs)
            if accelerator.sync_gradients:  # the last pass before the optimizer: what comes now is clipping
                self.enter(STEP)

        accelerator.backward = watched

    def _wrap(self, trainer, name: str, phase: str) -> None:
        method = getattr(trainer, name)

        @functools.wraps(method)
        def watched(*args, **kwargs):
            with self.hold(phase):
                return method(*args, **kwargs)

        setattr(trainer, name, watched)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.enter(BETWEEN)


@dataclass(frozen=True)
class Timeline:
    """Bytes in tensors against time.

    Attributes:
        seconds: of each point, from the first.
        levels: bytes in tensors after each point; a level lasts until the next point.
        marks: name and first point of each phase, in order.
    """

    seconds: tuple[float, ...]
    levels: tuple[int, ...]
    marks: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if len(self.seconds) != len(self.levels) or not self.levels:
            raise ValueError(
                f"seconds has {len(self.seconds)} points and levels {len(self.levels)}: both must have the same number, at least 1"
            )
        firsts = [first for _, first in self.marks]
        if firsts != sorted(firsts) or not firsts or firsts[0] != 0 or firsts[-1] >= len(self.levels):
            raise ValueError(f"marks is {self.marks!r}: must be phases in order, the first at point 0")

    @property
    def peak(self) -> int:
        return max(self.levels)

    def phase_at(self, point: int) -> str:
        """The phase that a point belongs to."""
        return self.marks[bisect_right([first for _, first in self.marks], point) - 1][0]

    @property
    def peak_phase(self) -> str:
        return self.phase_at(self.levels.index(self.peak))

    def spans(self) -> list[tuple[str, int, int]]:
        """Name, first and last point of each phase; the last point is the first of the next."""
        ends = [first for _, first in self.marks[1:]] + [len(self.levels) - 1]
        return [(name, first, end) for (name, first), end in zip(self.marks, ends, strict=True)]

    def most_in(self, phase: str) -> int:
        """The most bytes within a phase; 0 if there is none of that name."""
        return max((max(self.levels[a : b + 1]) for name, a, b in self.spans() if name == phase), default=0)

    def thinned(self, bins: int) -> Timeline:
        """A shorter timeline: the first, lowest, highest and last point of each of `bins` equal intervals, and every mark."""
        if bins < 1:
            raise ValueError(f"bins is {bins!r}: must be at least 1")
        length = self.seconds[-1] / bins or 1.0
        groups: dict[int, list[int]] = {}
        for point, second in enumerate(self.seconds):
            groups.setdefault(min(int(second / length), bins - 1), []).append(point)
        keep = {first for _, first in self.marks}
        for points in groups.values():
            low, high = (pick(points, key=self.levels.__getitem__) for pick in (min, max))
            keep |= {points[0], low, high, points[-1]}
        kept = sorted(keep)
        place = {point: index for index, point in enumerate(kept)}
        return Timeline(
            tuple(self.seconds[point] for point in kept),
            tuple(self.levels[point] for point in kept),
            tuple((name, place[first]) for name, first in self.marks),
        )

    def to_json(self) -> dict:
        """Microseconds and KiB instead of seconds and bytes: whole numbers, and a quarter of the digits."""
        return {
            "microseconds": [round(second * 1e6) for second in self.seconds],
            "kib": [round(level / 1024) for level in self.levels],
            "marks": [list(mark) for mark in self.marks],
        }

    @classmethod
    def from_json(cls, content: dict) -> Timeline:
        return cls(
            tuple(microseconds / 1e6 for microseconds in content["microseconds"]),
            tuple(kib * 1024 for kib in content["kib"]),
            tuple((name, first) for name, first in content["marks"]),
        )


def from_history(entries: Iterable[dict], marks: list[tuple[str, int, float]], start: int) -> Timeline:
    """A timeline from the history of torch's allocator.

    Args:
        entries: `torch.cuda.memory._snapshot()["device_traces"][0]`: "alloc" and "free_requested" with their sizes.
        marks: for each phase its name, the number of entries before it, and the microseconds for which the run was
            halted there.
        start: bytes in tensors before the first entry.
    """
    seconds, levels, found, level = [], [], [], start
    began, paused, waiting = None, 0.0, list(marks)
    for number, entry in enumerate(entries):
        while waiting and waiting[0][1] <= number:
            name, _, pause = waiting.pop(0)
            paused += pause
            found.append((name, len(levels)))
        if entry["action"] not in ("alloc", "free_requested"):
            continue
        size = rounded(entry["size"])
        level += size if entry["action"] == "alloc" else -size
        moment = entry["time_us"] - paused
        began = moment if began is None else began
        seconds.append((moment - began) / 1e6)
        levels.append(level)
    found = [(name, first) for name, first in found if first < len(levels)]
    if found and found[0][1] > 0:
        found.insert(0, (BETWEEN, 0))
    return Timeline(tuple(seconds), tuple(levels), tuple(found))


class AllocatorHistory:
    """Records what torch's allocator does on the GPU, and where phases begin."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, int, float]] = []
        self.held: list[int] = []  # bytes in tensors at each mark, by torch's own count

    def begin(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()  # so that torch's own peak is that of the recording
        self.marks, self.held, self.start = [], [], torch.cuda.memory_allocated()
        torch.cuda.memory._record_memory_history(context=None, stacks="python", max_entries=MOST_ENTRIES)
        self.before = len(self._entries())  # entries of earlier recordings

    @staticmethod
    def _entries() -> list[dict]:
        return torch.cuda.memory._snapshot()["device_traces"][0]

    def mark(self, phase: str) -> None:
        """Mark the beginning of a phase. Its place is counted in entries, so the clocks of CPU and allocator need not agree."""
        before = time.perf_counter()
        entries = len(self._entries()) - self.before
        self.held.append(torch.cuda.memory_allocated())
        self.marks.append((phase, entries, (time.perf_counter() - before) * 1e6))

    def end(self) -> Timeline:
        entries = self._entries()[self.before :]
        torch.cuda.memory._record_memory_history(enabled=None)
        return from_history(entries, self.marks, self.start)


class _Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed."""

    def __init__(self):
        super().__init__()
        self.known: set[int] = set()
        self.live = 0
        self.seconds: list[float] = []
        self.levels: list[int] = []

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that already exist."""
        for tensor in tensors:
            self._count(tensor)
        self.seconds, self.levels = [time.perf_counter()], [self.live]

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.known:
            self.known.add(key)
            self._change(size := storage.nbytes())
            weakref.finalize(storage, self._forget, key, size)

    def _change(self, size: int) -> None:
        self.live += size
        self.seconds.append(time.perf_counter())
        self.levels.append(self.live)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self._change(-size)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result


class StorageHistory:
    """The counterpart of `AllocatorHistory` on a CPU, which counts storages.

    Args:
        tensors: called at the beginning, gives the tensors that already exist.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        self.tensors = tensors

    def begin(self) -> None:
        self.counter, self.marks = _Storages(), []
        self.counter.know(self.tensors())
        self.counter.__enter__()

    def mark(self, phase: str) -> None:
        self.marks.append((phase, len(self.counter.levels)))

    def end(self) -> Timeline:
        self.counter.__exit__(None, None, None)
        seconds, levels = self.counter.seconds, self.counter.levels
        marks = [(BETWEEN, 0)] + [(name, first) for name, first in self.marks if first < len(levels)]
        return Timeline(tuple(second - seconds[0] for second in seconds), tuple(levels), tuple(marks))


def _tensors_of(trainer) -> list[torch.Tensor]:
    """Weights, the constants of the 4-bit ones, buffers, and the optimizer states."""
    found = [*trainer.model.parameters(), *trainer.model.buffers()]
    for parameter in trainer.model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code]
            if state.nested:
                found += [state.offset, state.state2.absmax, state.state2.code]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for states in optimizer.state.values() if optimizer else ():
        found += [state for state in states.values() if isinstance(state, torch.Tensor)]
    return found


class _Recorder(TrainerCallback):
    """Records one step, from its beginning to its end."""

    def __init__(self, history, step: int):
        self.history, self.step, self.timeline, self.running = history, step, None, False

    def mark(self, phase: str) -> None:
        if self.running:
            self.history.mark(phase)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and not self.running:
            self.history.begin()
            self.running = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.running:
            self.running = False
            self.timeline = self.history.end()


def record_step(trainer: SFTTrainer, step: int | None = None) -> Timeline:
    """Train, and record one step.

    Args:
        trainer: one that is ready to start, on a GPU or on a CPU.
        step: which one, counted from 1; by default the last. The first makes the optimizer states.

    Raises:
        ValueError: training has no such step.
    """
    last = trainer.args.max_steps
    step = step or last
    if not 1 <= step <= last:
        raise ValueError(f"step is {step!r}; the trainer's max_steps is {last}: choose a step from 1 to {last}")
    on_gpu = next(trainer.model.parameters()).device.type == "cuda"
    history = AllocatorHistory() if on_gpu else StorageHistory(lambda: _tensors_of(trainer))
    recorder = _Recorder(history, step)
    PhaseTracker(recorder.mark).attach(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.timeline
