"""One run made by one process and by two, on a CPU: do they learn the same?

    python -m data.scripts.measure.two_processes   # about four minutes on an idle machine with two cores

Each row is the command `run` with the shipped model, as a user would type it: by itself, launched as two processes, and
launched so with the batch of each process kept, so that a step has twice as many chats. Adapters are compared with those of the first row.
Writes `data/measured/two_processes.json`.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from data.scripts import ROOT

TABLE = ROOT / "data" / "measured" / "two_processes.json"
STEPS, BATCH = 300, 16  # the course's own run
LAUNCHED = ("-m", "torch.distributed.run", "--nproc-per-node", "2")  # what torchrun calls
ROWS = {  # name: how it is launched, chats of a step
    "one process": ((), BATCH),
    "two processes": (LAUNCHED, BATCH),
    "two processes, twice the chats": (LAUNCHED, 2 * BATCH),
}


def typed(name: str, steps: int = STEPS) -> str:
    """The command of a row, as one types it."""
    launched, batch = ROWS[name]
    begins = "torchrun --nproc-per-node 2" if launched else "python"
    return f"{begins} -m qlora_helpers run --steps {steps} --batch-size {batch}"


def measure_row(name: str, folder: Path, steps: int = STEPS) -> dict:
    """Make one run in a new folder; its losses, and its answers after training.

    Raises:
        SystemExit: the run failed.
    """
    launched, batch = ROWS[name]
    run = ["-m", "qlora_helpers", "run", "--steps", str(steps), "--batch-size", str(batch)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "QLORA_GEAR": "cpu"}
    command = [sys.executable, *launched, *run, "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}{name!r} failed")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {
        "row": name,
        "command": typed(name, steps),
        "processes": 2 if launched else 1,
        "chats_of_a_step": batch,
        "loss_history": report["loss_history"],
        "exact_match": report["scores"]["after"]["exact_match"],
    }


def adapter_of(folder: Path) -> dict:
    """The trained tensors of a run, by name."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def distance(one: dict, other: dict) -> float:
    """How far apart two adapters are, as a share of the length of the second."""
    import torch

    ours, theirs = (torch.cat([tensors[name].flatten().double() for name in sorted(tensors)]) for tensors in (one, other))
    return ((ours - theirs).norm() / theirs.norm()).item()


def measure(steps: int = STEPS) -> dict:
    """All rows, one after the other."""
    found, adapters = [], {}
    for name in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            row = measure_row(name, Path(folder, "run"), steps)
            adapters[name] = adapter_of(Path(folder, "run"))
        row["distance"] = distance(adapters[name], adapters["one process"])
        print(f"{name}: loss {row['loss_history'][-1][1]:.4f}, {row['exact_match']}, {row['distance']:.2g} apart", flush=True)
        found.append(row)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    return {"command": "python -m data.scripts.measure.two_processes", "versions": versions, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    args = parser.parse_args()
    TABLE.write_text(json.dumps(measure(args.steps), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
