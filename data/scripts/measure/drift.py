"""The plain run of lesson 4 under other releases of TRL and transformers: which defaults moved, what it learns, what broke.

    python -m data.scripts.measure.drift            # the rows missing from data/measured/drift.json; about half an hour
    python -m data.scripts.measure.drift --list     # the releases
    python -m data.scripts.measure.drift --row "trl 1.14.2"   # one row, printed and not written

Each release is downloaded from the package index into a folder of its own, which precedes the installed packages; all else is
as pinned. So this needs a network, and is not part of the tests. The run is the one that lesson 4 shows in the libraries' own
words, with 100 steps of 8 chats; what it does not name is left to the release. Each rate has `SEEDS` seeds. A rate is chosen
on the validation questions (data/scripts/measure/held_out.py), and reported on the test questions.

`begins` are two runs with seed 0, as they begin: the sum of the absolute values in their adapters. `settings` are the values of
`SFTConfig` that differ from the pinned release's; None is a setting that one of them lacks.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from data.scripts import ROOT
from data.scripts.measure.runs_at_rates import PACKAGES
from qlora_helpers.paths import data_path

TABLE = ROOT / "data" / "measured" / "drift.json"
RELEASES = {
    "trl": ("1.12.0", "1.13.0", "1.14.2", "1.15.0"),
    "transformers": ("5.20.2", "5.21.1", "5.22.2", "5.24.0"),
}
PINNED = "as pinned"
NAMES = [PINNED, *(f"{package} {version}" for package, versions in RELEASES.items() for version in versions)]
# The last releases before transformers 5 that go together: other packages of today do not go with them.
BEFORE_5 = {
    "before transformers 5": ("transformers 4.57.6", "trl 0.24.0", "peft 0.18.0", "accelerate 1.11.0", "datasets 4.4.1",
                              "huggingface-hub 0.36.0", "tokenizers 0.22.2"),
}  # fmt: skip
NAMES += BEFORE_5
RATES, SEEDS = (1e-3, 2e-3, 4e-3), 2
BUDGET = {"max_steps": 100, "per_device_train_batch_size": 8, "warmup_steps": 5, "logging_steps": 10}
HELD_OUT = 500  # as in held_out.py, whose imports another release might break
LONGEST = 24  # new tokens of an answer
OF_PATHS = {"output_dir", "logging_dir", "run_name"}


# ---- In the process of a release: nothing but its own libraries


def run(rate: float, seed: int, learns: bool = True) -> dict:
    """Lesson 4's plain run on a CPU, and what it has learnt; without `learns`, only how it would begin."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from qlora_helpers.models.cpu_faults import make_safe_on_cpu

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        data_path("tiny-llama"),
        quantization_config=quantization,
        dtype=torch.float32,
        device_map="cpu",
        trust_remote_code=False,
    )
    make_safe_on_cpu(model)
    tokenizer = AutoTokenizer.from_pretrained(data_path("tiny-llama"), trust_remote_code=False)
    chats = load_dataset("json", data_files=str(data_path("chats", "train.jsonl")), split="train")
    training, validation = (
        chats.select(range(len(chats) - HELD_OUT)),
        chats.select(range(len(chats) - HELD_OUT, len(chats))),
    )
    test = load_dataset("json", data_files=str(data_path("chats", "test.jsonl")), split="train")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            learning_rate=rate,
            seed=seed,
            assistant_only_loss=True,
            use_cpu=True,
            bf16=False,
            fp16=False,
            optim="adamw_torch",
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            **BUDGET,
        )
        trainer = SFTTrainer(model, config, train_dataset=training, processing_class=tokenizer, peft_config=lora)
        dtypes = {str(one.dtype) for one in trainer.model.parameters() if one.requires_grad}
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if not learns:
            begin = [one.double().abs().sum().item() for one in trainer.model.parameters() if one.requires_grad]
            return {"adapters": round(sum(begin), 6)}
        trainer.train()
    right = {
        name: exact_match(trainer.model, tokenizer, part) for name, part in (("validation", validation), ("test", test))
    }
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": {name: value for name, value in config.to_dict().items() if name not in OF_PATHS},
        "adapters": sorted(dtypes),
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
        **{name: round(share, 4) for name, share in right.items()},
    }


def exact_match(model, tokenizer, chats) -> float:
    """The share of answers that are right word for word, greedily."""
    import torch

    tokenizer.padding_side, right = "left", 0
    model.eval()
    for start in range(0, len(chats), 100):
        some = chats.select(range(start, min(start + 100, len(chats))))["messages"]
        prompts = [
            tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False) for chat in some
        ]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=LONGEST,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        said = tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a.strip() == chat[-1]["content"].strip() for a, chat in zip(said, some, strict=True))
    return right / len(chats)


