"""Checkpoints of a run that may be killed at any moment, and the rules by which it goes on.

A resumed run must end as if nothing had happened. The trainer alone does not see to that: it stops at a half-written
checkpoint, goes on silently without an optimizer or scheduler state, trains a finished run one step further, and does not
notice other settings or other chats. These rules do.
"""

import hashlib
import json
import os
import shutil
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from qlora_helpers.settings import AS_OTHERS_RUN
from qlora_helpers.training.run_folder import RECORD, RESULT, numbered_checkpoints, trainer_state

PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
# by the method of a run
WEIGHTS = {"qlora": "adapter_model.safetensors", "lora": "adapter_model.safetensors", "full": "model.safetensors"}
# these say when to save and to log, not what to compute
FREE_TO_CHANGE = ("save_steps", "save_minutes", "keep_checkpoints", "log_steps")
# said by the model and the machine, which are recorded themselves; or the same in every run
NOT_RECORDED = (*FREE_TO_CHANGE, *AS_OTHERS_RUN, "double_quant", "compute_dtype")
# what every run did before it became a setting: a record from that time lacks it
BEFORE_IT_WAS_A_SETTING = {"method": "lora", "schedule": "linear", "max_grad_norm": 1.0}


class SaveByTheClock(TrainerCallback):
    """Ask for a checkpoint at the end of the first step after every so many minutes."""

    def __init__(self, minutes: float):
        self.minutes = minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.last >= self.minutes * 60:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.last = time.monotonic()


def _damaged(part: Path) -> bool:
    """Whether a part is missing, or was cut off: torch's files are zip archives with their table at the end."""
    if part.suffix == ".safetensors":
        try:
            with safe_open(part, framework="pt") as file:  # holds the header against the file's length
                return not file.keys()
        except (FileNotFoundError, SafetensorError):
            return True
    return not part.exists() or not zipfile.is_zipfile(part)


def last_whole_checkpoint(folder: str | Path, float16: bool = False, method: str = "qlora") -> Path | None:
    """The newest checkpoint in `folder` that was written to its end; None if there is none.

    `trainer_state.json` is written last, so a checkpoint is whole if it parses. A whole one that lacks its optimizer,
    scheduler or random state would be resumed silently from zero by the trainer; it is refused here.

    Args:
        float16: the run scales its loss, so the scale must be there, too.
        method: of the run, as in its `Settings`.

    Raises:
        ValueError: the newest whole checkpoint lacks one of its parts.
    """
    for path in numbered_checkpoints(Path(folder)):
        if trainer_state(path) is None:
            continue  # cut off while it was written
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
    """Optimizer steps that lie behind a whole checkpoint."""
    return trainer_state(checkpoint)["global_step"]


def logged(log_history: list[dict], name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of each entry of a trainer's log that has a value of this name."""
    return [(entry["step"], float(entry[name])) for entry in log_history if name in entry]


def log_history(checkpoint: Path) -> list[dict]:
    """The trainer's log up to a whole checkpoint."""
    return trainer_state(checkpoint)["log_history"]


def record_of(model, chats: list, settings, compute_dtype) -> dict:
    """What a run is: its settings, chats, base model and compute dtype.

    On one machine, with the same versions of the libraries, two runs of one record end alike.
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


def _in_today_s_words(record: dict) -> dict:
    """A record that an older version of this package may have written."""
    record = BEFORE_IT_WAS_A_SETTING | record
    if record["method"] == "lora" and record.get("quantization") != "none":
        record["method"] = "qlora"  # there was one word for both
    return record


def where_to_start(folder: Path, record: dict, resume: bool, float16: bool) -> Path | None:
    """The checkpoint from which a run goes on, or None for the start.

    Checkpoints that were cut off are removed when a run is resumed.

    Raises:
        FileExistsError: the folder holds a run already, and `resume` is not set.
        ValueError: the run is finished, is another one than `record` says, or its last checkpoint lacks a part.
    """
    record = json.loads(json.dumps(record))  # as it will be read again
    begun, finished = folder / RECORD, folder / RESULT[record["method"]]
    if finished.is_dir() and not any(finished.iterdir()):
        finished.rmdir()  # a Drive that lost its runtime may know the folder, and not what was in it
    if not resume and (finished.exists() or begun.exists() or numbered_checkpoints(folder)):
        raise FileExistsError(f"output_dir={str(folder)!r} holds a run already: name a new folder, or pass resume=True")
    if finished.exists():
        raise ValueError(f"the run in {folder} is finished: load what it trained, or name a new folder for another run")
    if not begun.exists():
        if numbered_checkpoints(folder):
            raise ValueError(
                f"{folder} has checkpoints and no {RECORD}: what they belong to is unknown. Name a new folder"
            )
        return None
    try:
        before = _in_today_s_words(json.loads(begun.read_text()))
    except ValueError as error:
        raise ValueError(f"{begun} is damaged, so what the run was is unknown: name a new folder") from error
    differing = [
        f"{name} was {before.get(name)!r} and is now {record.get(name)!r}"
        for name in sorted(before.keys() | record.keys())
        if before.get(name) != record.get(name)
    ]
    if differing:
        cure = " (QLORA_GEAR chooses the dtype)" if before.get("compute_dtype") != record.get("compute_dtype") else ""
        raise ValueError(
            f"the run in {folder} was begun otherwise: {'; '.join(differing)}{cure}. Resume it as it was begun, or name a "
            "new folder"
        )
    checkpoint = last_whole_checkpoint(folder, float16, record["method"])
    for path in numbered_checkpoints(folder):
        if trainer_state(path) is None:
            shutil.rmtree(path)
    return checkpoint


def write_record(folder: Path, record: dict) -> None:
    """Begin a run: write down what it is, so that after a kill the file is there in whole or not at all."""
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, folder / RECORD)
