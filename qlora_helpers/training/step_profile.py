"""Where a training step's time goes on a CPU: torch's own profile of it, its operations grouped by kind.

A profile's clock goes on while another program has the core, and profiling itself takes time. So each call of an operation
counts as the lower quartile of those on tensors of the same shapes, and a step's time is taken from steps that are not
profiled.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_helpers import validation

__all__ = ["GROUPS", "PARTS", "REST", "StepProfiler", "group_of", "lower_quartile", "profile_step", "with_shares"]

GROUPS = {  # of torch's operations, by the beginnings of their names
    "matrix products": ("mm", "addmm", "bmm", "linear", "matmul"),
    "decoding 4-bit weights": ("dequantize",),
    "attention": ("_scaled_dot_product",),
    "copies and fills": ("copy_", "clone", "cat", "fill_", "zero_", "masked_fill", "index", "embedding", "scatter", "gather"),
    "sums and largest values": ("sum", "mean", "amax", "max", "argmax", "linalg_vector_norm", "norm", "any", "all"),
    "element by element": (
        "add", "sub", "mul", "div", "exp", "log", "pow", "rsqrt", "sqrt", "silu", "neg", "eq", "lt", "le", "ge", "gt", "where",
        "cos", "sin", "lerp", "maximum", "clamp", "bitwise", "sigmoid", "addcdiv", "addcmul", "reciprocal",
    ),
}  # fmt: skip
REST = "Python and the rest"
PARTS = {
    "output head and loss": ("ChunkedLogProbFunction", "ChunkedLogProbFunctionBackward"),
    "4-bit layers, without adapters": ("MatMul4Bit", "MatMul4BitBackward"),  # by bitsandbytes, so not if decoded once
    "optimizer": ("Optimizer.step#AdamW.step",),
}


def group_of(operation: str) -> str | None:
    """The group of one of torch's or bitsandbytes' operations; None for what only calls others."""
    library, _, name = operation.rpartition("::")
    if library not in ("aten", "bitsandbytes"):
        return None
    for group, starts in GROUPS.items():
        if any(name == start or name.startswith(start.rstrip("_") + "_") for start in starts):
            return group
    return None


def lower_quartile(values: Sequence[float]) -> float:
    """Other programs only ever make a step longer: so rather one of the shorter times than the mean."""
    return sorted(values)[len(values) // 4]


class StepProfiler(TrainerCallback):
    """Profiles some steps of a run, which ends with them.

    Attributes:
        step_seconds: of a step that is not profiled. Processor time leaves out what other programs take, and counts what
            all threads of this one take; so it is the smaller of processor time and wall-clock time.
    """

    def __init__(self, warm_up: int = 15, profiled: int = 15) -> None:
        self.warm_up = validation.whole("warm_up", warm_up, at_least=2)
        self.profiled = validation.whole("profiled", profiled)
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._marks: list[tuple[float, float]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time, and begin or end the profile."""
        if state.global_step <= self.warm_up:
            self._marks.append((time.process_time(), time.perf_counter()))
        if state.global_step == self.warm_up:
            self._profile.start()
        if state.global_step == self.warm_up + self.profiled:
            self._profile.stop()
            control.should_training_stop = True

    @property
    def step_seconds(self) -> float:
        """Of a step that is not profiled; see above."""
        clocks = zip(*self._marks, strict=True)
        return min(lower_quartile([b - a for a, b in itertools.pairwise(clock)]) for clock in clocks)

    def parts(self) -> dict[str, dict[str, dict[str, float]]]:
        """The groups of operations, in seconds and calls per step; and some parts of a step, in seconds.

        A part is made of several operations, which are also in the groups.
        """
        own, whole = defaultdict(list), defaultdict(list)
        for event in self._profile.events():
            own[event.key, str(event.input_shapes)].append(event.self_cpu_time_total / 1e6)
            whole[event.key].append(event.cpu_time_total / 1e6)
        groups = {name: {"seconds": 0.0, "calls": 0.0} for name in GROUPS}
        for (key, _), spent in own.items():
            if group := group_of(key):
                groups[group]["seconds"] += lower_quartile(spent) * len(spent) / self.profiled
                groups[group]["calls"] += len(spent) / self.profiled
        seconds = {
            name: sum(lower_quartile(whole[key]) * len(whole[key]) for key in keys if key in whole) / self.profiled
            for name, keys in PARTS.items()
        }
        return {"groups": groups, "parts": {name: {"seconds": spent} for name, spent in seconds.items() if spent}}


def with_shares(found: dict[str, Any], step: float) -> dict[str, Any]:
    """A profile with shares of a step. What the groups leave is Python, and what the libraries do between the operations.

    Args:
        found: as `StepProfiler.parts` gives it.
        step: seconds of a step that is not profiled.
    """
    in_groups = sum(group["seconds"] for group in found["groups"].values())
    step = max(step, in_groups)
    groups = found["groups"] | {REST: {"seconds": step - in_groups}}

    def shares(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return {name: row | {"share": row["seconds"] / step} for name, row in rows.items()}

    return {"step_seconds": step, "groups": shares(groups), "parts": shares(found["parts"])}


def profile_step(trainer: Trainer, warm_up: int = 15, profiled: int = 15) -> dict[str, Any]:
    """Train on the CPU for some steps, and say where a step's time goes.

    Args:
        trainer: one that has not begun, of a model on the CPU; it ends after these steps.
        warm_up: steps before the profile, from which the time of a step is taken.
        profiled: steps in the profile.

    Returns:
        "step_seconds"; "groups" and "parts", each with seconds and the share of a step.

    Raises:
        ValueError: the model is not on the CPU, or the run has too few steps.
    """
    device = next(trainer.model.parameters()).device
    if device.type != "cpu":
        raise ValueError(
            f"trainer: its model is on {device}, and only a CPU's time is counted: build it with detect('cpu')"
        )
    if trainer.args.max_steps < warm_up + profiled:
        cure = f"are needed: {warm_up} to warm up and {profiled} in the profile"
        raise ValueError(f"trainer: {trainer.args.max_steps} steps are too few; {warm_up + profiled} {cure}")
    profiler = StepProfiler(warm_up, profiled)
    trainer.add_callback(profiler)
    trainer.train()
    trainer.remove_callback(profiler)
    return with_shares(profiler.parts(), profiler.step_seconds)