# ---- Around it


def overlay(name: str, folder: Path) -> None:
    """Download a release into a folder; of the pinned ones nothing."""
    if name != PINNED:
        releases = [release.replace(" ", "==") for release in BEFORE_5.get(name, (name,))]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *releases], check=True)


def attempt(folder: Path, rate: float, seed: int, learns: bool = True) -> dict:
    """One run under the release in a folder; of one that fails, the last line of its error."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-m",
        "data.scripts.measure.drift",
        "--run" if learns else "--begin",
        str(rate),
        str(seed),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"outcome": said[-1][:300] if said else f"ended with {done.returncode}"}
    return {"outcome": "ran"} | json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))


def measure(name: str) -> dict:
    """All runs under one release: the best rate on the validation questions, and what it reaches on the test questions."""
    with tempfile.TemporaryDirectory() as folder:
        overlay(name, Path(folder))
        begins = [attempt(Path(folder), RATES[0], 0, learns=False).get("adapters") for _ in range(2)]
        first = attempt(Path(folder), RATES[0], 0)
        if first["outcome"] != "ran":
            return {"name": name, "outcome": first["outcome"]}
        runs = {(RATES[0], 0): first}
        for rate in RATES:
            for seed in range(SEEDS):
                if (rate, seed) not in runs:
                    runs[rate, seed] = attempt(Path(folder), rate, seed)
    return {"name": name} | summary(runs) | {"begins": begins}


def summary(runs: dict[tuple[float, int], dict]) -> dict:
    """What a row says of its runs.

    Args:
        runs: what `attempt` found, by rate and seed; all have ended well.
    """
    if failed := [run["outcome"] for run in runs.values() if run["outcome"] != "ran"]:
        return {"outcome": failed[0]}
    first = next(iter(runs.values()))
    by_rate = {rate: [run for (of, _), run in runs.items() if of == rate] for rate, _ in runs}
    validated = {rate: mean(run["validation"] for run in some) for rate, some in by_rate.items()}
    best = max(validated, key=lambda rate: (validated[rate], -rate))  # of equals the lower
    return {
        "outcome": "ran",
        "versions": first["versions"],
        "settings": first["settings"],
        "adapters": first["adapters"],
        "validation": {f"{rate:g}": round(share, 4) for rate, share in validated.items()},
        "best_rate": best,
        "test": [run["test"] for run in by_rate[best]],
        "losses": {f"{rate:g}": [run["losses"] for run in some] for rate, some in by_rate.items()},
    }


def differing(settings: dict, pinned: dict) -> dict[str, list]:
    """The settings that are not the pinned release's, each with its value here and there; None where one has no such setting."""
    names = sorted(settings.keys() | pinned.keys())
    return {name: [settings.get(name), pinned.get(name)] for name in names if settings.get(name) != pinned.get(name)}


def write(table: Path, rows: dict[str, dict]) -> None:
    ordered = [rows[name] for name in NAMES if name in rows]
    head = {"command": "python -m data.scripts.measure.drift", "budget": BUDGET, "rates": RATES, "seeds": SEEDS}
    text = json.dumps(head | {"rows": ordered}, indent=1)
    text = re.sub(r"\[\s+([-\d.,\se]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
    table.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=NAMES, metavar="NAME", help="one release, printed and not written")
    parser.add_argument("--list", action="store_true", help="the releases")
    parser.add_argument("--table", type=Path, default=TABLE)
    for mode in ("--run", "--begin"):
        parser.add_argument(mode, nargs=2, type=float, metavar=("RATE", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if asked := args.run or args.begin:
        print("RESULT " + json.dumps(run(asked[0], int(asked[1]), learns=bool(args.run))))
    elif args.list:
        print("\n".join(NAMES))
    elif args.row:
        print(json.dumps(measure(args.row), indent=1))
    else:
        rows = (
            {row["name"]: row for row in json.loads(args.table.read_text(encoding="utf-8"))["rows"]}
            if args.table.exists()
            else {}
        )
        for name in NAMES:
            if name not in rows:
                rows[name] = measure(name)
                if name != PINNED and rows[name]["outcome"] == "ran":
                    rows[name]["settings"] = differing(rows[name]["settings"], rows[PINNED]["settings"])
                write(args.table, rows)
                print(
                    name,
                    {key: rows[name].get(key) for key in ("outcome", "best_rate", "validation", "test")},
                    flush=True,
                )


if __name__ == "__main__":
    main()
