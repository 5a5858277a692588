"""The rows of `speed.py`: which variants are timed, on which model, gear and data; the most important first.

A row is a dict:
    label           its key in the results: model, gear, batch x length, data, variant, and what is special about it
    model, config   the shape's name, and its configuration as `AutoConfig.for_model` takes it
    gear            "bf16": bfloat16 with all kernels and all memory; "t4": float16 with a T4's kernels, capped
    cap_gib         how much memory torch may take; null for all
    batch_size, max_length
    data            "full": every sequence has max_length tokens; "mixed": see `speed_data.mixed_lengths`
    variant         "articles", "trl", "ours" or "unsloth": see `speed_variants`
    settings        "ours": further fields of `Settings`; otherwise of SFTConfig
    warm_steps, timed_steps
    profiled        whether one more step is profiled, to know how busy the GPU is

Labels are keys of committed results, so they must not change.
"""

from data.scripts.measure.memory_plan import CONFIGS
from data.scripts.measure.t4_gear import CAP
from qlora_helpers.units import GIB

__all__ = ["VARIANTS", "rows"]

VARIANTS = ("articles", "trl", "ours", "unsloth")
MODELS = {"8b": "llama-3.1-8b", "1.5b": "qwen2.5-1.5b"}
LONGEST = 32_768  # tokens of a row; a shape's default window may be shorter

COMPILED = {"compile_layers": True}
NONE = {"gradient_checkpointing": False}
OFFLOADED = {"activation_offloading": True}
# the chats of a step, some 9,000 tokens, in up to nine rows at once
PACKED = {"packing": True, "accumulation": 11}
LIGER = {"liger_layers": True}
GROWING = {"expandable_segments": True}


def some(number: int) -> dict:
    """Only the first so many layers are checkpointed."""
    return {"checkpointed_layers": number}


# what the variants are called, with their settings
ARTICLES, TRL, OURS, UNSLOTH = ("articles", {}), ("trl", {}), ("ours", {}), ("unsloth", {})
OURS_COMPILED = ("ours compiled", COMPILED)
OURS_NONE = ("ours compiled none-checkpointed", COMPILED | NONE)
OURS_PACKED, OURS_PACKED_COMPILED = ("ours packed", PACKED), ("ours packed compiled", PACKED | COMPILED)
UNSLOTH_PACKED = ("unsloth packed", {"packing": True})
OURS_LIGER = ("ours liger", LIGER)
OURS_LONG = ("ours offloaded liger", OFFLOADED | LIGER | GROWING)
OURS_OFFLOADED = ("ours offloaded", OFFLOADED)
OURS_OFFLOADED_COMPILED = ("ours offloaded compiled", OFFLOADED | COMPILED)

# Mixed data: 32 padded chats of these lengths are about 2,900 tokens, so 3 packed rows of 1,024 are as many.


def within(budget: str) -> tuple[str, dict]:
    """Compiled layers, and what the budget chooses."""
    return f"ours budget-{budget}", COMPILED | {"memory_budget": budget}


# model, gear, batch size, tokens, data, variants
PLAN = [
    ("8b", "bf16", 4, 2_048, "full", [
        ARTICLES, TRL, OURS, OURS_COMPILED, ("ours compiled 16-of-32", COMPILED | some(16)), OURS_NONE, UNSLOTH,
        *map(within, ("14.3GiB", "24GiB", "48GiB", "auto")),
        OURS_LIGER, ("ours none-checkpointed", NONE), ("ours offloaded", OFFLOADED),
    ]),
    ("8b", "bf16", 2, 2_048, "full", [OURS_COMPILED, OURS_NONE, UNSLOTH]),
    ("8b", "bf16", 32, 1_024, "mixed", [OURS, TRL, UNSLOTH]),
    ("8b", "bf16", 9, 1_024, "mixed", [
        OURS_PACKED, OURS_PACKED_COMPILED, ("ours packed compiled none-checkpointed", PACKED | COMPILED | NONE), UNSLOTH_PACKED,
    ]),
    ("8b", "t4", 4, 2_048, "full", [TRL, OURS, OURS_COMPILED, UNSLOTH, ARTICLES]),
    ("8b", "t4", 1, 2_048, "full", [OURS, OURS_COMPILED, UNSLOTH]),
    ("8b", "t4", 1, 8_192, "full", [("trl", {}), OURS_COMPILED, OURS_OFFLOADED]),
    ("8b", "t4", 1, 16_384, "full", [OURS_OFFLOADED, OURS]),
    ("8b", "t4", 1, LONGEST, "full", [OURS_LONG, UNSLOTH, OURS_OFFLOADED]),
    ("1.5b", "bf16", 4, 2_048, "full", [ARTICLES, TRL, OURS, OURS_COMPILED, OURS_NONE, UNSLOTH]),
    ("1.5b", "t4", 4, 2_048, "full", [ARTICLES, TRL, OURS, OURS_COMPILED, OURS_NONE, UNSLOTH]),
    ("1.5b", "bf16", 1, 1_024, "full", [OURS, OURS_COMPILED, UNSLOTH]),
]  # fmt: skip


def _steps(max_length: int, data: str) -> dict:
    """Warm-up and timed steps: the longer a step, the fewer. Steps of mixed data differ, so there are more of them."""
    if data == "mixed":
        return {"warm_steps": 4, "timed_steps": 12}
    if max_length <= 4_096:
        return {"warm_steps": 3, "timed_steps": 6}
    return {"warm_steps": 2, "timed_steps": 4} if max_length <= 8_192 else {"warm_steps": 1, "timed_steps": 2}


def rows() -> list[dict]:
    """All rows, in the order in which they are measured."""
    found = []
    for size, gear, batch_size, max_length, data, variants in PLAN:
        for name, settings in variants:
            config = CONFIGS[MODELS[size]] | {"max_position_embeddings": LONGEST}
            row = {"label": f"{size} {gear} {batch_size}x{max_length} {data} {name}", "model": MODELS[size]}
            row |= {"config": config, "gear": gear, "cap_gib": CAP / GIB if gear == "t4" else None}
            row |= {"batch_size": batch_size, "max_length": max_length, "data": data}
            row |= {"variant": name.split()[0], "settings": dict(settings)} | _steps(max_length, data)
            found.append(row | {"profiled": max_length <= 8_192})
    return found
