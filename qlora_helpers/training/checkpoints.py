"""Checkpoints of a run that may be killed at any moment, and the rules for resuming it.

A run that is resumed on the same device, with the same number of threads and the same versions of the libraries must end
as if nothing had happened; where these have changed, that is said. The trainer alone does not ensure it: it fails at a
half-written checkpoint, continues silently without an optimizer or scheduler state, trains a finished run one step
further, and does not notice damaged files, or changed settings or chats. These rules do.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from qlora_helpers import validation
from qlora_helpers.folder_locks import FolderInUse
from qlora_helpers.json_files import read_json, write_json
from qlora_helpers.models.fingerprint import fingerprint_of
from qlora_helpers.models.tensor_files import misfit, shapes_in
from qlora_helpers.settings import OF_SEVERAL_GPUS, PREDICTOR_ONLY, SWITCHES, Settings
from qlora_helpers.training.checksums import (
    changed_files,
    count_of_states,
    write_checksums,
    written_by,
    written_whole,
)
from qlora_helpers.training.environment import changes, environment
from qlora_helpers.training.run_folder import (
    RECORD,
    RESULT,
    brought_up_to_date,
    complete_checkpoints,
    numbered_checkpoints,
    read_record,
    step_of,
    steps_saved,
    trainer_state,
)
from qlora_helpers.training.together import ALONE, Together

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

    from qlora_helpers.chats import Chat
    from qlora_helpers.hardware import Hardware

__all__ = [
    "PARTS",
    "VALIDATION_LOSS",
    "WEIGHTS",
    "CheckOptimizer",
    "SaveByTheClock",
    "WriteChecksums",
    "check_tensors",
    "failed_writing_explained",
    "faults_in",
    "last_whole_checkpoint",
    "load_weights",
    "log_history",
    "logged",
    "parts_of",
    "record_of",
    "refuse_other_data",
    "refuse_other_sharding",
    "say_what_changes",
    "where_to_start",
    "write_record",
]

TORCH_S_WRITER = r"unexpected pos|iostream|PytorchStreamWriter|[Ff]ile write"  # its errors have no type of their own
OF_THE_TRAINER = re.compile(
    r"\.?(adapter_|model|pytorch_model_fsdp|optimizer|scheduler|scaler|rng_state|trainer_state|training_args|tokenizer|special_tokens|added_tokens"
    r"|vocab|merges|chat_template|config|generation_config|README|checksums)"
)
PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # of one process; `parts_of` names those of several
SHARDED = ("optimizer.bin", "pytorch_model_fsdp.bin")
VALIDATION_LOSS = "eval_loss"  # its name in the trainer's log
# by method
WEIGHTS = {"qlora": "adapter_model.safetensors", "lora": "adapter_model.safetensors", "full": "model.safetensors"}
# these say when to save and log, not what to compute
FREE_TO_CHANGE = ("save_steps", "save_minutes", "keep_checkpoints", "log_steps")
# given by the model, the machine and how the run was launched, which are recorded themselves, or the same in every run
NOT_RECORDED = (*FREE_TO_CHANGE, *PREDICTOR_ONLY, *OF_SEVERAL_GPUS, "double_quant", "compute_dtype", "epochs")
# said in the record, but no part of what makes two runs alike: for validation that is its chats, wherever they come from
NOT_COMPARED = {"environment", "validation", "request"}


@contextmanager
def failed_writing_explained(output_dir: Path) -> Iterator[None]:
    """While a run writes, say what is saved if that fails, as it does when the disk is full.

    safetensors and torch have errors of their own for it, some of which say no more than "iostream error".

    Raises:
        OSError: writing failed.
    """
    try:
        yield
    except (torch.OutOfMemoryError, FolderInUse, FileExistsError):  # not the disk
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not re.search(TORCH_S_WRITER, str(error)):
            raise
        saved, free = steps_saved(output_dir), shutil.disk_usage(output_dir).free
        kept = f"the last complete checkpoint is that of step {saved}" if saved else "no checkpoint is complete"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"output_dir={str(output_dir)!r} could not be written to; its disk has {free / 1e6:.0f} MB left ({reason[0]}). "
            f"Free some space, and resume the run: {kept}"
        ) from error


class WriteChecksums(TrainerCallback):
    """End each checkpoint with its checksums: the trainer calls this when all else is written.

    Of several processes the first writes them, when the others have written their random states.
    """

    def __init__(self, together: Together = ALONE) -> None:
        self.together = together

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint, launch = Path(args.output_dir, f"checkpoint-{state.global_step}"), self.together.launch
        self.together.wait()
        if launch.leads:
            with failed_writing_explained(Path(args.output_dir)):
                write_checksums(checkpoint, len(kwargs["optimizer"].state), launch.processes, launch.sharding)
        self.together.wait()


class CheckOptimizer(TrainerCallback):
    """Make sure that the optimizer has got from a checkpoint all that it had when that was written.

    With sharding, each process has the state of its own shards.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if written_by(self.checkpoint)[1]:
            return
        wanted, found = count_of_states(self.checkpoint), len(kwargs["optimizer"].state)
        if wanted is None and not found and args.optim != "sgd":  # of an older version of this package
            raise ValueError(
                f"{self.checkpoint} has no state of the optimizer: a run resumed from it would not be the same run. Delete this "
                "checkpoint to resume from the one before it"
            )
        if wanted is not None and found != wanted:
            raise ValueError(
                f"{self.checkpoint} was written with the optimizer's state of {wanted} tensors, and {found} were loaded. "
                "Resume with the versions of the libraries that the run was begun with"
            )


