"""What a run has trained, from its folder to a model that answers: the adapter on its base, or the whole model.

A run's folder, an adapter's and a model's are all taken. The base is found by itself where a file says which it is, and
is loaded as it was for training. Nothing is loaded before `load_tuned`, and `locate` needs no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.json_files import read_json_if_whole
from qlora_helpers.models.fetched import FETCHABLE, NotFetched, fetched_folder
from qlora_helpers.safe_folders import put_back
from qlora_helpers.training.run_folder import RESULT, complete_checkpoints, read_record
from qlora_helpers.validation import refuse

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_helpers.hardware import Hardware

__all__ = ["LATEST", "TunedFiles", "find_tuned", "is_adapter", "load_tuned", "locate"]

LATEST = Path("runs/latest")
REPORT = "report.json"  # of `python -m qlora_helpers run`; its "model" is the base as it was given
_ADAPTER, _MODEL = "adapter_config.json", "config.json"
_ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class TunedFiles:
    """Where what was trained is, and what it needs.

    Attributes:
        folder: of the adapter, or of the whole model.
        base: the adapter's base as `load_model` takes it; None if `folder` is a whole model.
        quantization: of the base: "nf4", "fp4", or None for an unquantised one.
        double_quant: whether the scales of the 4-bit base are in 8 bits.
        assumed: that no file says how the base was loaded for training, so that NF4 is a guess.
        merge_aware: whether its last steps were trained with the weights of a merge into 4 bits, as far as files say.
    """

    folder: Path
    base: str | None
    quantization: str | None
    double_quant: bool = True
    assumed: bool = False
    merge_aware: bool = False

    def __str__(self) -> str:
        if self.base is None:
            return f"the model in {self.folder}"
        guessed = "; a guess, since no file says how it was trained" if self.assumed else ""
        aware = "; trained for a merge into 4 bits: beside its base it answers otherwise" if self.merge_aware else ""
        how = f"in 4 bits ({self.quantization}{guessed}{aware})" if self.quantization else "unquantised"
        return f"the adapter in {self.folder} on {self.base}, {how}"


def is_adapter(folder: Path) -> bool:
    """Whether a folder that `locate` has found is an adapter's, and not that of a whole model."""
    return (folder / _ADAPTER).is_file()


def locate(folder: str | Path = LATEST) -> Path:
    """The folder of the adapter or of the whole model: `folder` itself, or the result of the run in it.

    Args:
        folder: of a run, an adapter or a model; or the name of a model that can be fetched (`qlora_helpers.models.fetched`).

    Raises:
        NotFetched: that model is not on this disk.
        FileNotFoundError: there is no such folder, or none of these in it; or the run in it is not finished.
        NotADirectoryError: `folder` is a file.
    """
    folder = put_back(folder)
    if str(folder) in FETCHABLE and not folder.exists():
        return fetched_folder(str(folder))
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: name the folder of a run, of an adapter or of a model")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: make a run with  python -m qlora_helpers run  or name the folder of a run, of an "
            "adapter or of a model"
        )
    record = read_record(folder)
    results = [RESULT[record["method"]]] if record else sorted(set(RESULT.values()))
    for place in (folder, *(put_back(folder / result) for result in results)):
        if (place / _ADAPTER).is_file() or (place / _MODEL).is_file():
            return place
    if record:
        saved = complete_checkpoints(folder)
        other = f", or name its last checkpoint, {saved[0]}" if saved else ""
        raise FileNotFoundError(
            f"the run in {folder} is not finished: continue it with  python -m qlora_helpers run --resume --output {folder}"
            f"{other}"
        )
    raise FileNotFoundError(
        f"{folder} holds no adapter, no model and no run: make a run with  python -m qlora_helpers run  or name another "
        "folder"
    )


