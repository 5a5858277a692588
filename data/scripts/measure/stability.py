"""What each fault of lesson 8 costs, over five seeds (three if it is clear): short runs of the shipped model on a CPU.

    python -m data.scripts.measure.stability                     # about 25 minutes on one core; writes data/measured/stability.json
    python -m data.scripts.measure.stability --missing           # only the rows missing from the table
    python -m data.scripts.measure.stability --row "no warm-up"  # one row, printed and not written
    python -m data.scripts.measure.stability --list              # the names of the rows

Every row is the same run (60 steps of 8 chats, 480 chats) with one thing changed. Losses and shares are for 200 test
chats after the run: `loss` in nats per answer token, `exact_match`, `ends` (answers that end with an EOS token within
24 tokens), `empty` (answers without a word). `highest` is the highest loss of any step, `spikes` counts loss spikes by
the rule of `qlora_helpers.training.spikes`. The curves are from seed 0.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from data.scripts import ROOT
from qlora_helpers import evaluation
from qlora_helpers.chats import read_chats, split_question
from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.faulty_runs import collator_run, sft_run
from qlora_helpers.training.run import train
from qlora_helpers.training.spikes import find_spikes

TABLE = ROOT / "data" / "measured" / "stability.json"
SEEDS, SEEDS_OF_CLEAR_ROWS = 5, 3
CPU = detect("cpu")
RIGHT = Settings(steps=60, batch_size=8, learning_rate=2e-3, warmup_steps=6, log_steps=1)
EDGE = replace(RIGHT, learning_rate=5e-3)
FAST = replace(RIGHT, learning_rate=1e-2)
CHATS = read_chats(data_path("chats", "train.jsonl"))[:480]
TEST = read_chats(data_path("chats", "test.jsonl"))[:200]


def ours(settings: Settings, chats: list, folder: str):
    """The course's own run. Returns the model, and the loss and gradient norm of each step."""
    run = train(load_model(hardware=CPU), load_tokenizer(), chats, folder, settings, hardware=CPU)
    return run.model, run.history, run.gradient_norms


def logged(trainer):
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, *([(entry["step"], float(entry[key])) for entry in log] for key in ("loss", "grad_norm"))


def messages(chats: list) -> list[dict]:
    return [{"messages": chat} for chat in chats]


def trl(settings: Settings, chats: list, folder: str, rows: Callable = messages, template: str = "", **options):
    """TRL's trainer, set up by `qlora_helpers.training.faulty_runs`."""
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return logged(sft_run(load_model(hardware=CPU), tokenizer, rows(chats), folder, settings, hardware=CPU, **options))


def texts(chats: list) -> list[dict]:
    """The chats as the template renders them, including the BOS token: TRL adds another one before it."""
    tokenizer = load_tokenizer()
    return [{"text": tokenizer.apply_chat_template(chat, tokenize=False)} for chat in chats]


def every_fourth_answer_empty(chats: list) -> list[dict]:
    return messages(
        [[question, answer | {"content": answer["content"] * (number % 4 != 0)}]
         for number, (question, answer) in enumerate(chats)]
    )  # fmt: skip


def marks_without_the_end() -> str:
    """The chat template with the EOS token moved after the marker, so that the model does not learn it."""
    ours = load_tokenizer().chat_template
    moved = ours.replace(
        "{{ message['content'] + eos_token }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ eos_token }}",
    )
    if moved == ours:
        raise ValueError("the chat template has changed: the EOS token was not found")
    return moved


def with_collator(settings: Settings, chats: list, folder: str, pad_is_end: bool):
    tokenizer = load_tokenizer()
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    return logged(collator_run(load_model(hardware=CPU), tokenizer, chats, folder, settings, hardware=CPU))


