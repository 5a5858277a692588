"""The rows of `speed.py`: which variants are timed, on which model, gear and data; the most important first.

A row is a dict:
    label           its key in the results: model, gear, batch x length, data, variant, and what is special about it
    model, config   the shape's name, and its configuration as `AutoConfig.for_model` takes it
    gear            "bf16": bfloat16 with all kernels and all memory; "t4": float16 with a T4's kernels, capped
    cap_gib         how much memory torch may take; null for all
    batch_size, accumulation, max_length    accumulation: batches per step
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

COMPILED, LIGER = {"compile_layers": True}, {"liger_layers": True}
NONE = {"gradient_checkpointing": False}
IN_16_BITS = {"method": "lora"}  # the base is not quantised
OFFLOADED = {"activation_offloading": True}
PACKED = {"packing": True}


def some(number: int) -> dict:
    """Only the first so many layers are checkpointed."""
    return {"checkpointed_layers": number}


def budget(size: str) -> dict:
    return {"memory_budget": size}


# what the variants are called, with their settings
ARTICLES, TRL, OURS, UNSLOTH = ("articles", {}), ("trl", {}), ("ours", {}), ("unsloth", {})
OURS_COMPILED = ("ours compiled", COMPILED)
OURS_NONE = ("ours compiled none-checkpointed", COMPILED | NONE)
OURS_PACKED, OURS_PACKED_COMPILED = ("ours packed", PACKED), ("ours packed compiled", PACKED | COMPILED)
OURS_OFFLOADED, OURS_OFFLOADED_LIGER = ("ours offloaded", OFFLOADED), ("ours offloaded liger", OFFLOADED | LIGER)
OURS_OFFLOADED_COMPILED = ("ours offloaded compiled", OFFLOADED | COMPILED)
OURS_IN_14 = ("ours compiled in-14GiB", COMPILED | budget("14GiB"))
BUDGETS = [(f"ours compiled in-{size}", COMPILED | budget(size)) for size in ("14.3GiB", "24GiB", "48GiB", "auto")]

# Packed rows of the course's own have the same chats in a step as padded ones; Unsloth's have rows of so many tokens. 32
# chats of mixed data are about 2,900 tokens, so three of its rows of 1,024 are as many, and 96 chats eight or nine rows.
# model, gear, batch size, accumulation, tokens, data, variants
PLAN = [
    ("8b", "bf16", 4, 1, 2_048, "full", [
        ARTICLES, TRL, OURS, OURS_COMPILED, ("ours compiled 16-of-32", COMPILED | some(16)), OURS_NONE, UNSLOTH, *BUDGETS,
        ("ours liger", LIGER), ("ours 16-of-32", some(16)), ("ours none-checkpointed", NONE),
        # what 4 bits cost in time: the two of a pair in one call
        ("ours beside-16-bit", {}), ("ours compiled beside-16-bit", COMPILED),
        ("ours 16-bit", IN_16_BITS), ("ours compiled 16-bit", IN_16_BITS | COMPILED),
    ]),
    ("8b", "bf16", 32, 1, 1_024, "mixed", [
        ARTICLES, TRL, OURS, OURS_COMPILED, OURS_PACKED, OURS_PACKED_COMPILED, UNSLOTH,
        ("ours packed compiled none-checkpointed", PACKED | COMPILED | NONE), ("ours packed liger", PACKED | LIGER),
    ]),
    ("8b", "bf16", 3, 1, 1_024, "mixed", [("unsloth packed", PACKED)]),
    ("8b", "bf16", 12, 8, 1_024, "mixed", [
        OURS_PACKED, OURS_PACKED_COMPILED, ("ours packed compiled none-checkpointed", PACKED | COMPILED | NONE),
    ]),
    ("8b", "bf16", 8, 1, 1_024, "mixed", [("unsloth packed", PACKED)]),
    ("8b", "bf16", 2, 1, 2_048, "full", [OURS_COMPILED, OURS_NONE, UNSLOTH]),
    ("8b", "t4", 4, 1, 2_048, "full", [TRL, OURS, OURS_COMPILED, OURS_IN_14, UNSLOTH, ARTICLES]),
    ("8b", "t4", 1, 1, 2_048, "full", [ARTICLES, TRL, OURS, OURS_COMPILED, UNSLOTH]),
    ("8b", "t4", 8, 4, 1_024, "mixed", [
        ARTICLES, TRL, OURS, OURS_COMPILED, OURS_PACKED, OURS_PACKED_COMPILED, UNSLOTH,
    ]),
    ("8b", "t4", 1, 1, 8_192, "full", [
        ARTICLES, TRL, OURS, OURS_COMPILED, OURS_OFFLOADED, OURS_OFFLOADED_COMPILED, UNSLOTH,
    ]),
    ("8b", "t4", 1, 1, 16_384, "full", [
        TRL, OURS, ("ours expandable", {"expandable_segments": True}), OURS_OFFLOADED, OURS_OFFLOADED_LIGER, UNSLOTH,
    ]),
    ("8b", "t4", 1, 1, LONGEST, "full", [OURS_OFFLOADED_LIGER, UNSLOTH, OURS_OFFLOADED, OURS_OFFLOADED_COMPILED]),
    ("1.5b", "bf16", 4, 1, 2_048, "full", [ARTICLES, TRL, OURS, OURS_COMPILED, OURS_NONE, UNSLOTH]),
    ("1.5b", "t4", 4, 1, 2_048, "full", [ARTICLES, TRL, OURS, OURS_COMPILED, OURS_NONE, OURS_IN_14, UNSLOTH]),
    ("1.5b", "bf16", 32, 1, 1_024, "mixed", [
        ARTICLES, TRL, OURS, OURS_COMPILED, OURS_PACKED, OURS_PACKED_COMPILED, UNSLOTH,
    ]),
]  # fmt: skip


def _steps(max_length: int, data: str, accumulation: int) -> dict:
    """Warm-up and timed steps: the longer a step, the fewer. Steps of mixed data differ, so there are more of them."""
    if data == "mixed":
        return {"warm_steps": 4, "timed_steps": 8} if accumulation == 1 else {"warm_steps": 3, "timed_steps": 6}
    if max_length <= 4_096:
        return {"warm_steps": 3, "timed_steps": 6}
    return {"warm_steps": 2, "timed_steps": 4} if max_length <= 8_192 else {"warm_steps": 1, "timed_steps": 2}


def rows() -> list[dict]:
    """All rows, in the order in which they are measured."""
    found = []
    for size, gear, batch_size, accumulation, max_length, data, variants in PLAN:
        shape = f"{batch_size}x{max_length}" + (f"x{accumulation}" if accumulation > 1 else "")
        for name, settings in variants:
            config = CONFIGS[MODELS[size]] | {"max_position_embeddings": LONGEST}
            row = {"label": f"{size} {gear} {shape} {data} {name}", "model": MODELS[size]}
            row |= {"config": config, "gear": gear, "cap_gib": CAP / GIB if gear == "t4" else None}
            row |= {"batch_size": batch_size, "accumulation": accumulation, "max_length": max_length, "data": data}
            row |= {"variant": name.split()[0], "settings": dict(settings)} | _steps(max_length, data, accumulation)
            found.append(row | {"profiled": max_length <= 8_192})
    return found
