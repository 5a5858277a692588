"""The fine-tuning runs whose memory `memory.py` measures: models, settings, and which are held out.

`held_out` rows are for testing the predictor, not for tuning it. The rule was fixed before anything was measured: the
SHA-256 of the row's label, read as a number, is divisible by 3. The rows of FRESH have models and settings that are not
in the plan. They were measured after the predictor was finished, and all of them are held out. A label is the key of a
row in the committed tables, so it must not change.
"""

import dataclasses
import hashlib
import json

from qlora_helpers.memory import catalogue
from qlora_helpers.settings import GPU_RUN, MEMORY_SETTINGS, OF_SEVERAL_GPUS, SWITCHES, Settings

# What a row says of its run. The others are younger than the measured rows, which used none of them.
SETTINGS = tuple(name for name in MEMORY_SETTINGS if name not in (*SWITCHES, *OF_SEVERAL_GPUS))

# Models of qlora_helpers/memory/models.json: the table's name is the last part of the Hub's name, except for these.
NAMES = {
    "mistral-7b-v0.1": "mistral-7b", "llama-2-7b-hf": "llama-2-7b", "llama-2-13b-hf": "llama-2-13b",
    "phi-3-mini-4k-instruct": "phi-3-mini", "phi-3-medium-4k-instruct": "phi-3-medium",
}  # fmt: skip
# Left at each class's default, as in the first table. One row of FRESH is longer than its model's window.
LEFT_OUT = ("max_position_embeddings", "sliding_window", "hidden_act", "query_pre_attn_scalar")
CONFIGS = {
    NAMES.get(short := name.rpartition("/")[2].lower(), short): {k: config[k] for k in config if k not in LEFT_OUT}
    for name, config in json.loads(catalogue.TABLE.read_text(encoding="utf-8"))["models"].items()
}

# adapters as TRL creates them in a 4-bit model
USUAL = dataclasses.replace(GPU_RUN, compute_dtype="bfloat16", adapter_dtype="bfloat16", optimizer="paged_adamw_8bit")
HALF = {"compute_dtype": "float16", "adapter_dtype": "float32"}  # bfloat16 adapters stop float16 at the first step
KEEP = {"gradient_checkpointing": False}  # keep activations
F32, UPCAST, SINGLE = {"adapter_dtype": "float32"}, {"upcast_fp32": True}, {"double_quant": False}
TORCH, FUSED, EIGHT = {"optimizer": "adamw_torch"}, {"optimizer": "adamw_torch_fused"}, {"optimizer": "adamw_8bit"}
BNB_8, PAGED_32 = {"optimizer": "adamw_bnb_8bit"}, {"optimizer": "paged_adamw_32bit"}
MATH, EAGER, T4 = {"attention": "math"}, {"attention": "eager"}, HALF | {"t4_kernels": True}
ALONE = {"alone": True}  # measured while nothing else runs
# Settings that only the rows of the third plan have (memory_families.py); in all others they are the default.
OF_FAMILIES = ("accumulation", "checkpointed_layers", "logits", "eval_batch_size")


def rank(number: int) -> dict:
    return {"rank": number}


def dropout(share: float) -> dict:
    return {"dropout": share}


def targets(*names: str) -> dict:
    return {"target_modules": names}


QV, QKV, FUSED_QKV = targets("q_proj", "v_proj"), targets("qkv_proj", "o_proj"), targets("query_key_value")