# name: the settings, and the function that runs with them
ROWS: dict[str, tuple[Settings, Callable]] = {
    "as it should be": (RIGHT, ours),
    "no warm-up": (replace(RIGHT, warmup_steps=0), ours),
    "no clipping": (replace(RIGHT, max_grad_norm=None), ours),
    "no warm-up, no clipping": (replace(RIGHT, warmup_steps=0, max_grad_norm=None), ours),
    "the paper's: constant, clipped at 0.3": (
        replace(RIGHT, schedule="constant", warmup_steps=0, max_grad_norm=0.3),
        ours,
    ),
    "2.5 times the rate": (EDGE, ours),
    "2.5 times the rate, no warm-up": (replace(EDGE, warmup_steps=0), ours),
    "2.5 times the rate, no clipping": (replace(EDGE, max_grad_norm=None), ours),
    "2.5 times the rate, neither": (replace(EDGE, warmup_steps=0, max_grad_norm=None), ours),
    "5 times the rate": (FAST, ours),
    "5 times the rate, no warm-up": (replace(FAST, warmup_steps=0), ours),
    "loss on the question, too": (RIGHT, trl),
    "loss on the question, too; two first tokens": (RIGHT, partial(trl, rows=texts)),
    "a quarter of the answers empty": (
        RIGHT,
        partial(trl, rows=every_fourth_answer_empty, assistant_only_loss=True),
    ),
    "cut at 16 tokens": (RIGHT, partial(trl, assistant_only_loss=True, max_length=16)),
    "the end outside of the mark": (
        RIGHT,
        partial(trl, template=marks_without_the_end(), assistant_only_loss=True),
    ),
    "collator, pad = end": (RIGHT, partial(with_collator, pad_is_end=True)),
    "collator, a pad of its own": (RIGHT, partial(with_collator, pad_is_end=False)),
}

# their effect is much larger than the seed's
CLEAR = ("a quarter of the answers empty", "cut at 16 tokens", "the end outside of the mark", "collator, pad = end",
         "collator, a pad of its own")  # fmt: skip


def measure(name: str, seed: int) -> dict:
    """One run of a row: its scores and curves."""
    settings, recipe = ROWS[name]
    tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        model, losses, norms = recipe(replace(settings, seed=seed), CHATS, folder)
    questions, wanted = zip(*map(split_question, TEST), strict=True)
    said = evaluation.answer(model, tokenizer, list(questions))
    return {
        "loss": round(evaluation.loss(model, tokenizer, TEST), 4),
        "exact_match": sum(answer == want for answer, want in zip(said, wanted, strict=True)) / len(TEST),
        "ends": evaluation.share_that_ends(model, tokenizer, TEST),
        "empty": sum(not answer for answer in said) / len(TEST),
        "highest": round(max(loss for _, loss in losses), 3),
        "spikes": len(find_spikes(losses)),
        "losses": [round(loss, 3) for _, loss in losses],
        "gradient_norms": [round(norm, 3) for _, norm in norms],
    }


def row(name: str, seeds: int) -> dict:
    """All runs of a row: its settings, a list over the seeds for each score, and the curves of seed 0."""
    started, runs = time.perf_counter(), []
    for seed in range(seeds):
        runs.append(measure(name, seed))
        scores = {key: value for key, value in runs[-1].items() if not isinstance(value, list)}
        print(f"{name}, seed {seed}: {scores}", flush=True)
    table = {key: [run[key] for run in runs] for key, value in runs[0].items() if not isinstance(value, list)}
    curves = {key: value for key, value in runs[0].items() if isinstance(value, list)}
    differing = {key: value for key, value in asdict(ROWS[name][0]).items() if value != getattr(Settings(), key)}
    return {"name": name, "settings": differing, **table, **curves, "seconds": round(time.perf_counter() - started)}


def machine() -> dict:
    """The processor, the instruction set that torch uses, and the versions."""
    import torch

    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8"), re.M) if info.exists() else None
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
    return {
        "processor": found.group(1) if found else platform.processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, metavar="NAME", help="only this row, printed and not written")
    parser.add_argument(
        "--seeds", type=int, help=f"default: {SEEDS}, or {SEEDS_OF_CLEAR_ROWS} for rows with a clear effect"
    )
    parser.add_argument("--missing", action="store_true", help="only the rows missing from the table")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    args = parser.parse_args()

    def seeds(name: str) -> int:
        return args.seeds or (SEEDS_OF_CLEAR_ROWS if name in CLEAR else SEEDS)

    if args.list:
        print("\n".join(ROWS))
    elif args.row:
        print(json.dumps(row(args.row, seeds(args.row))))
    else:
        table = {**machine(), "chats": len(CHATS), "test_chats": len(TEST), "rows": []}
        before = json.loads(TABLE.read_text(encoding="utf-8")) if args.missing else {**table}
        if differing := [key for key, value in table.items() if key != "rows" and value != before[key]]:
            parser.error(
                f"--missing: the table was measured with another {', '.join(differing)}: measure everything again"
            )
        done = {row["name"]: row for row in before["rows"]}
        for name in ROWS:
            if name not in done:
                done[name] = row(name, seeds(name))
            table["rows"] = [done[name] for name in ROWS if name in done]
            text = json.dumps(table, indent=1)
            # a list of numbers on one line
            text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
            TABLE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
