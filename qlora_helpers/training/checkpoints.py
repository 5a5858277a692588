"""Checkpoints of a run that may be killed at any moment, and the rules for resuming it.

A resumed run must end as if nothing had happened. The trainer alone does not ensure that: it fails at a half-written
checkpoint, continues silently without an optimizer or scheduler state, trains a finished run one step further, and does
not notice changed settings or chats. These rules do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from qlora_helpers.settings import PREDICTOR_ONLY, Settings
from qlora_helpers.training.run_folder import RECORD, RESULT, brought_up_to_date, numbered_checkpoints, trainer_state

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

    from qlora_helpers.chats import Chat

__all__ = [
    "PARTS",
    "WEIGHTS",
    "SaveByTheClock",
    "last_whole_checkpoint",
    "log_history",
    "logged",
    "record_of",
    "steps_done",
    "where_to_start",
    "write_record",
]

PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
# by method
WEIGHTS = {"qlora": "adapter_model.safetensors", "lora": "adapter_model.safetensors", "full": "model.safetensors"}
# these say when to save and log, not what to compute
FREE_TO_CHANGE = ("save_steps", "save_minutes", "keep_checkpoints", "log_steps")
# given by the model and the machine, which are recorded themselves, or the same in every run
NOT_RECORDED = (*FREE_TO_CHANGE, *PREDICTOR_ONLY, "double_quant", "compute_dtype")


class SaveByTheClock(TrainerCallback):
    """Ask for a checkpoint at the end of a step when this many minutes have passed since the last one."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() - self.last >= self.minutes * 60:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last = time.monotonic()


def _damaged(part: Path) -> bool:
    """Whether a part is missing or truncated: torch's files are zip archives, which have their index at the end."""
    if part.suffix == ".safetensors":
        try:
            with safe_open(part, framework="pt") as file:  # checks the header against the file's length
                return not file.keys()
        except (FileNotFoundError, SafetensorError):
            return True
    return not part.exists() or not zipfile.is_zipfile(part)


def last_whole_checkpoint(folder: str | Path, float16: bool = False, method: str = "qlora") -> Path | None:
    """The newest checkpoint in `folder` that was written to the end; None if there is none.

    `trainer_state.json` is written last: if it parses, the checkpoint was written to the end. If such a checkpoint
    lacks its optimizer, scheduler or random state, the trainer would silently start that anew; here it is refused.

    Args:
        float16: the run scales its loss, so the scale must be there, too.
        method: of the run, as in its `Settings`.

    Raises:
        ValueError: that checkpoint lacks one of its parts.
    """
    for path in numbered_checkpoints(Path(folder)):
        if trainer_state(path) is None:
            continue  # cut off while it was being written
        parts = (WEIGHTS[method], *PARTS, *["scaler.pt"] * float16)
        damaged = [part for part in parts if _damaged(path / part)]
        if damaged:
            raise ValueError(
                f"{path} lacks {', '.join(damaged)}: a run resumed from it would not be the same run. "
                "Delete this checkpoint to resume from the one before it"
            )
        return path
    return None


def steps_done(checkpoint: Path) -> int:
    """The optimizer steps done at a complete checkpoint."""
    return trainer_state(checkpoint)["global_step"]


def logged(log_history: list[dict[str, Any]], name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of each entry in a trainer's log that has a value of this name."""
    return [(entry["step"], float(entry[name])) for entry in log_history if name in entry]


def log_history(checkpoint: Path) -> list[dict[str, Any]]:
    """The trainer's log up to a complete checkpoint."""
    return trainer_state(checkpoint)["log_history"]


def record_of(
    model: PreTrainedModel | PeftModel, chats: list[Chat], settings: Settings, compute_dtype: torch.dtype
) -> dict[str, Any]:
    """What defines a run: its settings, chats, base model and compute dtype.

    On one machine, with the same versions of the libraries, two runs with the same record end alike.
    """
    config = getattr(model.config, "quantization_config", None)
    quantization = (
        f"{config.bnb_4bit_quant_type}, double_quant={config.bnb_4bit_use_double_quant}" if config else "none"
    )
    return {
        **{name: value for name, value in asdict(settings).items() if name not in NOT_RECORDED},
        "chats": hashlib.sha256(json.dumps(chats).encode()).hexdigest()[:16],
        "model": Path(model.config._name_or_path).name,
        "quantization": quantization,
        "compute_dtype": str(compute_dtype),
    }


def where_to_start(folder: Path, record: dict[str, Any], resume: bool, float16: bool) -> Path | None:
    """The checkpoint to resume a run from, or None to begin at the start.

    Half-written checkpoints are removed when a run is resumed.

    Raises:
        FileExistsError: the folder already holds a run, and `resume` is not set.
        ValueError: the run is finished, is not the one that `record` describes, or its last checkpoint lacks a part.
    """
    record = json.loads(json.dumps(record))  # as it is when it is read back
    begun, finished = folder / RECORD, folder / RESULT[record["method"]]
    if finished.is_dir() and not any(finished.iterdir()):
        finished.rmdir()  # when a runtime ends, Google Drive may keep a new folder and lose its files
    if not resume and (finished.exists() or begun.exists() or numbered_checkpoints(folder)):
        raise FileExistsError(f"output_dir={str(folder)!r} holds a run already: name a new folder, or pass resume=True")
    if finished.exists():
        raise ValueError(f"the run in {folder} is finished: load what it trained, or name a new folder for another run")
    if not begun.exists():
        if numbered_checkpoints(folder):
            raise ValueError(
                f"{folder} has checkpoints but no {RECORD}: it is unknown which run they belong to. Name a new folder"
            )
        return None
    try:
        before = brought_up_to_date(json.loads(begun.read_text()))
    except ValueError as error:
        raise ValueError(f"{begun} is damaged, so it is unknown how the run was begun: name a new folder") from error
    differing = [
        f"{name} was {before.get(name)!r} and is now {record.get(name)!r}"
        for name in sorted(before.keys() | record.keys())
        if before.get(name) != record.get(name)
    ]
    if differing:
        cure = " (QLORA_GEAR chooses the dtype)" if before.get("compute_dtype") != record.get("compute_dtype") else ""
        raise ValueError(
            f"the run in {folder} was begun differently: {'; '.join(differing)}{cure}. Resume it as it was begun, or "
            "name a new folder"
        )
    checkpoint = last_whole_checkpoint(folder, float16, record["method"])
    for path in numbered_checkpoints(folder):
        if trainer_state(path) is None:
            shutil.rmtree(path)
    return checkpoint


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Begin a run by writing its record; a kill leaves the file complete or missing."""
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, folder / RECORD)