# model, method, batch size, tokens, GiB that it may need at most (generous), differences from USUAL
PLAN = [
    ("llama-3.2-1b", "qlora", 4, 2_048, 14, ALONE, rank(32)),
    ("llama-3.2-1b", "full", 2, 1_024, 13, ALONE),
    ("qwen2.5-1.5b", "lora", 2, 512, 7, ALONE, F32, TORCH),
    ("llama-3.1-70b", "qlora", 1, 512, 67, ALONE, rank(64), PAGED_32),
    ("qwen2.5-0.5b", "qlora", 4, 1_024, 23, KEEP),
    ("qwen2.5-0.5b", "qlora", 16, 256, 7, TORCH, dropout(0), rank(8)),
    ("qwen2.5-0.5b", "lora", 8, 512, 24, KEEP, FUSED, dropout(0.1)),
    ("qwen2.5-0.5b", "full", 4, 512, 14, KEEP, TORCH),
    ("qwen2.5-0.5b", "full", 4, 1_024, 10, EIGHT),
    ("qwen2.5-0.5b", "full", 8, 512, 11, FUSED),
    ("llama-3.2-1b", "qlora", 1, 512, 4, F32, FUSED),
    ("llama-3.2-1b", "qlora", 1, 1_024, 5, F32, FUSED),
    ("llama-3.2-1b", "qlora", 1, 2_048, 6, F32, FUSED),
    ("llama-3.2-1b", "qlora", 1, 4_096, 9, F32, FUSED),
    ("llama-3.2-1b", "qlora", 1, 512, 4, F32, FUSED, MATH),
    ("llama-3.2-1b", "qlora", 1, 1_024, 5, F32, FUSED, MATH),
    ("llama-3.2-1b", "qlora", 1, 2_048, 8, F32, FUSED, MATH),
    ("llama-3.2-1b", "qlora", 1, 4_096, 17, F32, FUSED, MATH),
    ("llama-3.2-1b", "qlora", 1, 16_384, 25),
    ("llama-3.2-1b", "qlora", 2, 512, 10, KEEP, MATH, dropout(0)),
    ("llama-3.2-1b", "qlora", 2, 512, 5, EAGER),
    ("llama-3.2-1b", "qlora", 2, 2_048, 9, T4),
    ("llama-3.2-1b", "lora", 4, 1_024, 28, KEEP, QV, rank(8), TORCH),
    ("llama-3.2-1b", "full", 1, 512, 15, KEEP, TORCH),
    ("llama-3.2-1b", "full", 4, 1_024, 17, FUSED),
    ("qwen2.5-1.5b", "qlora", 4, 1_024, 10, HALF),
    ("qwen2.5-1.5b", "qlora", 4, 1_024, 10, HALF, UPCAST),
    ("qwen2.5-1.5b", "qlora", 1, 8_192, 16, rank(8)),
    ("qwen2.5-1.5b", "qlora", 8, 512, 31, KEEP, dropout(0), EIGHT),
    ("qwen2.5-1.5b", "qlora", 2, 1_024, 6, T4, dropout(0)),
    ("qwen2.5-1.5b", "full", 2, 1_024, 15, EIGHT),
    ("qwen2.5-1.5b", "full", 2, 512, 22, KEEP, TORCH),
    ("qwen2.5-3b", "qlora", 1, 16_384, 30, dropout(0)),
    ("qwen2.5-3b", "qlora", 4, 512, 35, KEEP, QV, dropout(0.1)),
    ("qwen2.5-7b", "qlora", 2, 2_048, 18, F32, EIGHT, {"double_quant": False}),
    ("qwen2.5-7b", "lora", 1, 1_024, 22, rank(32)),
    ("qwen2.5-32b", "qlora", 1, 1_024, 31, rank(32)),
    ("smollm2-1.7b", "qlora", 8, 1_024, 14, rank(128), PAGED_32),
    ("smollm2-1.7b", "qlora", 2, 1_024, 14, KEEP, dropout(0), F32, TORCH),
    ("smollm2-1.7b", "lora", 4, 2_048, 12, dropout(0)),
    ("llama-2-7b", "qlora", 4, 1_024, 15, rank(64), TORCH),
    ("llama-2-7b", "qlora", 1, 512, 14, KEEP, {"double_quant": False}, rank(8)),
    ("llama-2-7b", "lora", 2, 512, 18, EIGHT, rank(8), QV),
    ("llama-2-13b", "qlora", 2, 1_024, 17, rank(64), F32),
    ("mistral-7b", "qlora", 4, 1_024, 13, {"double_quant": False}, FUSED),
    ("mistral-7b", "qlora", 2, 2_048, 13, UPCAST, F32, PAGED_32),
    ("mistral-7b", "qlora", 1, 1_024, 19, KEEP, QV, dropout(0)),
    ("llama-3.1-8b", "qlora", 4, 2_048, 25),
    ("llama-3.1-8b", "qlora", 1, 2_048, 13, HALF),
    ("llama-3.1-8b", "qlora", 2, 1_024, 46, KEEP),
    ("llama-3.1-8b", "qlora", 2, 1_024, 15, UPCAST),
    ("llama-3.1-8b", "qlora", 1, 8_192, 23, dropout(0), rank(32)),
    ("llama-3.1-8b", "qlora", 1, 2_048, 13, T4),
    ("llama-3.1-8b", "lora", 1, 512, 28, F32, FUSED, rank(128)),
    ("qwen3-1.7b", "qlora", 4, 1_024, 10, F32, PAGED_32),
    ("qwen3-1.7b", "qlora", 2, 512, 9, KEEP, HALF, dropout(0)),
    ("qwen3-1.7b", "lora", 2, 2_048, 13, rank(64)),
    ("qwen3-8b", "qlora", 2, 1_024, 13, rank(8), dropout(0.1)),
    ("gemma-2-2b", "qlora", 2, 1_024, 10, EAGER),
    ("gemma-2-2b", "qlora", 2, 512, 14, EAGER, KEEP, dropout(0), F32),
    ("gemma-2-2b", "lora", 4, 512, 13, EAGER, TORCH, rank(32)),
    ("gemma-2-9b", "qlora", 1, 1_024, 14, EAGER, rank(32)),
    ("phi-3-mini", "qlora", 4, 1_024, 9),
    ("phi-3-mini", "qlora", 2, 2_048, 9, QKV, F32, FUSED, rank(32)),
    ("phi-3-mini", "qlora", 1, 1_024, 16, KEEP, HALF, TORCH),
    ("gpt-neox-20b", "qlora", 1, 512, 16, FUSED_QKV, rank(8)),
    ("pythia-1b", "qlora", 8, 512, 7, F32),
    ("pythia-1b", "lora", 4, 1_024, 25, KEEP, FUSED_QKV, dropout(0.1)),
    ("pythia-1b", "full", 4, 512, 16, EIGHT, KEEP),
    ("gpt-j-6b", "qlora", 2, 512, 8, EAGER),
    ("gpt-j-6b", "qlora", 1, 1_024, 23, EAGER, KEEP, QV, dropout(0), F32),
]  # fmt: skip

