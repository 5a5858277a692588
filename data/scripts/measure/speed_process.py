"""A row of `speed.py` in its own process.

The libraries are imported once, in the process that starts the rows, and each row is a fork of it. Unsloth patches the
libraries and has a TRL of its own, so its rows are new processes that see its packages, too; several of them can import
it at the same time, before anything is timed (`ahead`), and then wait for their row.
"""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from data.scripts import ROOT
from qlora_helpers.memory.budget import CHOSEN

__all__ = ["Forked", "New", "TimeIsOver", "import_libraries", "measure", "prepare_environment", "waiting"]

RESULT, READY = "RESULT ", "READY"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "triton", "unsloth", "unsloth_zoo")
TINY_STEPS = {"warm_steps": 1, "timed_steps": 2}
# What the course's trainer says of a setting that it cannot keep to, and of what it has chosen.
SAID = re.compile(r"^(compile_layers|liger_layers|packing|memory_budget|Out of GPU memory)")
LOG_LINES = 30
IMPORT_SECONDS = 180


class TimeIsOver(Exception):
    """A row was not done in the time that is left."""


# ---------------------------------------------------------------- in the row's process


def measure(row: dict, dry: bool) -> dict:
    """Build the trainer of a row and train; what was measured."""
    import torch
    from transformers import PrinterCallback, set_seed

    from data.scripts.measure import speed_clock, speed_variants

    if dry:
        row = row | TINY_STEPS
    compiled_before = sum(path.is_file() for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*"))
    started = time.perf_counter()
    set_seed(0)
    profiled = row["profiled"] and not dry
    steps = row["warm_steps"] + row["timed_steps"] + profiled
    with tempfile.TemporaryDirectory() as output:
        trainer = speed_variants.build(row, dry, steps, Path(output))
        load_seconds = time.perf_counter() - started
        counted = trainer.data_collator = speed_clock.CountedTokens(trainer.data_collator)
        clock = speed_clock.clock_for(trainer, row, dry)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"gpu": "a tiny model on a CPU" if dry else torch.cuda.get_device_name(0), "versions": _versions()}
    of_steps = counted.of_steps(trainer.args.gradient_accumulation_steps)
    found |= speed_clock.figures(row, clock, of_steps, losses)
    if at_work := getattr(trainer, "at_work", None):  # what the course's trainer has chosen for a memory budget
        found["at_work"] = {name: getattr(at_work, name) for name in CHOSEN}
    found |= {"compiled_before": compiled_before, "load_seconds": round(load_seconds, 2)}
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # Unsloth is only in its own rows
            found[name] = importlib.metadata.version(name)
    return found


def _outcome(row: dict, dry: bool) -> dict:
    """What was measured, or the error."""
    import torch

    try:
        return {"outcome": "ran"} | measure(row, dry)
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, torch.OutOfMemoryError):
            return {"outcome": "out of memory", "error": str(error)[:500]}
        return {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}


def _to_log(log: Path) -> None:
    with log.open("ab") as written:
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)


def _forked(row: dict, dry: bool, log: Path, sender) -> None:
    _to_log(log)
    sender.send(_outcome(row, dry))


def waiting() -> None:
    """What a new process does: import Unsloth, say that it is ready, wait for a row, measure it."""
    import unsloth  # noqa: F401  before torch and all libraries that it patches
    from trl import SFTTrainer  # noqa: F401

    print(f"\n{READY}", flush=True)
    line = sys.stdin.readline()
    if line:  # else this process is not needed
        job = json.loads(line)
        print(f"\n{RESULT}{json.dumps(_outcome(job['row'], job['dry']))}", flush=True)


# ---------------------------------------------------------------- in the process that starts it


def prepare_environment(caches: Path) -> None:
    """Set what all rows share; before torch is imported, and before a process is started."""
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask whether there is a GPU must not initialise CUDA


def import_libraries(dry: bool) -> None:
    """Import what the rows need, once; those that are forks then have it."""
    from data.scripts.measure.memory import gpu_about, load_libraries

    load_libraries(None if dry else gpu_about()["compute_capability"])


class _Run:
    """A row at work; its output goes to a log."""

    def __init__(self, folder: Path):
        self.log = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
        self.started = time.perf_counter()

    def _finish(self, row: dict, found: dict) -> dict:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        if said := [line[:300] for line in lines if SAID.match(line)]:
            found = found | {"said": said}
        if found["outcome"] == "failed":
            found = found | {"log": lines[-LOG_LINES:]}
        return row | found | {"process_seconds": round(time.perf_counter() - self.started, 1)}


class Forked(_Run):
    """A row in a fork of this process, which has imported the libraries (`import_libraries`)."""

    def result(self, row: dict, dry: bool, seconds: float | None) -> dict:
        """The row with what was measured, or with its error.

        Raises:
            TimeIsOver: it was not done after so many seconds.
        """
        self.started = time.perf_counter()
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_forked, args=(row, dry, self.log, sender))
        process.start()
        sender.close()  # only the child's copy is left, so this process sees when it ends
        if not receiver.poll(seconds):
            process.kill()
            raise TimeIsOver
        try:
            found = receiver.recv()
        except EOFError:
            process.join()
            error = f"the process ended with {process.exitcode} and left nothing"
            found = {"outcome": "failed", "error": error}
        process.join(20)  # the next row needs the GPU's memory
        if process.is_alive():
            process.kill()
        return self._finish(row, found)


class New(_Run):
    """A row in a new process that imports Unsloth from `site` as soon as it is made, and then waits for the row."""

    def __init__(self, folder: Path, site: Path | None):
        super().__init__(folder)
        paths = [str(site)] if site else []
        environment = os.environ | {"UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONUNBUFFERED": "1"}
        environment["UNSLOTH_COMPILE_LOCATION"] = str(self.log.with_suffix(".unsloth"))  # written while it is imported
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "data.scripts.measure.speed", "--waiting"],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, text=True,
            )  # fmt: skip

    def _has_said(self, words: str) -> bool:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return any(line.startswith(words) for line in lines)

    def wait_until_ready(self, until: float) -> bool:
        """Whether it has imported Unsloth; False if it ended, or not before `time.perf_counter()` is `until`."""
        while not self._has_said(READY) and self.process.poll() is None and time.perf_counter() < until:
            time.sleep(0.1)
        return self._has_said(READY)

    def end(self) -> None:
        """End the process if it is still there."""
        self.process.kill()
        self.process.wait()

    def result(self, row: dict, dry: bool, seconds: float | None) -> dict:
        """As `Forked.result`."""
        now = time.perf_counter()
        until = now + (IMPORT_SECONDS if seconds is None else seconds)
        try:
            if not self.wait_until_ready(min(until, now + IMPORT_SECONDS)):
                if seconds is not None and time.perf_counter() >= until:
                    raise TimeIsOver
                return self._finish(row, {"outcome": "failed", "error": "Unsloth was not imported; see the log"})
            self.started = time.perf_counter()
            try:
                self.process.communicate(
                    json.dumps({"row": row, "dry": dry}) + "\n", timeout=seconds and until - self.started
                )
            except subprocess.TimeoutExpired:
                raise TimeIsOver from None
        finally:
            self.end()
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        results = [line for line in lines if line.startswith(RESULT)]
        error = f"the process ended with {self.process.returncode} and left nothing"
        found = json.loads(results[-1].removeprefix(RESULT)) if results else {"outcome": "failed", "error": error}
        return self._finish(row, found)
