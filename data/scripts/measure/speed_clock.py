"""The clock of `speed.py`: a callback that times the steps of a trainer, and watches the GPU meanwhile."""

import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

__all__ = ["CountedTokens", "clock_for", "figures"]

BUSY = 0.9  # below this share of the time, the CPU that feeds the GPU decides the speed
WATCHED = ("utilization.gpu", "clocks.sm", "power.draw")
INTERVAL = 200  # ms


class CountedTokens:
    """A collator that counts the tokens of its rows before they are padded, and the places of the batch."""

    def __init__(self, collator):
        self.collator = collator
        self.tokens: list[int] = []
        self.places: list[int] = []

    def __call__(self, rows, *args, **kwargs):
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        batch = self.collator(rows, *args, **kwargs)
        self.places.append(batch["input_ids"].numel())
        return batch

    def of_steps(self, batches: int) -> tuple[list[int], list[int]]:
        """The tokens and the places of each step of so many batches."""
        starts = range(0, len(self.tokens), batches)
        return tuple([sum(part[at : at + batches]) for at in starts] for part in (self.tokens, self.places))

    def __getattr__(self, name):  # only what is not here
        if name == "collator":  # before __init__, when a copy is made
            raise AttributeError(name)
        return getattr(self.collator, name)


class _Watch:
    """What nvidia-smi says of the first GPU, five times a second."""

    def __init__(self):
        command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(WATCHED)}", "--format=csv,noheader,nounits"]
        self.process = subprocess.Popen([*command, "-lms", str(INTERVAL)], stdout=subprocess.PIPE, text=True)

    def stop(self) -> dict:
        """The medians, by name; an entry that the card does not give is left out."""
        self.process.terminate()
        lines = [line.split(", ") for line in self.process.communicate()[0].splitlines()]
        lines = [line for line in lines if len(line) == len(WATCHED)]  # the last one may be cut off
        found = {"samples": len(lines)}
        for name, column in zip(WATCHED, zip(*lines, strict=True), strict=False):
            numbers = [float(value) for value in column if value.replace(".", "", 1).isdigit()]
            if numbers:
                found[name] = statistics.median(numbers)
        return found


def _busy_seconds(trace: dict) -> tuple[float, float]:
    """How long at least one kernel or copy was at work, and from the first one's start to the last one's end."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6, (until - spans[0][0]) / 1e6


def clock_for(trainer, row: dict, dry: bool):
    """A callback that times the warm-up and the timed steps of a row, and profiles one more if the row says so."""
    import torch
    from transformers import TrainerCallback

    timed_to = row["warm_steps"] + row["timed_steps"]

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []
            self.skipped: list[int] = []
            self.found: dict = {}
            self.last, self.watch, self.profiler = 0.0, None, None

        def _now(self) -> float:
            if not dry:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_train_begin(self, args, state, control, **kwargs):
            if not dry:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            self.last = self._now()

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == timed_to:  # all of them are done
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()

        def on_step_end(self, args, state, control, **kwargs):
            now, step = self._now(), state.global_step
            if self.profiler is not None:
                self.profiler.stop()
                return
            self.seconds.append(now - self.last)
            if trainer.accelerator.optimizer_step_was_skipped:
                self.skipped.append(step)
            if step == row["warm_steps"] and not dry:
                self.watch = _Watch()
            if step == timed_to and not dry:
                self.found["nvidia_smi"] = self.watch.stop()
                self.found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
                self.found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            self.last = self._now()

        def busy(self) -> tuple[float, float]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "trace.json")
                self.profiler.export_chrome_trace(str(path))
                return _busy_seconds(json.loads(path.read_text(encoding="utf-8")))

    return Clock()


def figures(row: dict, clock, counted: tuple[list[int], list[int]], losses: list[float]) -> dict:
    """What was measured, from the steps that were made.

    Args:
        counted: tokens and places of each step.
    """
    step_tokens, step_places = counted
    warm, until = row["warm_steps"], row["warm_steps"] + row["timed_steps"]
    seconds, tokens = clock.seconds[warm:until], step_tokens[warm:until]
    if len(seconds) < row["timed_steps"]:
        raise RuntimeError(f"only {len(clock.seconds)} of {until} steps were made")
    found = {
        "tokens_per_second": round(statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)), 1),
        "tokens_per_second_overall": round(sum(tokens) / sum(seconds), 1),
        "first_step_seconds": round(clock.seconds[0], 3),
        "step_seconds": [round(s, 4) for s in clock.seconds],
        "step_tokens": step_tokens[:until],
        "step_places": step_places[:until],
        "losses": losses[:until],
        "skipped_steps": clock.skipped,
    } | clock.found
    if clock.profiler is not None:
        try:
            busy, span = clock.busy()
        except Exception as error:  # what was timed is worth keeping
            found["profiler_error"] = f"{type(error).__name__}: {error}"[:500]
        else:
            # steps of full sequences are alike: the timed ones were not slowed down by the profiler
            whole = statistics.median(seconds) if row["data"] == "full" else span
            found |= {"busy_share": round(busy / whole, 3), "busy_seconds": round(busy, 4)}
    if "busy_share" not in found and "utilization.gpu" in found.get("nvidia_smi", {}):
        found["busy_share"] = found["nvidia_smi"]["utilization.gpu"] / 100
    if "busy_share" in found:
        found["bound_by"] = "the CPU" if found["busy_share"] < BUSY else "the GPU"
    return found
