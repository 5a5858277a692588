"""How 4 bits, the rank, the adapted layers, alpha and the learning rate affect the result: many similar short runs.

    python -m data.scripts.measure.quality --workers 16             # all runs; seven minutes on 16 cores, writes quality.json
    python -m data.scripts.measure.quality --row "QLoRA NF4" --seed 3 # one of them, printed
    python -m data.scripts.measure.quality --missing                # only runs that are not in the table yet

Every run is the same except for what its row changes: the shipped model, its 4,800 training chats, `BUDGET` below. Each
runs with one thread, in float32 on the CPU, like the lesson that repeats one of them.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from data.scripts import ROOT

TABLE = ROOT / "data" / "measured" / "quality.json"
SEEDS = range(5)
BUDGET = {"steps": 200, "batch_size": 8, "learning_rate": 1.5e-3, "warmup_steps": 10}
IN_4_BITS = ("NF4", "NF4 + double quant", "FP4")  # bases that bitsandbytes has
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Row:
    """One row of the table: a base, and the differences from `BUDGET` and the defaults of `Settings`."""

    label: str
    group: str
    base: str = "NF4 + double quant"
    settings: dict = field(default_factory=dict)
    seeds: range = SEEDS


def rows() -> list[Row]:
    """All rows, group by group."""
    plan = [
        Row("full fine-tuning", "method", "16 bit", {"method": "full", "learning_rate": 2e-4}),
        Row("LoRA 16 bit", "method", "16 bit"),
        *[
            Row(f"QLoRA {base}", "method", base)
            for base in ("NF4", "NF4 + double quant", "FP4", "INT4", "INT4 symmetric")
        ],
    ]
    for method, base, rates in (
        ("full", "16 bit", (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)),
        ("lora", "NF4 + double quant", (2e-4, 5e-4, 1e-3, 1.5e-3, 3e-3, 6e-3)),
    ):
        for rate in rates:
            settings = {"method": method, "learning_rate": rate}
            plan.append(Row(f"{method}, learning rate {rate:g}", "learning rate", base, settings))
    for rank in (1, 4, 16, 64):
        for name, targets in (("all linear", "all-linear"), ("attention", ATTENTION)):
            plan.append(
                Row(
                    f"rank {rank}, {name}",
                    "rank",
                    settings={"rank": rank, "alpha": 2 * rank, "target_modules": targets},
                )
            )
    for base in ("16 bit", "NF4 + double quant"):
        half = {"steps": 100, "learning_rate": 2e-3, "warmup_steps": 5}
        plan.append(Row(f"{base}, 100 steps", "half the steps", base, half))
    # each rank has its own best learning rate: 1.5e-3 suits rank 16
    for rank, layers, rates in (
        (1, "all linear", (3e-3, 6e-3, 1.2e-2)),
        (1, "attention", (3e-3, 6e-3, 1.2e-2)),
        (4, "all linear", (3e-3, 6e-3)),
        (4, "attention", (3e-3, 6e-3, 1.2e-2)),
        (16, "all linear", (3e-3,)),
        (16, "attention", (3e-3, 6e-3)),
        (64, "all linear", (3e-4, 7e-4)),
        (64, "attention", (3e-4, 7e-4, 3e-3)),
    ):
        targets = "all-linear" if layers == "all linear" else ATTENTION
        for rate in rates:
            settings = {"rank": rank, "alpha": 2 * rank, "target_modules": targets, "learning_rate": rate}
            label = f"rank {rank}, {layers}, learning rate {rate:g}"
            plan.append(Row(label, "rank and rate", settings=settings, seeds=range(3)))
    for alpha in (4, 8, 16, 32, 64, 128):
        plan.append(Row(f"alpha {alpha}", "alpha", settings={"alpha": alpha}))
    return plan


def load(base: str):
    """The shipped model with its linear weights in a format: by bitsandbytes if it has it, else rounded to it."""
    from qlora_helpers import quantize
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_model
    from qlora_helpers.models.weights import quantize_dequantize

    hardware = detect("cpu")
    if base in IN_4_BITS:
        return load_model(quantization=base[:3].lower(), double_quant=base.endswith("double quant"), hardware=hardware)
    model = load_model(quantization=None, hardware=hardware)
    if base != "16 bit":
        quantize_dequantize(model, {"INT4": quantize.INT4, "INT4 symmetric": quantize.INT4_SYMMETRIC}[base])
    return model


def settings_of(row: Row, seed: int, budget: dict):
    """The settings of a row. Its base says whether LoRA is QLoRA: formats that bitsandbytes does not have are rounded to."""
    from qlora_helpers.settings import Settings

    settings = {**budget, **row.settings, "seed": seed}
    if settings.get("method") != "full":
        settings["method"] = "qlora" if row.base in IN_4_BITS else "lora"
    return Settings(**settings)


def measure(row: Row, seed: int, budget: dict | None = None) -> dict:
    """Make one run and score it."""
    from qlora_helpers import evaluation
    from qlora_helpers.chats import read_chats
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_tokenizer
    from qlora_helpers.models.weights import bytes_by_part
    from qlora_helpers.paths import data_path
    from qlora_helpers.training.callbacks import TrainingDiverged
    from qlora_helpers.training.run import train

    tokenizer, model = load_tokenizer(), load(row.base)
    weights = sum(bytes_by_part(model).values())
    settings = settings_of(row, seed, budget or BUDGET)
    train_chats, test_chats = (
        read_chats(data_path("chats", f"{part}.jsonl"), tokenizer, settings.max_length) for part in ("train", "test")
    )
    result = {"label": row.label, "group": row.group, "seed": seed, "base_bytes": weights}
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = train(model, tokenizer, train_chats, Path(folder) / "run", settings, hardware=detect("cpu"))
        except TrainingDiverged as error:
            return result | {"outcome": f"diverged: {error}"}
        return result | {
            "outcome": "ran",
            "trained_parameters": run.trainable_parameters,
            "exact_match": evaluation.exact_match(run.model, tokenizer, test_chats),
            "loss": round(evaluation.loss(run.model, tokenizer, test_chats), 5),
            "recall": evaluation.recall(run.model, tokenizer, evaluation.read_facts(data_path("recall.jsonl"))),
            "seconds": round(run.seconds, 1),
            "torch": importlib.metadata.version("torch").partition("+")[0],
        }


def _job(row: Row, seed: int) -> dict:
    return measure(row, seed)


def measure_all(jobs: list[tuple[Row, int]], workers: int) -> list[dict]:
    """Make the runs, `workers` at a time; each process has one thread and makes several runs."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found, started = [], time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for job in as_completed([pool.submit(_job, row, seed) for row, seed in jobs]):
            found.append(job.result())
            last = found[-1]
            print(
                f"{len(found):4}/{len(jobs)} {time.perf_counter() - started:5.0f} s  {last['label']:32} seed {last['seed']} "
                f"{last.get('exact_match', last['outcome'])}",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help="the label of one row")
    parser.add_argument("--seed", type=int, help="one seed; by default all five")
    parser.add_argument("--missing", action="store_true", help="keep the table's runs, and make the missing ones")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    plan = rows()
    if args.row and args.row not in [row.label for row in plan]:
        sys.exit(f"no row {args.row!r}: there are {', '.join(row.label for row in plan)}")
    old = (
        json.loads(args.table.read_text(encoding="utf-8"))
        if args.missing and args.table.exists()
        else {"runs": [], "made_on": []}
    )
    kept, before = old["runs"], old["made_on"]
    have = {(run["label"], run["seed"]) for run in kept}
    jobs = [
        (row, seed)
        for row in plan
        for seed in (row.seeds if args.seed is None else [args.seed])
        if args.row in (None, row.label) and (row.label, seed) not in have
    ]
    runs = kept + measure_all(jobs, args.workers)
    if args.row:
        print(json.dumps(runs, indent=1))
        return
    order = [(row.label, seed) for row in plan for seed in row.seeds]
    runs = sorted(
        (r for r in runs if (r["label"], r["seed"]) in order), key=lambda r: order.index((r["label"], r["seed"]))
    )
    here = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.workers} runs at a time, one thread each",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    table = {
        "made_on": [made for made in before if made != here] + [here],
        "budget": BUDGET,
        "runs": runs,
    }
    args.table.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