def find_tuned(folder: str | Path = LATEST, model: str | None = None) -> TunedFiles:
    """Find what was trained, its base, and how that is loaded; loads nothing.

    Args:
        folder: of a run, an adapter or a model.
        model: the base: a folder, a model from the Hub, or "tiny-llama". By default it is what the run's report names,
            else what the adapter's config does.

    Raises:
        FileNotFoundError, NotADirectoryError: as `locate` does.
        ValueError: no file says where the base is, or it is no longer there; `model` is given for a whole model; or a file
            of the adapter is damaged.
    """
    found = locate(folder)
    if not is_adapter(found):
        if model is not None:
            raise refuse("model", model, f"{found} is a whole model, which needs no base: leave it out")
        return TunedFiles(found, base=None, quantization=None)
    run = found if read_record(found) else found.parent
    record = read_record(run)
    base = model if model is not None else _base_of(found, run if record else None)
    if record is None:
        return TunedFiles(found, base, "nf4", assumed=True)
    default = "none" if record["method"] == "lora" else "nf4"
    kind, _, scales = record.get("quantization", default).partition(", ")
    merge_aware = record.get("merge_aware") is not None
    return TunedFiles(
        found, base, None if kind == "none" else kind, scales != "double_quant=False", merge_aware=merge_aware
    )


def _base_of(adapter: Path, run: Path | None) -> str:
    """The base of an adapter, from the report of its run or from its own files."""
    from qlora_helpers.adapters.files import describe, read_adapter_config

    described = describe(adapter).base
    reported = (read_json_if_whole(run / REPORT) or {}).get("model") if run else None
    written = read_adapter_config(adapter)["base_model_name_or_path"]  # plain PEFT writes a path of its machine
    for name in (reported, written, described):
        if isinstance(name, str) and _can_be_loaded(name):
            return name
    raise ValueError(
        f"the adapter in {adapter} was trained on {reported or written!r}, which is not on this machine: say where its base "
        "is, as the model (--model FOLDER, or its name on the Hub)"
    )


def _can_be_loaded(name: str) -> bool:
    from qlora_helpers.models.loading import SHIPPED_MODEL

    return name == SHIPPED_MODEL or name in FETCHABLE or Path(name).is_dir() or bool(_ON_THE_HUB.fullmatch(name))


def load_tuned(
    folder: str | Path = LATEST, model: str | None = None, hardware: Hardware | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, TunedFiles]:
    """Load what a run has trained: the adapter on its base, or the whole model.

    The base of an adapter is quantised as it was for training. The tokenizer is the one saved with the weights, if there
    is one, else the base's.

    Args:
        folder, model: as in `find_tuned`.
        hardware: what to load for; by default what `detect()` finds.

    Returns:
        The model, in evaluation mode, its tokenizer, and what was found.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `find_tuned`, `load_model` and `load_adapter` do; or a whole
            model has no tokenizer in its folder.
        WrongBase: the adapter was trained on another base.
        HubError: the base could not be fetched from the Hub.
        NotFetched: the base is a model that can be fetched, and is not on this disk.
    """
    from qlora_helpers.adapters.files import load_adapter
    from qlora_helpers.models.hub import HubError
    from qlora_helpers.models.loading import load_model, load_tokenizer

    found = find_tuned(folder, model)
    has_tokenizer = any((found.folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if found.base is None:
        if not has_tokenizer:
            raise FileNotFoundError(f"{found.folder} has no tokenizer.json: copy the tokenizer of its base into it")
        tokenizer = load_tokenizer(str(found.folder))
        return load_model(str(found.folder), quantization=None, hardware=hardware).eval(), tokenizer, found
    try:
        tokenizer = load_tokenizer(str(found.folder) if has_tokenizer else found.base)
        base = load_model(found.base, found.quantization, found.double_quant, hardware)
    except (HubError, NotFetched) as error:
        raise type(error)(
            f"{error}. It is the base of the adapter in {found.folder}; if you have it in a folder, name that as the model "
            "(--model FOLDER)"
        ) from error
    return load_adapter(base, found.folder), tokenizer, found
