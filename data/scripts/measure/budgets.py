"""Thirty runs, drawn beforehand, each within a memory budget on one GPU: does any die, and is what was chosen fast?

    python -m data.scripts.measure.budgets --draw                    # shows the runs; needs no GPU
    python -m data.scripts.measure.budgets --out budgets.jsonl       # measures them, six at a time
    python -m data.scripts.measure.budgets --out budgets.jsonl --compared   # then five of them beside other choices
    python -m data.scripts.measure.budgets --collect budgets.jsonl   # writes data/measured/budgets.json

A run's model, longest chat, chats of a step, budget, gear and options are drawn with a seed. A budget is drawn between what
the least demanding choice is predicted to take, with the margin that is left free, and three times that. Every run has at
least one step whose chats are all of the full length, since that is what a budget has to stand.

`--compared` makes five runs again, alone on the GPU and in turns, each twice: as chosen, and by the fastest of the other
ways that were predicted to fit. The pace is that of the quickest step of full length, after one to warm up.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import random
import re
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

from data.scripts import ROOT
from data.scripts.measure import speed_data, speed_process
from data.scripts.measure.memory_plan import CONFIGS
from data.scripts.measure.t4_gear import as_on_a_t4
from qlora_helpers.memory.budget import CHOSEN
from qlora_helpers.units import GIB

TABLE = ROOT / "data" / "measured" / "budgets.json"
SEED = 16
COUNT = 30
AT_ONCE, STEPS = 6, 4
COMPARED, TURNS, COMPARED_STEPS = 5, 2, 8  # the first so many of those that had a choice
MODELS = {
    "qwen2.5-0.5b": 1, "qwen2.5-1.5b": 3, "llama-3.2-3b": 2, "llama-3.1-8b": 3, "mistral-7b": 1,
}  # fmt: skip
WORDS = 4_096
LONGEST = 32_768  # positions of the models: a default window may be shorter than a drawn length


def draw() -> list[dict]:
    """The runs, always the same ones."""
    from qlora_helpers.memory import find_gpu, find_shape, predict
    from qlora_helpers.memory.budget import LEAST_MARGIN, MARGIN
    from qlora_helpers.settings import Settings

    drawn, found = random.Random(SEED), []
    while len(found) < COUNT:
        known = [name for name in MODELS if name in CONFIGS]
        model = drawn.choices(known, [MODELS[name] for name in known])[0]
        gear = drawn.choice(["bf16", "bf16", "t4"])
        length = drawn.choice([256, 512, 1_024, 2_048, 4_096])
        options = {"batch_size": drawn.choice([1, 2, 4, 8]), "accumulation": drawn.choice([1, 2, 3, 4])}
        options |= {"compile_layers": drawn.random() < 0.3, "packing": drawn.random() < 0.3}
        options |= {"expandable_segments": drawn.random() < 0.3}
        dtype = "float16" if gear == "t4" else "bfloat16"
        least = Settings(
            max_length=length, compute_dtype=dtype, gradient_checkpointing=True, activation_offloading=True
        )
        least = replace(least, **options | {"batch_size": 1, "accumulation": 1})
        shape = find_shape(CONFIGS[model])
        taken = predict(shape, least, find_gpu("t4" if gear == "t4" else "h200")).device_bytes
        taken = max(taken / (1 - MARGIN), taken + LEAST_MARGIN)
        budget = int(taken * drawn.uniform(1.02, 3.0) / GIB * 10 + 1) / 10
        label = f"{len(found) + 1} {model} {gear} {length} {budget}GiB"
        found.append(
            {"label": label, "model": model, "gear": gear, "max_length": length, "budget": budget}
            | {"options": options}
        )
    return found


def measure(row: dict, settings_more: dict | None = None) -> dict:
    """Make a run and say how it went.

    Args:
        settings_more: in place of the budget's choice.
    """
    import torch

    from data.scripts.measure.memory import build_model
    from qlora_helpers.hardware import detect
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.trainer import build_trainer
    from qlora_helpers.units import in_words

    if row["gear"] == "t4":
        as_on_a_t4(math_kernel=False)
        torch.cuda.set_per_process_memory_fraction(1.0)  # the budget is the limit here, not a T4's memory
    hardware = detect("t4" if row["gear"] == "t4" else "ampere")
    if row["gear"] == "t4":
        hardware = replace(hardware, capability=(7, 5))  # its kernels are those of a T4
    dtype = str(hardware.compute_dtype).removeprefix("torch.")
    config = CONFIGS[row["model"]] | {"max_position_embeddings": LONGEST}
    about = {"config": config, "method": "qlora", "compute_dtype": dtype, "double_quant": True}
    model = build_model(about | {"attention": "sdpa", "t4_kernels": row["gear"] == "t4"}, False)
    steps = COMPARED_STEPS if row.get("full") else STEPS
    usual = {"max_length": row["max_length"], "steps": steps, "warmup_steps": 1, "learning_rate": 1e-4, "log_steps": 1}
    budget = {"memory_budget": f"{row['budget']}GiB"} if settings_more is None else {}
    settings = Settings(**usual | row["options"] | budget | (settings_more or {}))
    chats_of_a_step = row["options"]["batch_size"] * row["options"]["accumulation"]
    # the first half of the steps have full chats, the other half any
    drawn = random.Random(row["label"])
    full = [row["max_length"]] * (chats_of_a_step * steps)
    lengths = full if row.get("full") else [
        row["max_length"] if place < len(full) // 2 else drawn.randint(8, row["max_length"]) for place in range(len(full))
    ]  # fmt: skip
    words = min(model.config.vocab_size, WORDS)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        tokenizer = speed_data.make_tokenizer(words)
        trainer = build_trainer(model, tokenizer, speed_data.chats_of(lengths, words), Path(output), settings, hardware)
        planned = time.perf_counter() - started
        clock = _clock()
        trainer.add_callback(clock)
        trainer.train()
    plan, now = trainer.plan, trainer.at_work
    found = {
        "planned_in_seconds": round(planned, 1),
        "step_seconds": [round(seconds, 4) for seconds in clock.seconds],
        "pace": round(chats_of_a_step * row["max_length"] / min(clock.seconds[1:]), 1),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "ended_with": _chosen(now),
    }
    if plan is not None:
        found |= {
            "chosen": _chosen(plan.chosen.settings),
            "predicted_peak_allocated": plan.chosen.prediction.peak_allocated_bytes,
            "predicted_on_the_card": in_words(plan.chosen.prediction.device_bytes),
            "fell_back": plan.chosen.settings != now,
            "others_that_fit": [
                _chosen(choice.settings)
                for choice in plan.others
                if choice.prediction.device_bytes <= plan.budget - plan.margin
            ],
        }
    return found


def _chosen(settings) -> dict:
    return {name: getattr(settings, name) for name in CHOSEN}


def _clock():
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []

        def _now(self):
            torch.cuda.synchronize()
            return time.perf_counter()

        def on_train_begin(self, args, state, control, **kwargs):
            self.last = self._now()

        def on_step_end(self, args, state, control, **kwargs):
            now = self._now()
            self.seconds.append(now - self.last)
            self.last = now

    return Clock()


def in_processes(jobs: list[tuple[dict, dict | None]], log: str, at_once: int):
    """Runs in forks of this process, so many at the same time; yields each when it is done."""
    context, waiting, at_work = multiprocessing.get_context("fork"), list(jobs), {}
    while waiting or at_work:
        while waiting and len(at_work) < at_once:
            row, more = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_one, args=(row, more, log, sender))
            process.start()
            sender.close()
            at_work[receiver] = row, process
        for receiver in multiprocessing.connection.wait(list(at_work)):
            row, process = at_work.pop(receiver)
            try:
                found = receiver.recv()
            except EOFError:
                found = row | {"outcome": "died", "error": "the process left nothing"}
            process.join()
            yield found


def _one(row: dict, more: dict | None, log: str, sender) -> None:
    speed_process._to_log(Path(log))
    try:
        sender.send(row | {"outcome": "ran"} | measure(row, more))
    except Exception as error:
        traceback.print_exc()
        sender.send(row | {"outcome": "died", "error": f"{type(error).__name__}: {error}"[:1_500]})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("budgets.jsonl"))
    parser.add_argument("--drawn", type=Path, help="the runs as --draw printed them, to save the time of predicting")
    parser.add_argument("--compared", action="store_true")
    parser.add_argument("--only", type=int, default=COUNT, help="the first so many")
    parser.add_argument("--rows", default="", help="a regular expression, searched in the labels")
    parser.add_argument("--collect", type=Path, nargs="+", metavar="FILE")
    args = parser.parse_args(arguments)
    if args.draw:
        print(json.dumps(draw(), indent=1))
        return 0
    if args.collect:
        rows = [json.loads(line) for file in args.collect for line in file.read_text(encoding="utf-8").splitlines()]
        content = {"command": "python -m data.scripts.measure.budgets", "seed": SEED}
        content |= {"rows": [row for row in rows if "compared" not in row]}
        content |= {"compared": [row for row in rows if "compared" in row]}
        TABLE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return 0
    if args.drawn:
        rows = json.loads(args.drawn.read_text(encoding="utf-8"))
    elif not args.compared:
        with multiprocessing.get_context("fork").Pool(1) as process:  # drawing predicts, which initialises CUDA
            rows = process.apply(draw)
    with tempfile.TemporaryDirectory(prefix="budgets-") as made:
        folder = Path(made)
        speed_process.prepare_environment(folder)
        speed_process.import_libraries(False)
        log = str(args.out.with_suffix(".log"))
        if args.compared:
            return compare(args.out, log, args.rows)
        jobs = [(row, None) for row in rows[: args.only] if re.search(args.rows, row["label"])]
        with args.out.open("a", encoding="utf-8") as out:
            for found in in_processes(jobs, log, AT_ONCE):
                out.write(json.dumps(found) + "\n")
                out.flush()
                show(found)
    return 0


def show(found: dict) -> None:
    if found["outcome"] == "died":
        print(f"{found['label']}: DIED: {found['error'][:400]}", flush=True)
        return
    peak, said = found["peak_allocated"] / GIB, found.get("predicted_peak_allocated", 0) / GIB
    print(f"{found['label']}: {found['ended_with']} peak {peak:.2f} of {said:.2f} predicted, reserved "
          f"{found['peak_reserved'] / GIB:.2f}, {found['pace']:.0f} tokens/s, planned in {found['planned_in_seconds']} s"
          f"{', FELL BACK' if found.get('fell_back') else ''}", flush=True)  # fmt: skip


def compare(out: Path, log: str, pattern: str) -> int:
    """Five of the runs beside the fastest of the other choices that would have fitted, each alone on the GPU."""
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    with_a_choice = [row for row in rows if row["outcome"] == "ran" and row.get("others_that_fit")][:COMPARED]
    names = ("label", "model", "gear", "max_length", "budget", "options")
    with out.with_name(out.stem + "_compared.jsonl").open("a", encoding="utf-8") as compared:
        for row in with_a_choice:
            if not re.search(pattern, row["label"]):
                continue
            ways = {"chosen": row["chosen"], "other": row["others_that_fit"][0]}
            for turn in range(TURNS):
                for compared_as, settings in ways.items():
                    job = {name: row[name] for name in names} | {"full": True, "compared": compared_as, "turn": turn}
                    (found,) = in_processes([(job, settings)], log, 1)
                    compared.write(json.dumps(found) + "\n")
                    compared.flush()
                    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
