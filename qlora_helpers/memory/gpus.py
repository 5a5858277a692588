"""The GPUs that people fine-tune on: usable memory, compute capability, and what the CUDA libraries take.

The table, `gpus.json`, says of each card where its usable memory was read: what torch reports as its total memory on
Linux, which is less than the card is sold with. Where no public source was found, `source` is "nominal", and the usable
memory is taken as the lowest share of the nominal memory that is known of a card of its kind: GeForce cards on one
side, on the other the rest, which spend a part of their memory on error correction. Compute capabilities are those of
https://developer.nvidia.com/cuda-gpus and https://developer.nvidia.com/cuda-legacy-gpus.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from qlora_helpers import validation
from qlora_helpers.units import GB, GIB, MIB

__all__ = ["CONTEXT_BYTES", "GPU", "TABLE", "find_gpu", "known_gpus", "measured_gpu", "nominal_gib"]

# torch gives each thread that runs matrix products a cuBLAS workspace: 32 MiB on Hopper, 8.125 MiB elsewhere
# (aten/src/ATen/cuda/CUDABlas.cpp, default_cublas_workspace_config). The forward and backward passes are two threads.
WORKSPACE_HOPPER, WORKSPACE = 32 * MIB, 8_519_680
# The CUDA context with the kernels and libraries that a run loads, measured on an H200 (data/measured/h200_peaks.json):
# what the card shows as used, less what torch reserved, for runs without paged states. An H100 took 0.606 GiB, with
# torch 2.11 as well. Cards on which nobody measured it are assumed to need the larger of the two.
CONTEXT_BYTES = 804_061_184

TABLE = Path(__file__).with_name("gpus.json")

# The words of a name that say nothing of which card it is.
MAKERS = re.compile(r"nvidia|geforce|tesla|rtx|gtx|\bamd\b|instinct")
FORMS = re.compile(
    r"\b(gpus?|graphics|card|generation|edition|workstation|server|sxm\d?|pci-?e|oam|hbm\d?e?|with|design)\b"
)
PORTABLE = re.compile(r"\b(mobile|notebook|max-?q)\b")
SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*gi?b\b|\b(\d+(?:\.\d+)?)\s*g\b")
BARE_SIZE = re.compile(r"[\s-](\d{1,3})$")
SEVERAL = re.compile(r"^(\d{1,2})\s*[x×]\s*(?=\S)|\s*[x×]\s*(\d{1,2})$")  # 2x 4090, t4 x2
HOSTS = re.compile(r"\b(?:google\s+)?colab(?:oratory)?\b|\bkaggle\b")
PLANS = re.compile(r"\b(free|paid|pro\+?|plus|tier|plan|notebooks?)(?!\w)")
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb)(?:[\s,:@]*(?:sm_?(\d{2,3})|(\d{1,2}\.\d)))?")
ASSUMED_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class GPU:
    """A card.

    Args:
        usable_bytes: what torch reports as its total memory.
        compute_capability: such as (7, 5) for a T4.
        workspace_bytes: of cuBLAS, for both threads.
        context_bytes: of the CUDA context.
        context_measured: whether the context was measured on this card, or taken from the one that needs most.
        nominal: whether the usable memory is estimated from what the card is sold with.
        notes: what was assumed when the card was found by its name, in sentences.
    """

    name: str
    usable_bytes: int
    compute_capability: tuple[int, int]
    workspace_bytes: int
    context_bytes: int = CONTEXT_BYTES
    context_measured: bool = False
    nominal: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)


@cache
def _entries() -> dict[str, dict]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _is_geforce(entry: dict) -> bool:
    return "GeForce" in entry["name"]


@cache
def _share(geforce: bool) -> float:
    """The lowest share of its nominal memory that a card of this kind is known to offer."""
    known = [entry for entry in _entries().values() if "usable_gib" in entry and _is_geforce(entry) == geforce]
    return min(entry["usable_gib"] / entry["nominal_gib"] for entry in known)


def _usable_gib(entry: dict) -> float:
    return entry["usable_gib"] if "usable_gib" in entry else _share(_is_geforce(entry)) * entry["nominal_gib"]


@cache
def known_gpus() -> dict[str, GPU]:
    """The GPUs of `gpus.json` by their short names."""
    table = {}
    for key, entry in _entries().items():
        gpu = measured_gpu(entry["name"], int(_usable_gib(entry) * GIB), tuple(entry["compute_capability"]))
        table[key] = replace(gpu, nominal="usable_gib" not in entry, notes=_notes(entry))
    return table


def _notes(entry: dict) -> tuple[str, ...]:
    notes = []
    if "usable_gib" not in entry:
        kind = "GeForce cards" if _is_geforce(entry) else "cards other than GeForce"
        notes.append(
            f"what torch can use of {_article(entry['name'])} is estimated: {_usable_gib(entry):.2f} of its "
            f"{entry['nominal_gib']} GiB, the lowest share that is known of {kind}"
        )
    if entry["name"].startswith("AMD"):
        notes.append(
            "nothing of this course was tried on an AMD card: the kernels, the workspace and the context are assumed "
            "to take what they take on an H200, and bitsandbytes must be a build for ROCm"
        )
    return tuple(notes)


def nominal_gib() -> dict[str, int]:
    """What each known GPU is sold with, in GiB, by its short name."""
    return {key: entry["nominal_gib"] for key, entry in _entries().items()}


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AN' else 'a'} {name}"


@cache
def _contexts() -> dict[str, int]:
    """The CUDA context where it was measured, by the name that torch gives the card."""
    return {entry["name"]: entry["context_bytes"] for entry in _entries().values() if "context_bytes" in entry}


def measured_gpu(name: str, usable_bytes: int, compute_capability: tuple[int, int]) -> GPU:
    """A GPU as torch describes it, whether the table knows it or not.

    Args:
        usable_bytes: what torch reports as its total memory.
        compute_capability: such as (7, 5) for a T4.
    """
    workspace = 2 * (WORKSPACE_HOPPER if compute_capability[0] == 9 else WORKSPACE)
    context = _contexts().get(name)
    return GPU(name, usable_bytes, compute_capability, workspace, context or CONTEXT_BYTES, context is not None)


def _plain(name: str) -> str:
    """A name without its size and its optional words: "NVIDIA GeForce RTX 4090 24GB" and "4090" are the same card."""
    words = FORMS.sub(" ", MAKERS.sub(" ", PORTABLE.sub("laptop", SIZE.sub(" ", name.lower()))))
    return "".join(c for c in words if c.isalnum())


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


@cache
def _by_whole_name() -> dict[str, tuple[str, ...]]:
    """The keys of the cards by the names that torch gives them, with all words."""
    found: dict[str, tuple[str, ...]] = {}
    for key, entry in _entries().items():
        for name in (entry["name"], *entry["aliases"]):
            found[_letters(name)] = (*found.get(_letters(name), ()), key)
    return found


@cache
def _by_plain_name() -> dict[str, tuple[str, ...]]:
    """The keys of the cards that a plain name can mean."""
    found: dict[str, dict[str, None]] = {}
    for key, entry in _entries().items():
        of_key = re.sub(rf"-{entry['nominal_gib']}$", "", key)
        for name in (of_key, entry["name"], *entry["aliases"]):
            plain = _plain(name)
            for form in {plain, plain.replace("quadro", "")}:
                found.setdefault(form, {})[key] = None
    return {plain: tuple(keys) for plain, keys in found.items()}


def find_gpu(gpu: str | GPU) -> GPU:
    """A GPU by its name, as people write it: "t4", "RTX 3060 12GB", "A100-SXM4-80GB", "colab", "kaggle t4 x2".

    Any other card by its memory: "16GiB", with its compute capability "16GiB sm_75" or "16GiB 7.5".

    Where a name leaves something open, the choice that promises least is made, and the card's `notes` say which.

    Raises:
        ValueError: no GPU is known by this name.
    """
    if isinstance(gpu, GPU):
        return gpu
    asked = " ".join(str(gpu).lower().split())
    if asked.replace(" ", "-") in _entries():
        return known_gpus()[asked.replace(" ", "-")]
    if memory := MEMORY.fullmatch(asked):
        return _by_memory(gpu, *memory.groups())
    notes, name = [], asked
    if HOSTS.search(name):
        of_kaggle = "kaggle" in name
        name = PLANS.sub(" ", HOSTS.sub(" ", name)).strip(" -,:()")
        if not name:
            name = "t4"
            notes.append(
                "a T4 is assumed, of which Kaggle gives two; for its other card: kaggle p100"
                if of_kaggle
                else "a T4 is assumed, which Colab gives for free; for another card name it, such as colab l4"
            )
    if several := SEVERAL.search(name):
        name = SEVERAL.sub("", name, count=1).strip()
        if int(several[1] or several[2]) > 1:
            number = several[1] or several[2]
            notes.append(
                f"one of the {number} cards is counted; for a run on all of them set num_gpus={number} (--gpus {number})"
            )
    found = known_gpus()[name] if name in _entries() else _by_name(gpu, name, notes)
    return replace(found, notes=(*notes, *found.notes))


def _by_name(asked: str, name: str, notes: list[str]) -> GPU:
    """The card of a name; where several have it, the one with the least memory, with a note."""
    keys = _by_whole_name().get(_letters(name)) or _by_plain_name().get(_plain(name), ())
    if not keys:  # "rtx 3060 12" and "3060-12gb" mean the same
        name = BARE_SIZE.sub(r" \1gb", name)
        keys = _by_plain_name().get(_plain(name), ())
    size = SIZE.search(name)
    if len(keys) > 1 or (size and _letters(name) not in _by_whole_name()):
        keys = _of_size(asked, keys, size)
    if not keys:
        near = difflib.get_close_matches(_plain(name), _by_plain_name(), 3, cutoff=0.5)
        near = list(dict.fromkeys(key for plain in near for key in _by_plain_name()[plain]))
        perhaps = f" (perhaps {' or '.join(near)})" if near else ""
        raise validation.refuse(
            "gpu",
            asked,
            f"no GPU is known by this name{perhaps}. `python -m qlora_helpers memory --list` names those that are; any "
            "other is given by its memory, such as 16GiB, or by its memory and compute capability, such as '16GiB sm_75'",
        )
    least = min(keys, key=lambda key: _usable_gib(_entries()[key]))
    if len(keys) > 1:
        others = " or ".join(key for key in keys if key != least)
        notes.append(
            f"{asked!r} can mean several cards: {_article(_entries()[least]['name'])} is assumed, which has the least "
            f"memory; for another: {others}"
        )
    return known_gpus()[least]


def _of_size(asked: str, keys: tuple[str, ...], size: re.Match | None) -> tuple[str, ...]:
    """Those of the cards that have as much memory as a name says: what they are sold with, or what torch shows."""
    if size is None or not keys:
        return keys
    gib = float(size[1] or size[2])
    entries = {key: _entries()[key] for key in keys}
    of_size = [key for key, entry in entries.items() if _usable_gib(entry) - 1 <= gib <= 1.07 * entry["nominal_gib"]]
    if not of_size:
        sizes = " or ".join(f"{size} GB" for size in sorted({entry["nominal_gib"] for entry in entries.values()}))
        raise validation.refuse(
            "gpu", asked, f"this card has {sizes}, as far as is known. For {size[0].strip()} write {gib:g}GiB"
        )
    return tuple(of_size)


def _by_memory(asked: str, amount: str, unit: str, sm: str | None, capability: str | None) -> GPU:
    """A card that is only known by its memory."""
    usable = int(float(amount) * (GIB if unit == "gib" else GB))
    if not 0 < usable <= 10_000 * GIB:
        raise validation.refuse("gpu", asked, "must be more than 0 and at most 10,000 GiB")
    notes = [
        f"{usable / GIB:.2f} GiB are taken as what torch can use of the card, which is less than it is sold with: a T4 "
        f"of 16 GB has {known_gpus()['t4'].usable_bytes / GIB:.2f} GiB"
    ]
    if unit == "gb":
        notes.insert(0, f"{amount} GB are {amount} x 10^9 bytes, {usable / GIB:.2f} GiB; for 2^30 write {amount}GiB")
    if sm:
        found = int(sm[:-1]), int(sm[-1])
    elif capability:
        found = tuple(map(int, capability.split(".")))
    else:
        found = ASSUMED_CAPABILITY
        notes.append(
            "compute capability 8.0 is assumed, with bfloat16 and FlashAttention; for an older card add it, such as "
            f"'{amount}{'GiB' if unit == 'gib' else 'GB'} sm_75'"
        )
    return replace(measured_gpu(f"a card of {usable / GIB:.2f} GiB", usable, found), notes=tuple(notes))