FRESH = [
    ("qwen2.5-14b", "qlora", 1, 768, 24, rank(24)),
    ("qwen2.5-0.5b", "qlora", 3, 1_536, 20, MATH, TORCH),
    ("llama-3.2-3b", "qlora", 3, 1_536, 14, BNB_8),
    ("llama-3.2-3b", "qlora", 2, 768, 24, KEEP, dropout(0), F32),
    ("llama-3.2-3b", "qlora", 1, 3_000, 12, T4, rank(8)),
    ("llama-3.2-3b", "qlora", 2, 384, 12, HALF, UPCAST),
    ("llama-3.2-3b", "lora", 1, 3_000, 18, rank(4), F32),
    ("smollm2-360m", "qlora", 12, 384, 10, F32, BNB_8, SINGLE),
    ("smollm2-360m", "lora", 3, 768, 16, KEEP, rank(48), FUSED),
    ("smollm2-360m", "full", 6, 768, 12, TORCH),
    ("smollm2-360m", "full", 5, 384, 16, KEEP, FUSED),
    ("smollm2-1.7b", "qlora", 2, 768, 8, EAGER, rank(4)),
    ("pythia-410m", "qlora", 12, 768, 10, rank(48), dropout(0.1), PAGED_32),
    ("pythia-410m", "lora", 6, 384, 14, KEEP, HALF, targets("dense_h_to_4h", "dense_4h_to_h")),
    ("pythia-410m", "full", 5, 768, 12, PAGED_32),
    ("pythia-410m", "full", 3, 384, 12, KEEP, EIGHT),
    ("qwen3-0.6b", "qlora", 5, 1_536, 12, HALF, rank(4)),
    ("qwen3-0.6b", "qlora", 3, 1_536, 10, T4, dropout(0)),
    ("qwen3-0.6b", "full", 6, 768, 14, FUSED),
    ("qwen3-0.6b", "full", 3, 384, 16, KEEP),
    ("qwen3-4b", "qlora", 1, 6_144, 18, F32, TORCH, SINGLE),
    ("qwen3-4b", "lora", 2, 384, 20, KEEP, targets("k_proj", "o_proj")),
    ("gemma-2-9b", "lora", 1, 384, 30, EAGER, rank(24), FUSED),
    ("phi-3-medium", "qlora", 1, 1_536, 20, F32, FUSED, dropout(0)),
    ("phi-3-mini", "lora", 3, 384, 24, rank(256), EIGHT),
    ("mistral-7b-v0.3", "qlora", 3, 1_536, 14, targets("gate_proj", "up_proj", "down_proj")),
    ("mistral-7b-v0.3", "qlora", 1, 768, 20, KEEP, rank(256), QV),
    ("mistral-7b", "qlora", 1, 6_144, 24),  # beyond the window of 4,096 that is this class's default
    ("gpt-j-6b", "lora", 1, 768, 24, EAGER, PAGED_32),
]  # fmt: skip