class SaveByTheClock(TrainerCallback):
    """Ask for a checkpoint at the end of a step when this many minutes have passed since the last one.

    Of several processes any one's clock decides for all.
    """

    def __init__(self, minutes: float, together: Together = ALONE) -> None:
        self.minutes, self.together = minutes, together

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.together.largest(time.monotonic() - self.last >= self.minutes * 60):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last = time.monotonic()


def _damaged(part: Path) -> bool:
    """Whether a part is missing or truncated: torch's files are zip archives, which have their index at the end."""
    if part.suffix == ".safetensors":
        try:
            return not shapes_in(part)  # checks the header against the file's length
        except (OSError, SafetensorError):  # a folder in its place is an OSError, too
            return True
    return not part.exists() or not zipfile.is_zipfile(part)


def last_whole_checkpoint(folder: str | Path, float16: bool = False, method: str = "qlora") -> Path | None:
    """The newest checkpoint in `folder` that was written to the end; None if there is none.

    Args:
        float16: the run scales its loss, so the scale must be there, too.
        method: of the run, as in its `Settings`.

    Raises:
        ValueError: that checkpoint is not as it was written. If it lacks its optimizer, scheduler or random state, the
            trainer would silently start that anew.
    """
    for path in complete_checkpoints(Path(folder)):
        if faults := faults_in(path, (WEIGHTS[method], *parts_of(path), *["scaler.pt"] * float16)):
            raise ValueError(
                f"{path} {'; '.join(faults)}: a run resumed from it would not be the same run. Delete this checkpoint to "
                "resume from the one before it"
            )
        return path
    return None


def parts_of(checkpoint: Path) -> tuple[str, ...]:
    """The files with which a run can be resumed from a checkpoint as it was, beside the weights.

    Each process has a random state of its own. FSDP's files are transformers' and accelerate's.
    """
    processes, sharding = written_by(checkpoint)
    optimizer, scheduler, random_state = PARTS
    states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else [random_state]
    return (*(SHARDED if sharding else (optimizer,)), scheduler, *states)


def faults_in(checkpoint: Path, parts: tuple[str, ...]) -> list[str]:
    """What is wrong with a checkpoint that was written to the end, each as "lacks optimizer.pt".

    Args:
        parts: the files without which it is of no use.
    """
    damaged = [part for part in parts if _damaged(checkpoint / part)]
    changed = changed_files(checkpoint) if written_whole(checkpoint) else []
    changed = [name for name in changed if name not in damaged]
    step = (trainer_state(checkpoint) or {}).get("global_step")
    faults = [f"lacks {', '.join(damaged)}"] if damaged else []
    if changed:
        faults.append(f"has files that are not as they were written ({', '.join(changed)})")
    elif step != step_of(checkpoint):
        faults.append(f"says in trainer_state.json that it is of step {step}")
    return faults


