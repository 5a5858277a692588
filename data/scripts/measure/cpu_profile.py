"""Where a training step's time goes on a CPU, and what decoding once and keeping freed memory save.

    python -m data.scripts.measure.cpu_profile   # about five minutes on an idle machine

Each way of running is a process of its own with one thread, and the ways take turns, so that a change of the machine's
speed meets all of them. What counts is processor time, and of the steps of a run their lower quartile: other programs
only ever make a step longer. Two more processes are profiled, since profiling itself takes time. Writes
`data/measured/cpu_profile.json`.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.scripts import ROOT

TABLE = ROOT / "data" / "measured" / "cpu_profile.json"
WAYS = {  # name: what is done to save time
    "as the libraries do it": (),
    "decoded once": ("decoded once",),
    "freed memory kept": ("freed memory kept",),
    "this course": ("decoded once", "freed memory kept", "parameters counted once"),
}
STEPS, WARM_UP, PROFILED = 60, 15, 15


def one_run(way: str, steps: int, profiled: int) -> dict:
    """Train in this process. Processor seconds, waiting time and fetched pages of a step, or with `profiled` its parts."""
    from functools import partial

    from transformers import PrinterCallback, Trainer, TrainerCallback

    from qlora_helpers.chats import read_chats
    from qlora_helpers.freed_memory import keep_freed_memory
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.decoded_once import decoded_once
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.paths import data_path
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.step_profile import StepProfiler, lower_quartile
    from qlora_helpers.training.trainer import build_trainer

    settings, cpu, tokenizer = Settings(steps=steps), detect("cpu"), load_tokenizer()
    marks = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            marks.append((time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt))

    saved = WAYS[way]
    if "freed memory kept" in saved and not keep_freed_memory():
        sys.exit("freed memory is kept with glibc only, and the C library here is another")
    with tempfile.TemporaryDirectory() as folder:
        chats = read_chats(data_path("chats", "train.jsonl"), tokenizer, settings.max_length)
        trainer = build_trainer(load_model(hardware=cpu), tokenizer, chats, Path(folder), settings, cpu)
        if "parameters counted once" not in saved:
            trainer.floating_point_ops = partial(Trainer.floating_point_ops, trainer)
        trainer.remove_callback(PrinterCallback)
        watch = StepProfiler(WARM_UP, profiled) if profiled else Watch()
        trainer.add_callback(watch)
        with decoded_once(trainer.model) if "decoded once" in saved else contextlib.nullcontext():
            trainer.train()
    if profiled:
        return {"parts": watch.parts()}
    each = [[after - before for before, after in itertools.pairwise(m)] for m in zip(*marks[WARM_UP:], strict=True)]
    trained = b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "processor_seconds": lower_quartile(each[0]),
        "seconds": lower_quartile(each[1]),
        "pages": statistics.median(each[2]),
        "adapters": hashlib.sha256(trained).hexdigest(),
        "losses": [loss.item() for _, loss in trainer.step_losses],
    }


def in_a_process(way: str, steps: int, profiled: int = 0) -> dict:
    command = [sys.executable, "-m", "data.scripts.measure.cpu_profile", "--way", way]
    command += ["--steps", str(steps), "--profiled", str(profiled)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}{way!r} failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(rounds: int) -> dict:
    """All ways in turn.

    Raises:
        SystemExit: two ways do not end with the same adapters and losses, bit for bit.
    """
    from data.scripts.measure.commands import processor
    from qlora_helpers.training.step_profile import with_shares

    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, found in runs.items():
            found.append(in_a_process(way, STEPS))
            print(
                f"{way:24} {1e3 * found[-1]['processor_seconds']:6.1f} ms, {found[-1]['pages']:.0f} pages", flush=True
            )
    ends = {(run["adapters"], tuple(run["losses"])) for found in runs.values() for run in found}
    if len(ends) != 1:
        sys.exit(f"the ways of running end in {len(ends)} different results")
    plain = runs["as the libraries do it"]
    rows = [
        {
            "way": way,
            "processor_seconds": statistics.median(run["processor_seconds"] for run in found),
            "each": [run["processor_seconds"] for run in found],
            # round by round, since the machine's speed changes from one to the next
            "of_plain": statistics.median(
                run["processor_seconds"] / other["processor_seconds"] for run, other in zip(found, plain, strict=True)
            ),
            "pages": statistics.median(run["pages"] for run in found),
        }
        for way, found in runs.items()
    ]
    steps = {row["way"]: row["processor_seconds"] for row in rows}
    profiles = {
        way: with_shares(in_a_process(way, STEPS, PROFILED)["parts"], steps[way])
        for way in (next(iter(WAYS)), "this course")
    }
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        "command": "python -m data.scripts.measure.cpu_profile",
        "steps": STEPS,
        "rounds": rounds,
        "bit_identical": True,
        "rows": rows,
        "profiles": profiles,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--profiled", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_run(args.way, args.steps, args.profiled)))
        return
    TABLE.write_text(json.dumps(measure(args.rounds), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
