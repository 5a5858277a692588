"""Fair comparisons of methods, formats, ranks, batches and sizes: each at its own learning rate, chosen on validation questions.

    python -m data.scripts.measure.comparisons --workers 16           # all runs; about six hours of one core in all
    python -m data.scripts.measure.comparisons --group method         # one group of them
    python -m data.scripts.measure.comparisons --list                 # the kinds of runs, and how many are missing
    python -m data.scripts.measure.comparisons --kind "QLoRA NF4" --rate 0.002 --seed 3   # one run, printed

Each finished run is written at once to comparisons.jsonl beside the table, and not made again, so that a stopped script goes on
where it was; at the end all of them are put into the table, data/measured/comparisons.json. Every run is the shipped model in float32 on
one thread of a CPU, with `BUDGET` and what its kind changes.

A learning rate is chosen by the exact match on 500 validation questions, and reported on 500 test questions. The people of the
training chats, of the validation and of the test questions are others (`data.scripts.measure.held_out`). Where a run is to
learn by heart what it is trained on, there is nothing to hold out: one seed chooses, the others report.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from data.scripts import ROOT

TABLE = ROOT / "data" / "measured" / "comparisons.json"
BUDGET = {"steps": 200, "batch_size": 8, "warmup_steps": 10}
IN_4_BITS = (
    "NF4",
    "NF4 + double quant",
    "FP4",
)  # bases that bitsandbytes has; others are rounded to, and kept in 32 bits
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
LAYERS = {
    "all linear": "all-linear",
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
}
FULL_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
LORA_RATES = (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3)
NAME = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")  # of a person of the invented world


@dataclass(frozen=True)
class Kind:
    """A kind of run, made at several learning rates with several seeds each.

    Attributes:
        label: its name in the table.
        group: what it belongs to.
        rates: the learning rates that are tried.
        base: the format of the frozen weights, or of those that are trained.
        settings: what differs from `BUDGET` and the defaults of `Settings`.
        seeds: how many.
        by_heart: the number of chats with answers dealt out anew, which are to be learnt by heart; None for the usual task.
    """

    label: str
    group: str
    rates: tuple[float, ...]
    base: str = "NF4 + double quant"
    settings: dict = field(default_factory=dict)
    seeds: int = 5
    by_heart: int | None = None


def kinds() -> list[Kind]:
    """All kinds of runs, group by group; those that answer a question first."""
    return [*_methods(), *_by_steps(), *_by_rank(), *_by_alpha(), *_by_batch(), *_by_heart()]


def _methods() -> Iterable[Kind]:
    yield Kind("full fine-tuning", "method", FULL_RATES, "16 bit", {"method": "full"})
    yield Kind("LoRA 16 bit", "method", LORA_RATES, "16 bit")
    for base in ("NF4", "NF4 + double quant", "FP4", "INT4", "INT4 symmetric"):
        more = (2e-4, 6e-3) if base == "NF4 + double quant" else ()  # for the figure of the learning rate
        yield Kind(f"QLoRA {base}", "method", tuple(sorted(LORA_RATES + more)), base)


def _by_steps() -> Iterable[Kind]:
    """Whether the price of 4 bits is what is learnt in the end, or how fast. 200 steps are in the group "method"."""
    rates = {100: (1.5e-3, 2e-3, 3e-3, 4e-3), 400: (7e-4, 1e-3, 1.5e-3, 2e-3), 800: (5e-4, 7e-4, 1e-3, 1.5e-3)}
    for steps, tried in rates.items():
        settings = {"steps": steps, "warmup_steps": steps // 20}
        for label, base in (("LoRA 16 bit", "16 bit"), ("QLoRA NF4 + double quant", "NF4 + double quant")):
            yield Kind(f"{label}, {steps} steps", "steps", tried, base, settings)


def _by_rank() -> Iterable[Kind]:
    """With alpha = 2 r, as in the rest of the course, and with alpha = 32 at each rank."""
    rates = {1: (3e-3, 6e-3, 1.2e-2), 4: (1.5e-3, 3e-3, 6e-3), 16: (1e-3, 1.5e-3, 3e-3), 64: (3e-4, 7e-4, 1.5e-3)}
    for rank, tried in rates.items():
        # rank 16 on all linear layers is in the group "method"
        for layers in ("attention", "MLP") if rank == 16 else ("all linear", "attention"):
            settings = {"rank": rank, "alpha": 2 * rank, "target_modules": LAYERS[layers]}
            more = (6e-3,) if layers == "attention" and rank == 16 else ()
            more += (3e-3,) if layers == "attention" and rank == 64 else ()
            yield Kind(f"rank {rank}, {layers}", "rank", tried + more, settings=settings, seeds=3)
    for rank in (1, 4, 64):
        settings = {"rank": rank, "alpha": 32}
        yield Kind(f"rank {rank}, alpha 32", "rank", (5e-4, 1e-3, 1.5e-3, 3e-3), settings=settings, seeds=3)


def _by_alpha() -> Iterable[Kind]:
    """At the one rate that suits alpha = 32: alpha acts as the rate does."""
    for alpha in (4, 8, 16, 64, 128):
        yield Kind(f"alpha {alpha}", "alpha", (1.5e-3,), settings={"alpha": alpha})


def _by_batch() -> Iterable[Kind]:
    """As many chats in each: 6,400. "LoRA Without Regret" reports that LoRA loses more at large batches."""
    for batch, lora, full in (
        (8, (5e-4, 7e-4, 1e-3, 1.5e-3), (2.5e-5, 5e-5, 1e-4, 2e-4)),
        (32, (1e-3, 1.5e-3, 2e-3, 3e-3), (1e-4, 2e-4, 4e-4, 8e-4)),
        (128, (2e-3, 3e-3, 6e-3, 1e-2), (2e-4, 4e-4, 8e-4, 1.6e-3)),
    ):
        steps = 6400 // batch
        settings = {"batch_size": batch, "steps": steps, "warmup_steps": steps // 20}
        yield Kind(f"LoRA 16 bit, batch {batch}", "batch", lora, "16 bit", settings, seeds=3)
        yield Kind(f"full, batch {batch}", "batch", full, "16 bit", settings | {"method": "full"}, seeds=3)


def _by_heart() -> Iterable[Kind]:
    """Facts that the base does not know, 20 times each: is an adapter too small for what it is to learn?"""
    rates = {1: (6e-3, 1.2e-2), 4: (3e-3, 6e-3), 16: (1e-3, 2e-3), 64: (4e-4, 7e-4)}
    for chats in (400, 1600):
        steps = 20 * chats // 16
        for rank, tried in rates.items():
            settings = {"rank": rank, "alpha": 2 * rank, "batch_size": 16, "steps": steps, "warmup_steps": steps // 20}
            yield Kind(f"rank {rank}, {chats} facts", "by heart", tried, "16 bit", settings, seeds=3, by_heart=chats)


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


def settings_of(kind: Kind, rate: float, seed: int):
    """The settings of a run. Its base says whether LoRA is QLoRA."""
    from qlora_helpers.settings import Settings

    settings = {**BUDGET, **kind.settings, "learning_rate": rate, "seed": seed}
    settings.setdefault("method", "qlora" if kind.base in IN_4_BITS else "lora")
    return Settings(**settings)


def dealt_anew(chats: list, count: int, seed: int = 0) -> tuple[list, float]:
    """Chats with the answers of others to the same question, and the bits that it takes to know all of them.

    Among the chats that ask the same but for the person's name, the answers are shuffled. So a model that knows the world has
    no use for what it knows. The bits are the logarithm of the number of ways to deal the answers out, by question.
    """
    by_question = defaultdict(list)
    for chat in chats[:count]:
        name = NAME.search(chat[0]["content"])[0]
        by_question[chat[0]["content"].replace(name, "…")].append((name, chat))
    drawn, found, bits = random.Random(seed), [], 0.0
    for question, group in sorted(by_question.items()):
        answers = [chat[1]["content"].replace(name, "…") for name, chat in group]
        ways = math.lgamma(len(answers) + 1) - sum(math.lgamma(n + 1) for n in Counter(answers).values())
        bits += ways / math.log(2)
        drawn.shuffle(answers)
        for (name, chat), answer in zip(group, answers, strict=True):
            asked = chat[0] | {"content": question.replace("…", name)}
            found.append([asked, chat[1] | {"content": answer.replace("…", name)}])
    drawn.shuffle(found)
    return found, bits


def measure(kind: Kind, rate: float, seed: int) -> dict:
    """Make one run and score it."""
    from data.scripts.measure.held_out import score, training_validation_test
    from qlora_helpers import evaluation
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_tokenizer
    from qlora_helpers.models.weights import bytes_by_part
    from qlora_helpers.paths import data_path
    from qlora_helpers.training.callbacks import TrainingDiverged
    from qlora_helpers.training.run import train

    tokenizer, model = load_tokenizer(), load(kind.base)
    settings = settings_of(kind, rate, seed)
    training, validation, test = training_validation_test(tokenizer, settings.max_length)
    result = {"kind": kind.label, "learning_rate": rate, "seed": seed, "base_bytes": sum(bytes_by_part(model).values())}
    scored = {"validation": validation, "test": test}
    if kind.by_heart:
        training, bits = dealt_anew(training, kind.by_heart)
        scored = {"learnt": training}
        result["bits"] = round(bits)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = train(model, tokenizer, training, Path(folder) / "run", settings, hardware=detect("cpu"))
        except TrainingDiverged as error:
            return result | {"outcome": f"diverged: {error}"}
        return result | {
            "outcome": "ran",
            "trained_parameters": run.trainable_parameters,
            **{part: score(run.model, tokenizer, chats) for part, chats in scored.items()},
            "recall": evaluation.recall(run.model, tokenizer, evaluation.read_facts(data_path("recall.jsonl"))),
            "seconds": round(run.seconds, 1),
        }


def key(run: dict) -> tuple[str, float, int]:
    """What tells a run from the others."""
    return run["kind"], run["learning_rate"], run["seed"]


def read(path: Path) -> list[dict]:
    """The finished runs of a table, and of the lines beside it that are not in it yet."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    lines = path.with_suffix(".jsonl")
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
        with suppress(json.JSONDecodeError):  # one that a kill has cut: it is made again
            runs.append(json.loads(line))
    return list({key(run): run for run in runs}.values())