def logged(log_history: list[dict[str, Any]], name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of each entry in a trainer's log that has a value of this name."""
    return [(entry["step"], float(entry[name])) for entry in log_history if name in entry]


def log_history(checkpoint: Path) -> list[dict[str, Any]]:
    """The trainer's log up to a complete checkpoint."""
    return trainer_state(checkpoint)["log_history"]


def record_of(
    model: PreTrainedModel | PeftModel,
    chats: list[Chat],
    settings: Settings,
    hardware: Hardware,
    validation_chats: Sequence[Chat] = (),
) -> dict[str, Any]:
    """What defines a run: its settings, chats, base model and compute dtype; and the environment it was begun in.

    Two runs with the same record end alike, to the last bit.

    Args:
        chats: those that are trained on.
    """
    settings, of_validation = settings.for_rows(len(chats)), {}
    if validation_chats:
        of_validation = {
            "validation_chats": _digest(validation_chats),
            "eval_steps": settings.evaluation_interval(len(chats)),
        }
    config = getattr(model.config, "quantization_config", None)
    quantization = (
        f"{config.bnb_4bit_quant_type}, double_quant={config.bnb_4bit_use_double_quant}" if config else "none"
    )
    return {
        **{
            name: value
            for name, value in asdict(settings).items()
            if name not in NOT_RECORDED and not _left_out(name, value)
        },
        "chats": _digest(chats),
        **of_validation,
        "model": Path(model.config._name_or_path).name,
        "base": fingerprint_of(model),
        "quantization": quantization,
        "compute_dtype": str(hardware.compute_dtype),
        "environment": environment(hardware),
    }


def _left_out(name: str, value: object) -> bool:
    """Whether a record leaves a setting out: as older versions, which had none of these, unless it is used."""
    younger = (*SWITCHES, "checkpointed_layers", "memory_budget", "merge_aware")
    return name in younger and value == Settings.__dataclass_fields__[name].default


def _digest(chats: Sequence[Chat]) -> str:
    return hashlib.sha256(json.dumps(chats).encode()).hexdigest()[:16]


def where_to_start(folder: Path, record: dict[str, Any], resume: bool, float16: bool) -> Path | None:
    """The checkpoint to resume a run from, or None to begin at the start.

    Raises:
        FileExistsError: the folder already holds a run, and `resume` is not set.
        ValueError: the run is finished, is not the one that `record` describes, or its last checkpoint is damaged.
    """
    record = json.loads(json.dumps(record))  # as it is when it is read back
    begun, finished = folder / RECORD, folder / RESULT[record["method"]]
    if begun.exists() and finished.is_dir() and not any(finished.iterdir()):
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
        before = brought_up_to_date(read_json(begun))
    except ValueError as error:
        raise ValueError(f"{begun} is damaged, so it is unknown how the run was begun: name a new folder") from error
    _refuse_another_run(folder, before, record)
    return last_whole_checkpoint(folder, float16, record["method"])


def refuse_other_sharding(checkpoint: Path | None, settings: Settings) -> None:
    """Make sure that a run is resumed sharded if its checkpoint was written so, and only then.

    Raises:
        ValueError: it is not: the libraries write the optimizer's state in two forms, and each reads its own.
    """
    if checkpoint is None or (before := written_by(checkpoint)[1]) == settings.sharding:
        return
    how = "accelerate launch --config_file data/accelerate/fsdp.yaml -m qlora_helpers run --resume …"
    cure = f"resume it with {how}" if before else "resume it without a configuration of accelerate that shards"
    raise validation.refuse("sharding", settings.sharding, f"{checkpoint} was written with sharding={before!r}: {cure}")


def say_what_changes(folder: Path, checkpoint: Path | None, record: dict[str, Any]) -> None:
    """Before a run is resumed, remove the checkpoints that were not written to the end, and say so; say, too, if the
    environment is not the one that it was begun in.
    """
    _drop_cut_off(folder, checkpoint)
    before = (read_record(folder) or {}).get("environment")
    if not checkpoint or not isinstance(before, dict):
        return
    one = {"processes": 1}  # which is not recorded
    if changed := changes(one | before, one | record["environment"]):
        print(
            f"The run in {folder} was begun in another environment: {'; '.join(changed)}. It is resumed, but its last bits "
            "may differ from those of an uninterrupted run."
        )


def refuse_other_data(folder: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    """Make sure that a finished run is judged by the chats and the base that it had.

    Args:
        before: its record.
        record: of a run with those that are there now.

    Raises:
        ValueError: they are others.
    """
    names = ("chats", "validation_chats", "base")
    _refuse_another_run(folder, *({name: said[name] for name in names if name in said} for said in (before, record)))


def _refuse_another_run(folder: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    not_compared = NOT_COMPARED | ({"base"} - before.keys())  # older versions did not record it
    if before.get("base") and before.get("base") == record.get("base"):
        not_compared |= {"model"}  # the same weights, whatever their folder is called now
    one, other = (
        {
            name: None if said.get(name) is None else repr(said[name])
            for name in sorted((before.keys() | record.keys()) - not_compared)
        }
        for said in (before, record)
    )
    if differing := changes(one, other):
        cure = " (QLORA_GEAR chooses the dtype)" if before.get("compute_dtype") != record.get("compute_dtype") else ""
        raise ValueError(
            f"the run in {folder} was begun differently: {'; '.join(differing)}{cure}. Resume it as it was begun, or "
            "name a new folder"
        )


def _drop_cut_off(folder: Path, checkpoint: Path | None) -> None:
    """Remove the checkpoints that were not written to the end: the trainer would write into them."""
    complete = complete_checkpoints(folder)
    cut_off = [path for path in numbered_checkpoints(folder) if path not in complete]
    for path in cut_off:
        foreign = [inner.name for inner in path.iterdir() if inner.is_dir() or not OF_THE_TRAINER.match(inner.name)]
        if foreign or path.is_symlink():
            raise ValueError(
                f"{path} is no whole checkpoint, and holds {foreign[0] if foreign else 'a link'!r}, which the trainer has not "
                "written: move it elsewhere"
            )
    goes_on = f"from step {step_of(checkpoint)}" if checkpoint else "from the start"
    for path in cut_off:
        print(f"{path.name} was not written to its end, and is removed. The run goes on {goes_on}.")
        shutil.rmtree(path)


def check_tensors(model: PreTrainedModel | PeftModel, checkpoint: Path, method: str) -> None:
    """Make sure that a checkpoint has all tensors that a run trains, and no others.

    PEFT and transformers load what fits, and pass over the rest.

    Raises:
        ValueError: names a tensor that is missing, left over, or of another shape.
    """
    wanted, found = (
        model.state_dict() if method == "full" else get_peft_model_state_dict(model),
        shapes_in(checkpoint / WEIGHTS[method]),
    )
    stored = {value.data_ptr() for name, value in wanted.items() if name in found}  # tied weights are stored once
    shapes = {
        name: tuple(value.shape) for name, value in wanted.items() if name in found or value.data_ptr() not in stored
    }
    if fault := misfit(found, shapes):
        raise ValueError(
            f"{checkpoint / WEIGHTS[method]} {fault}. Resume with the versions of the libraries that the run was begun with"
        )


def load_weights(model: PreTrainedModel | PeftModel, checkpoint: Path, method: str) -> None:
    """Give a model the weights of a checkpoint, bit for bit: those that the run trains."""
    if method == "full":
        model.load_state_dict(load_file(checkpoint / WEIGHTS["full"]), strict=False)  # tied weights are stored once
    else:
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint)))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Begin a run by writing its record; a kill leaves the file complete or missing."""
    write_json(folder / RECORD, record)
