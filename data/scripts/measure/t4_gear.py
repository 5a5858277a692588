"""The course's T4 gear beside the recipe of the articles, on one GPU: peak memory and tokens per second.

    python -m data.scripts.measure.t4_gear            # needs a GPU; writes data/measured/t4_gear.json, about ten minutes on an H200

Every row runs in its own process, since a deleted trainer leaves memory in use. The models have real shapes and random
weights (`data/scripts/make/stand_in_models.py`). Rows in float16 run as on a T4: memory capped at 14.3 GiB,
FlashAttention and cuDNN attention switched off, and for the course's gear also the math kernel. Rows in bfloat16 have
all kernels and all memory. Speeds are those of this GPU. No T4 was available.

The recipe is the articles', with its errors repaired and its choices kept: `prepare_model_for_kbit_training` (which
casts embeddings, norms and output head to float32), rank 16 on all linear layers, dropout 0.05, gradient checkpointing,
paged 8-bit AdamW. Repaired: arguments that no longer exist, and the adapters' dtype, without which float16 stops at the
first step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from data.scripts import ROOT
from qlora_helpers.units import GIB

TABLE = ROOT / "data" / "measured" / "t4_gear.json"
CAP = 14.3 * GIB  # a T4 reports about 14.7 GiB; the CUDA context takes a part of that
STEPS, WARM = 5, 2
LONGEST = (4_096, 8_192, 12_288, 16_384)  # at batch 1


def as_on_a_t4(math_kernel: bool) -> None:
    """Switch off what a T4 does not have; without `math_kernel`, also what the course's gear must not need there."""
    import torch

    torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(math_kernel)


def _recipe_trainer(folder: str, chats: list, batch_size: int, tokens: int, output: str):
    import datasets
    import torch
    from peft import LoraConfig, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_tokenizer

    dtype = detect().compute_dtype
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        device_map={"": 0},
        trust_remote_code=False,
    )
    trainer = SFTTrainer(
        model=prepare_model_for_kbit_training(model),
        args=SFTConfig(
            output_dir=output,
            max_steps=STEPS,
            per_device_train_batch_size=batch_size,
            learning_rate=2e-4,
            warmup_steps=0.03,
            optim="paged_adamw_8bit",
            max_length=tokens,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in chats]),
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _our_trainer(folder: str, chats: list, batch_size: int, tokens: int, output: str):
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.trainer import build_trainer

    settings = Settings(
        steps=STEPS,
        batch_size=batch_size,
        learning_rate=2e-4,
        warmup_steps=1,
        dropout=0.05,
        max_length=tokens,
        gradient_checkpointing=True,
    )
    return build_trainer(load_model(folder), load_tokenizer(folder), chats, Path(output), settings, detect())


