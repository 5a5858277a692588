"""What the suggested settings teach the shipped model from 60, 400 and 4,800 of its chats: runs on a CPU, three seeds each, one for 4,800.

    python -m data.scripts.measure.suggestions --workers 16    # writes data/measured/suggestions.json

Each seed draws its own chats from the training chats. The exact match is that of the 500 test questions, which are about
people whom no training chat mentions. Three more rows, of 60 chats with one thing changed, show why the table has its values.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from data.scripts import ROOT
from qlora_helpers import evaluation
from qlora_helpers.chats import read_chats
from qlora_helpers.memory import ModelShape
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.suggestions import suggest_settings
from qlora_helpers.training.run import train

TABLE = ROOT / "data" / "measured" / "suggestions.json"
SEEDS = {60: 3, 400: 3, 4_800: 1}  # by rows
RECORDED = ("steps", "batch_size", "accumulation", "learning_rate", "warmup_steps", "rank", "alpha", "max_grad_norm")


def plan() -> list[tuple[str, int, Settings]]:
    """The runs: label, rows and settings."""
    shape = ModelShape.from_config(data_path("tiny-llama"))
    suggested = {rows: suggest_settings(shape, rows).settings for rows in SEEDS}
    few = suggested[60]
    half = replace(few, steps=few.steps // 2)
    return [
        ("suggested", 60, few),
        ("half as many steps", 60, half),
        ("learning rate 0.001", 60, replace(few, learning_rate=1e-3)),
        ("half the warm-up", 60, replace(few, warmup_steps=few.warmup_steps // 2)),
        ("suggested", 400, suggested[400]),
        ("suggested", 4_800, suggested[4_800]),
    ]


def measure(job: tuple[str, int, Settings, int]) -> dict[str, float]:
    """One run, of label, rows, settings and seed: the exact match after it, and how long it trained."""
    _, rows, settings, seed = job
    tokenizer, model = load_tokenizer(), load_model(quantization="nf4")
    chats, test = (read_chats(data_path("chats", f"{part}.jsonl")) for part in ("train", "test"))
    chats = random.Random(seed).sample(chats, rows)
    with tempfile.TemporaryDirectory() as folder:
        run = train(model, tokenizer, chats, Path(folder) / "run", replace(settings, seed=seed))
    return {
        "exact_match": evaluation.exact_match(run.model, tokenizer, test),
        "loss": round(evaluation.loss(run.model, tokenizer, test), 4),
        "seconds": round(run.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workers", type=int, default=1, help="runs at a time, of one thread each (default: %(default)s)"
    )
    workers = parser.parse_args().workers
    jobs = [(*planned, seed) for planned in plan() for seed in range(SEEDS[planned[1]])]
    runs = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for (label, rows, settings, seed), found in zip(jobs, pool.map(measure, jobs), strict=True):
            chosen = {name: getattr(settings, name) for name in RECORDED}
            runs.append({"label": label, "rows": rows, "seed": seed} | chosen | found)
            print(runs[-1], flush=True)
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")
    }
    content = {
        "made_on": {
            "machine": f"{platform.machine()}, {workers} runs at a time, one thread each",
            "versions": versions,
        },
        "runs": runs,
    }
    TABLE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
