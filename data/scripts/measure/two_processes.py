"""One run made by one process and by two, on a CPU: do they learn the same?

    python -m data.scripts.measure.two_processes   # about two minutes on an idle machine with two cores

Each row is a run of the shipped model (`qlora_helpers.training.run.train`): by one process, by two that torchrun has launched,
and by two with the batch of each kept, so that a step has twice as many chats. The chats have one question or three, so that
the answer tokens of the two processes differ. Adapters and losses are compared with those of the first row. Writes
`data/measured/two_processes.json`.
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
STEPS, BATCH, CHATS, ASKED = 60, 16, 1200, 250
LAUNCHED = ("-m", "torch.distributed.run", "--nproc-per-node", "2")  # what torchrun calls
ROWS = {  # name: how it is launched, chats of a step
    "one process": ((), BATCH),
    "two processes": (LAUNCHED, BATCH),
    "two processes, twice the chats": (LAUNCHED, 2 * BATCH),
}


def mixed(chats: list, number: int) -> list:
    """Chats of one question and of three, in turn."""
    found, at = [], 0
    for place in range(number):
        length = 3 if place % 2 else 1
        found.append([message for chat in chats[at : at + length] for message in chat])
        at += length
    return found


def one_run(folder: Path, steps: int, batch: int) -> None:
    """Make the run of this process, or its part of it; the first process writes `row.json` beside it."""
    from qlora_helpers.chats import read_chats
    from qlora_helpers.evaluation import loss
    from qlora_helpers.hardware import detect
    from qlora_helpers.launch import launch_of_this_process
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.paths import data_path
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.run import train

    cpu, tokenizer, launch = detect("cpu"), load_tokenizer(), launch_of_this_process()
    chats = mixed(read_chats(data_path("chats", "train.jsonl")), CHATS)
    settings = Settings(steps=steps, batch_size=batch, max_length=96)
    run = train(load_model(hardware=cpu), tokenizer, chats, folder / "run", settings, hardware=cpu)
    if launch.leads:
        asked = read_chats(data_path("chats", "test.jsonl"))[:ASKED]
        row = {
            "processes": launch.processes,
            "chats_of_a_step": batch,
            "loss_history": run.history,
            "test_loss": loss(run.model, tokenizer, asked),
        }
        (folder / "row.json").write_text(json.dumps(row), encoding="utf-8")


def measure_row(name: str, folder: Path, steps: int = STEPS) -> dict:
    """Make one run in an empty folder.

    Raises:
        SystemExit: the run failed.
    """
    launched, batch = ROWS[name]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launched, "-m", "data.scripts.measure.two_processes", "--folder", str(folder)]
    command += ["--steps", str(steps), "--batch", str(batch)]
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}{name!r} failed")
    return {"row": name, **json.loads((folder / "row.json").read_text(encoding="utf-8"))}


def distance(folder: Path, other: Path) -> float:
    """How far apart two adapters are, as a share of the length of the second."""
    import torch
    from safetensors.torch import load_file

    tensors = [load_file(path / "run" / "adapter" / "adapter_model.safetensors") for path in (folder, other)]
    ours, theirs = (torch.cat([one[name].flatten().double() for name in sorted(one)]) for one in tensors)
    return ((ours - theirs).norm() / theirs.norm()).item()


def measure(steps: int = STEPS) -> dict:
    """All rows, one after the other."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(ROWS):
            place = Path(folder, str(number))
            place.mkdir()
            row = measure_row(name, place, steps)
            row["distance"] = distance(place, Path(folder, "0"))
            print(f"{name}: {row['test_loss']:.4f}, {row['distance']:.2g} apart", flush=True)
            found.append(row)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    return {
        "command": "python -m data.scripts.measure.two_processes",
        "versions": versions,
        "steps": steps,
        "rows": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--folder", type=Path, help="make one run in this folder, as a part of a launch")
    parser.add_argument("--batch", type=int, default=BATCH, help="chats of a step, with --folder")
    args = parser.parse_args()
    if args.folder:
        one_run(args.folder, args.steps, args.batch)
    else:
        TABLE.write_text(json.dumps(measure(args.steps), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