def label_of(row: dict) -> str:
    """The row's settings in short, such as "llama-3.1-8b qlora bf16 r16 4x2048 ckpt paged_adamw_8bit"."""
    full = row["method"] == "full"
    words = [row["model"], row["method"], {"bfloat16": "bf16", "float16": "fp16"}[row["compute_dtype"]]]
    words += [] if full else [f"r{row['rank']}"]
    words += [f"{row['batch_size']}x{row['max_length']}", "ckpt" if row["gradient_checkpointing"] else "no-ckpt"]
    words += [row["optimizer"]]
    if not full:
        words += ["float32-adapters"] if row["adapter_dtype"] == "float32" else []
        words += [f"dropout-{row['dropout']:g}"] if row["dropout"] != USUAL.dropout else []
        words += ["+".join(row["target_modules"])] if row["target_modules"] != "all-linear" else []
    words += ["single-quant"] if row["method"] == "qlora" and not row["double_quant"] else []
    words += ["upcast"] if row["upcast_fp32"] else []
    words += [row["attention"]] if row["attention"] != "sdpa" else []
    words += ["t4-kernels"] if row.get("t4_kernels") else []
    return " ".join(words)


def memory_settings(settings: Settings) -> dict:
    """A row's settings, in JSON's types."""
    found = {name: getattr(settings, name) for name in SETTINGS}
    targets = settings.target_modules
    return found | {"target_modules": list(targets) if isinstance(targets, tuple) else targets}


def settings_of(row: dict) -> Settings:
    """The settings of a measured row; what it lacks is the default."""
    return Settings(**{name: row[name] for name in SETTINGS if name in row})


def held_out(label: str) -> bool:
    """Whether a row is kept for testing the predictor; only its label decides."""
    return int(hashlib.sha256(label.encode()).hexdigest(), 16) % 3 == 0


def all_rows(fresh: bool = False) -> list[dict]:
    """The rows of PLAN or FRESH, with `label`, `held_out`, `gib` and `alone`; those measured alone come first."""
    rows = []
    for model, method, batch_size, max_length, gib, *changes in FRESH if fresh else PLAN:
        settings: dict = {"method": method, "batch_size": batch_size, "max_length": max_length}
        for change in changes:
            settings |= change
        alone, t4_kernels = fresh or settings.pop("alone", False), settings.pop("t4_kernels", False)
        found = memory_settings(dataclasses.replace(USUAL, **settings))
        row = {"model": model, "config": CONFIGS[model]}
        row |= {name: value for name, value in found.items() if name not in OF_FAMILIES}
        row |= {"t4_kernels": True} if t4_kernels else {}
        label = label_of(row)
        rows.append({"label": label, "held_out": fresh or held_out(label), "gib": gib, "alone": alone} | row)
    return sorted(rows, key=lambda row: (not row["alone"], -row["gib"]))