def here(workers: int) -> dict:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {workers} runs at a time, one thread each",
        "versions": {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES},
    }


def measure_all(jobs: list[tuple[Kind, float, int]], workers: int, lines: Path) -> None:
    """Make the runs, `workers` at a time, the longest first; each is written as a line when it ends."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    made_on, started = here(workers), time.perf_counter()
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        lines.open("a", encoding="utf-8") as file,
    ):
        file.write("\n" * (lines.stat().st_size > 0))  # the last line may have been cut
        for done, job in enumerate(as_completed([pool.submit(measure, *job) for job in jobs]), start=1):
            run = job.result()
            file.write(json.dumps(run | {"made_on": made_on}) + "\n")
            file.flush()
            part = run.get("test", run.get("learnt"))
            found = run["outcome"] if part is None else f"{part['exact_match']:.1%}"
            took = time.perf_counter() - started
            print(
                f"{done:4}/{len(jobs)} {took:5.0f} s  {run['kind']:34} {run['learning_rate']:g} {run['seed']} {found}",
                flush=True,
            )


def write(path: Path) -> int:
    """Put all finished runs into the table, in the order of the plan. Returns how many are missing."""
    found = {key(run): run for run in read(path)}
    wanted = [(kind.label, rate, seed) for kind in kinds() for rate in kind.rates for seed in range(kind.seeds)]
    runs = [found[one] for one in wanted if one in found]
    before = json.loads(path.read_text(encoding="utf-8"))["made_on"] if path.exists() else []
    made_on = before + [made for run in runs if (made := run.pop("made_on", None))]
    table = {
        "made_on": [made for place, made in enumerate(made_on) if made not in made_on[:place]],
        "budget": BUDGET,
        "groups": {kind.label: kind.group for kind in kinds()},
        "runs": runs,
    }
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".jsonl").unlink(missing_ok=True)
    return len(wanted) - len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", help="the kinds of one group")
    parser.add_argument("--kind", help="the label of one kind")
    parser.add_argument("--rate", type=float, help="one learning rate; by default all of a kind's")
    parser.add_argument("--seed", type=int, help="one seed; by default all of a kind's")
    parser.add_argument("--list", action="store_true", help="what there is, and how many runs are missing")
    parser.add_argument("--collect", action="store_true", help="only put the finished runs into the table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    plan = kinds()
    for name, value in (("group", args.group), ("label", args.kind)):
        if value and value not in (there := {getattr(kind, name): None for kind in plan}):
            sys.exit(f"there is no {name} {value!r}: choose one of {', '.join(there)}")
    have = {key(run) for run in read(args.table)}
    chosen = [
        (kind, rate, seed)
        for kind in plan
        if args.group in (None, kind.group) and args.kind in (None, kind.label)
        for rate in kind.rates
        if args.rate in (None, rate)
        for seed in range(kind.seeds)
        if args.seed in (None, seed)
    ]
    jobs = [job for job in chosen if (job[0].label, *job[1:]) not in have]
    if args.list:
        missing = Counter(kind.label for kind, _, _ in jobs)
        for kind in plan:
            print(
                f"{kind.group:9} {kind.label:34} {len(kind.rates) * kind.seeds:3} runs, {missing[kind.label]} missing"
            )
        return
    if args.kind and args.rate and args.seed is not None:
        print(json.dumps(measure(*chosen[0]), indent=1))
        return
    if not args.collect:
        longest_first = sorted(jobs, key=lambda job: -_chats(job[0]))
        measure_all(longest_first, args.workers, args.table.with_suffix(".jsonl"))
    print(f"{write(args.table)} runs are missing")


def _chats(kind: Kind) -> int:
    """How many chats a run is trained on, which decides how long it takes."""
    settings = {**BUDGET, **kind.settings}
    return settings["steps"] * settings["batch_size"]


if __name__ == "__main__":
    main()
