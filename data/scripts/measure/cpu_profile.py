"""Where a training step's time goes on a CPU, and what decoding once and keeping freed memory save.

    python -m data.scripts.measure.cpu_profile   # about five minutes on an idle machine

Each way of running is a process of its own with one thread, and the ways take turns, so that a change of the machine's
speed meets all of them. What counts is processor time: other programs lengthen the waiting, and hardly this. One more
process per way is profiled, since profiling itself takes time. Writes `data/measured/cpu_profile.json`.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
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


def group_of(operation: str) -> str | None:
    """The group of one of torch's or bitsandbytes' operations; None for what only calls others."""
    library, _, name = operation.rpartition("::")
    if library not in ("aten", "bitsandbytes"):
        return None
    found = [(len(start), group) for group, starts in GROUPS.items() for start in starts if name.startswith(start)]
    return max(found)[1] if found else None


def one_run(way: str, steps: int, profiled: int) -> dict:
    """Train in this process. Processor seconds, waiting time and fetched pages of a step, or with `profiled` its parts."""
    from functools import partial

    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback

    from qlora_helpers.chats import read_chats
    from qlora_helpers.freed_memory import keep_freed_memory
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.decoded_once import decoded_once
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.paths import data_path
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.trainer import build_trainer

    settings, cpu, tokenizer = Settings(steps=steps), detect("cpu"), load_tokenizer()
    profiler, marks = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if profiled and state.global_step == WARM_UP:
                profiler.start()
            if profiled and state.global_step == WARM_UP + profiled:
                profiler.stop()
                control.should_training_stop = True
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
        trainer.add_callback(Watch)
        with decoded_once(trainer.model) if "decoded once" in saved else contextlib.nullcontext():
            trainer.train()
    if profiled:
        return {"parts": parts_of(profiler, marks[-1][1] - marks[-1 - profiled][1], profiled)}
    each = [
        [after - before for before, after in zip(m, m[1:], strict=False)] for m in zip(*marks[WARM_UP:], strict=True)
    ]
    trained = b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "processor_seconds": statistics.median(each[0]),
        "seconds": statistics.median(each[1]),
        "pages": statistics.median(each[2]),
        "adapters": hashlib.sha256(trained).hexdigest(),
        "losses": [loss.item() for _, loss in trainer.step_losses],
    }


def parts_of(profiler, seconds: float, steps: int) -> dict[str, dict[str, float]]:
    """The groups of operations in a profile: seconds and calls per step, and the share of the step.

    What is left is Python, and what the libraries do between the operations. "of these" names parts that are made of
    several operations, which the groups count as well.
    """
    events = profiler.key_averages()
    groups = {name: [0.0, 0] for name in GROUPS}
    for event in events:
        if group := group_of(event.key):
            groups[group][0] += event.self_cpu_time_total / 1e6
            groups[group][1] += event.count
    groups["Python and calls"] = [seconds - sum(spent for spent, _ in groups.values()), 0]
    whole = {
        "output head and loss": ("ChunkedLogProbFunction", "ChunkedLogProbFunctionBackward"),
        "4-bit layers": ("MatMul4Bit", "MatMul4BitBackward"),
        "optimizer": ("Optimizer.step#AdamW.step",),
    }
    spent_on = {name: [sum(e.cpu_time_total / 1e6 for e in events if e.key in keys), 0] for name, keys in whole.items()}
    as_rows = lambda found: {  # noqa: E731
        name: {"seconds": spent / steps, "share": spent / seconds} | ({"calls": calls / steps} if calls else {})
        for name, (spent, calls) in found.items()
    }
    return {"groups": as_rows(groups), "of these": as_rows({k: v for k, v in spent_on.items() if v[0]})}


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
    profiled = {way: in_a_process(way, STEPS, PROFILED)["parts"] for way in (next(iter(WAYS)), "this course")}
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
        "profiles": profiled,
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
