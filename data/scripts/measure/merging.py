"""What merging an adapter costs and changes at Llama-3.1-8B's size, in every way of `qlora_helpers.adapters.merge`.

    python -m data.scripts.measure.merging     # needs a GPU; writes data/measured/merging.json, about five minutes on an H200

The weights are random (`data/scripts/make/stand_in_models.py`), and an adapter is trained on them for a few steps, so
that it is not just noise. How far logits drift depends on both; memory, time and sizes do not. Every way runs in its
own process, and all compute the logits of the same tokens.
"""

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from data.scripts import ROOT

TABLE = ROOT / "data" / "measured" / "merging.json"
SHAPE = "Llama-3.1-8B"
RANK, STEPS, TOKENS, CHATS = 16, 40, 512, 4
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
UNMERGED, REQUANTISED = "unmerged", "16bit, then 4bit"
WAYS = (UNMERGED, "no adapter", "4bit", "dequantised", "16bit", REQUANTISED)


def train_adapter(base: Path, adapter: Path) -> dict:
    """Fine-tune the 4-bit model briefly on chats of random words, and save the adapter."""
    from data.scripts.make.stand_in_models import chats
    from qlora_helpers.adapters.files import save_adapter
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.run import train

    tokenizer = load_tokenizer(str(base))
    settings = Settings(
        steps=STEPS,
        batch_size=CHATS,
        learning_rate=2e-4,
        warmup_steps=min(4, STEPS),
        rank=RANK,
        max_length=TOKENS,
        gradient_checkpointing=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        made = chats(CHATS * STEPS, TOKENS, tokenizer)
        run = train(load_model(str(base)), tokenizer, made, Path(folder) / "run", settings)
        save_adapter(run.model, adapter)
    return {"losses": run.history, "seconds": round(run.seconds, 1), "trained_parameters": run.trainable_parameters}


def measure(way: str, base: Path, adapter: Path, merged: Path, reference: Path) -> dict:
    """One way: memory and seconds of the merge, the logits compared with the unmerged model's, speed, size on disk."""
    import torch

    from data.scripts.make.stand_in_models import chats
    from qlora_helpers.adapters.drift import drift, logits
    from qlora_helpers.adapters.files import load_adapter
    from qlora_helpers.adapters.merge import load_base, merge_into
    from qlora_helpers.evaluation import seconds_per_token
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.models.saving import save_model

    on_gpu = torch.cuda.is_available()
    gpu_bytes = torch.cuda.memory_allocated if on_gpu else lambda: 0
    gpu_peak = torch.cuda.max_memory_allocated if on_gpu else lambda: 0
    tokenizer, row, name = load_tokenizer(str(base)), {"way": way}, str(base)
    made = chats(CHATS, TOKENS, tokenizer)
    if way == "no adapter":
        model = load_model(name)
    elif way == REQUANTISED:
        model = load_model(str(merged))
    elif way == UNMERGED:
        model = load_adapter(load_model(name), adapter)
    else:
        model = load_base(way, name)
        row["base_peak_bytes"], row["base_bytes"] = gpu_peak(), gpu_bytes()
        model = load_adapter(model, adapter)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model = merge_into(model)
        if on_gpu:
            torch.cuda.synchronize()
        row["merge_seconds"], row["merge_peak_bytes"] = round(time.perf_counter() - started, 2), gpu_peak()
    row["bytes"] = gpu_bytes()
    found = logits(model, tokenizer, made)
    if way == UNMERGED:
        torch.save(found, reference)
    row |= asdict(drift(found, torch.load(reference)))
    row["ms_per_token"] = round(seconds_per_token(model, tokenizer, made[0][:1]) * 1000, 2)
    if way in ("4bit", "16bit"):
        folder = merged if way == "16bit" else merged.with_name("merged-4bit")
        started = time.perf_counter()
        save_model(model, tokenizer, folder)
        row["save_seconds"] = round(time.perf_counter() - started, 1)
        row["disk_bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return row


def file_merge(base: Path, adapter: Path, merged: Path) -> dict:
    """Like "16bit", but from file to file: its main memory, and whether the result is the same."""
    import psutil
    import torch
    from safetensors.torch import load_file

    from qlora_helpers.adapters.file_merge import merge_files
    from qlora_helpers.hardware import peak_memory_bytes

    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    folder = merge_files(base, adapter, merged.with_name("merged-files"))
    row = {
        "way": "16bit, from file to file",
        "merge_seconds": round(time.perf_counter() - started, 1),
        "host_bytes_before": before,
        "host_peak_bytes": peak_memory_bytes(),
        "largest_file_bytes": max(path.stat().st_size for path in base.glob("*.safetensors")),
    }
    ours, theirs = ({}, {})
    for found, where in ((ours, folder), (theirs, merged)):
        for path in where.glob("*.safetensors"):
            found.update(load_file(path))
    tied = ours.keys() ^ theirs.keys()
    differing = [key for key in ours.keys() & theirs.keys() if not torch.equal(ours[key], theirs[key])]
    values = sum(int((ours[key] != theirs[key]).sum()) for key in differing)
    return row | {"tensors": len(ours), "unmatched_tensors": len(tied), "differing_values": values}


def steps_of(only: list[str] | None) -> list[str]:
    """All steps, or the given ones together with those that they are compared with."""
    needed = {*only, UNMERGED} if only else {*WAYS, "files"}
    if needed & {"files", REQUANTISED}:
        needed.add("16bit")
    return [step for step in (*WAYS, "files") if step in needed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a folder in which to keep the models; by default a temporary one")
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument(
        "--only", nargs="+", choices=(*WAYS, "files"), help="measure these again, and keep the table's other rows"
    )
    parser.add_argument("--dry", action="store_true", help="the shipped model and a few tokens, on any machine")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # what a separate process does
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)  # where it finds and leaves what it makes
    args = parser.parse_args()
    if args.dry:
        global STEPS, TOKENS
        STEPS, TOKENS, args.shape = 2, 32, "tiny-llama"
    if args.step:
        base, adapter, merged = args.models / args.shape, args.scratch / "adapter", args.scratch / "merged"
        if args.step == "adapter":
            row = train_adapter(base, adapter)
        elif args.step == "files":
            row = file_merge(base, adapter, merged)
        else:
            row = measure(args.step, base, adapter, merged, args.scratch / "logits.pt")
        print(json.dumps(row))
        return
    if args.models:
        args.models.mkdir(parents=True, exist_ok=True)
        measure_all(args, args.models)
    else:
        with tempfile.TemporaryDirectory() as models:
            measure_all(args, Path(models))


def measure_all(args: argparse.Namespace, models: Path) -> None:
    """Make the base in `models` if it is not there, measure each step in a process of its own, and write the table."""
    import torch

    from data.scripts.make.stand_in_models import write
    from qlora_helpers.paths import data_path

    if not args.dry:
        write(args.shape, models / args.shape)
    elif not (models / args.shape).exists():
        shutil.copytree(data_path("tiny-llama"), models / args.shape)
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=models) as scratch:

        def in_a_process(step: str) -> dict:
            command = [sys.executable, __file__, "--models", str(models), "--shape", args.shape, "--step", step]
            command += ["--scratch", scratch] + ["--dry"] * args.dry
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{step}: {done.stderr}")
            print(step, done.stdout.splitlines()[-1], flush=True)
            return json.loads(done.stdout.splitlines()[-1])

        trained = in_a_process("adapter")
        rows = [in_a_process(step) for step in steps_of(args.only)]
    table = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "shape": args.shape,
        "rank": RANK,
        "tokens": CHATS * TOKENS,
        "adapter": trained,
    }
    if args.only:  # the other rows were measured with another adapter, made in the same way
        new, table = {row["way"]: row for row in rows}, json.loads(args.table.read_text(encoding="utf-8"))
        rows = [new.get(row["way"], row) for row in table["rows"]]
    table["rows"] = rows
    args.table.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
