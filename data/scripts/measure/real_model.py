"""The real model that two scripts measure, where its weights are from, and tables that grow row by row.

The libraries are imported where they are needed: README's tables are made from here.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from data.scripts import ROOT
from data.scripts.measure.commands import processor
from qlora_helpers.json_files import read_json, write_whole
from qlora_helpers.models.fetched import FETCHABLE
from qlora_helpers.statistics import interval

MODEL = "smollm2-135m"
TASK = ROOT / "data" / "measured" / "real_task.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def source_of(name: str) -> dict:
    """Which weights a model's folder holds: their SHA-256, and where they are from."""
    from qlora_helpers.models.loading import folder_of

    with (folder_of(name) / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    known = FETCHABLE.get(name)
    if known and found == known.weights_sha256:
        words = f"the 16-bit weights of {known.title}"
    elif known:
        words = (
            f"{known.title} as {known.grid}, from the package {known.distribution} {known.version}, decoded and written in "
            "16 bits"
        )
    else:
        words = name
    return {"model": name, "weights": words, "sha256": found}


def head_of(command: str, model: str) -> dict:
    """What a table says of all its rows: the weights, the machine and the versions."""
    import torch

    return {
        "command": command,
        "source": source_of(model),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def fill(table: Path, head: dict, names: Iterable[str], row: Callable[[str, dict[str, dict]], dict]) -> None:
    """Make the rows that a table lacks, in order, and write it after each.

    Args:
        head: what the table says of all rows. One that was made with other weights, texts or settings is refused; rows
            of another machine or version stay, and have what is different beside them.
        row: makes one from its name and the rows so far.

    Raises:
        SystemExit: the table was made with something else.
    """
    before = read_json(table) if table.exists() else head | {"rows": []}
    where = ("processor", "threads", "versions")
    if other := [key for key, value in head.items() if key not in where and before.get(key) != value]:
        raise SystemExit(f"{table} was made with another {', '.join(other)}: name a new one with --table")
    here = {key: head[key] for key in where if before[key] != head[key]}
    rows = {one["name"]: one for one in before["rows"]}
    names = list(names)
    for name in names:
        if name in rows:
            continue
        rows[name] = row(name, rows) | here
        print(json.dumps(rows[name])[:300], flush=True)
        ordered = [rows[one] for one in dict.fromkeys([*names, *rows]) if one in rows]
        text = json.dumps(before | {"rows": ordered}, indent=1, ensure_ascii=False)
        # a list of numbers on one line
        text = re.sub(r"\[\s+([-\d.,\se]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
        write_whole(table, text + "\n")


README = {
    "no example": "before",
    "three examples": "before, three examples in the prompt",
    "NF4": "after, in 4 bits (NF4, double quantisation)",
    "16 bit": "after, unquantised",
    "shuffled": "after, weights shuffled",
}


def markdown_table(table: Path = TASK) -> str:
    """The rows that the README shows: the shares of valid and right answers, several seeds taken together."""
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    count = next(row["questions"] for row in rows if "each" in row)
    lines = [
        f"| SmolLM2-135M-Instruct, {count} test orders | seeds | valid JSON | all fields right |",
        "|---|---|---|---|",
    ]
    for name, words in README.items():
        of = [row for row in rows if "each" in row and row["name"].partition(", seed")[0] == name]
        if not of:
            continue
        by_order = [fmean(map(int, asked)) for asked in zip(*(row["each"] for row in of), strict=True)]
        right, valid = interval(by_order), fmean(row["valid"][0] for row in of)
        within = (
            f" ± {right.half:.0%}" if right.half else ""
        )  # all answers alike: the formula would say that this is sure
        lines.append(f"| {words} | {len(of)} | {valid:.0%} | {right.mean:.0%}{within} |".replace("%", " %"))
    return "\n".join(lines)