def training_row(folder: str, who: str, batch_size: int, tokens: int) -> dict:
    """Train a few steps; the peak is over all of them, the speed over those after the first two."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from data.scripts.make.stand_in_models import chats
    from qlora_helpers.models.loading import load_tokenizer

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

    made = chats(batch_size * STEPS, tokens, load_tokenizer(folder))
    build = _our_trainer if who == "ours" else _recipe_trainer
    result: dict = {"loss": None, "peak_allocated_bytes": None, "tokens_per_second": None}
    with tempfile.TemporaryDirectory() as output:
        try:
            trainer = build(folder, made, batch_size, tokens, output)
            result["loaded_bytes"] = torch.cuda.memory_allocated()
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Clock())
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
        except torch.cuda.OutOfMemoryError:
            return result | {"outcome": "out of memory"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return result | {
        "outcome": "ran",
        "loss": losses[-1],
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "tokens_per_second": round((STEPS - WARM) * batch_size * tokens / (marks[-1] - marks[WARM - 1])),
    }


def loading_row(folder: str) -> dict:
    """Load a model in 4 bits and watch the process's main memory: its own pages, and mapped file pages."""
    import psutil
    import torch

    from qlora_helpers.models.loading import load_model

    torch.zeros(1, device="cuda")  # the CUDA context, before the clock starts
    own, resident, done = [0], [0], threading.Event()

    def watch():
        process = psutil.Process()
        while not done.wait(0.02):
            memory = process.memory_info()
            own[0], resident[0] = max(own[0], memory.rss - memory.shared), max(resident[0], memory.rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    load_model(folder)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {
        "outcome": "ran",
        "seconds": round(seconds, 1),
        "host_own_bytes": own[0],
        "host_resident_bytes": resident[0],
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
        "disk_bytes": sum(path.stat().st_size for path in Path(folder).iterdir()),
    }


def child(job: dict) -> None:
    """Measure one row."""
    import qlora_helpers  # noqa: F401  before bitsandbytes: it silences the libraries

    if job["gear"] == "t4":
        as_on_a_t4(math_kernel=job["who"] == "recipe")
    if job["what"] == "loading":
        result = loading_row(job["folder"])
    else:
        result = training_row(job["folder"], job["who"], job["batch_size"], job["tokens"])
    print("RESULT " + json.dumps(result), flush=True)


def measured(job: dict) -> dict:
    """Measure one row in its own process."""
    environment = os.environ | {"QLORA_GEAR": job["gear"], "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    if ended.returncode or not results:
        raise RuntimeError(f"{job} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    row = {key: value for key, value in job.items() if key != "folder"}
    return row | json.loads(results[0].removeprefix("RESULT "))


def all_jobs(folders: dict[str, str]):
    """What is measured: loading 8B, and the recipe beside the course's gear, up to the longest sequence for 8B."""
    yield {"what": "loading", "model": "Llama-3.1-8B", "who": "ours", "gear": "t4", "folder": folders["Llama-3.1-8B"]}
    for model, folder in folders.items():
        for gear in ("t4", "ampere"):
            sizes = [(1, 2_048), (4, 2_048)]
            if (model, gear) == ("Llama-3.1-8B", "t4"):
                sizes += [(1, tokens) for tokens in LONGEST]
            for who in ("recipe", "ours"):
                about = {"what": "training", "model": model, "who": who, "gear": gear, "folder": folder}
                yield from (about | {"batch_size": batch_size, "tokens": tokens} for batch_size, tokens in sizes)


def show(row: dict) -> str:
    if row["what"] == "loading":
        return (
            f"{row['model']:14} loaded in {row['seconds']} s: {row['host_own_bytes'] / 1e9:.2f} GB of own main memory, "
            f"{row['host_resident_bytes'] / 1e9:.2f} GB with file pages; {row['gpu_peak_bytes'] / GIB:.2f} GiB on the GPU at "
            f"most; {row['disk_bytes'] / 1e9:.2f} GB on disk"
        )
    name = f"{row['model']:14}{row['who']:8}{row['gear']:8}{row['batch_size']} x {row['tokens']:<8,}"
    if row["outcome"] != "ran":
        return name + row["outcome"]
    return f"{name}{row['peak_allocated_bytes'] / GIB:6.2f} GiB {row['tokens_per_second']:8,} tokens/s  loss {row['loss']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "stand-ins")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    if args.job:
        child(args.job)
        return
    import importlib.metadata

    import torch

    from data.scripts.make import stand_in_models as stand_in

    args.models.mkdir(parents=True, exist_ok=True)
    folders = {m: str(stand_in.write(m, args.models / m)) for m in ("Qwen2.5-1.5B", "Llama-3.1-8B")}
    torch.cuda.empty_cache()
    table: dict = {
        "gpu": torch.cuda.get_device_name(0),
        "cap_bytes": int(CAP),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")
        },
        "command": "python -m data.scripts.measure.t4_gear",
        "rows": [],
    }

    loaded: dict[tuple, int] = {}
    for job in all_jobs(folders):
        table["rows"].append(row := measured(job))
        print(show(row), flush=True)
        size = row.get("loaded_bytes")  # None if it ran out of memory while loading
        if size and loaded.setdefault((row["model"], row["who"], row["gear"]), size) != size:
            raise RuntimeError(f"{row['model']} was loaded with another size than before: something was left in memory")
    args.table.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
