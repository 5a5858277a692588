"""A folder loaded as anyone else would load it: by transformers alone, with none of this package's care."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers.hardware import Hardware, given_or_detected
from qlora_helpers.library_messages import without_short_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["let_go", "loaded_plainly"]


def loaded_plainly(
    folder: str | Path, hardware: Hardware | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer by `from_pretrained`.

    Args:
        folder: of a whole model.
        hardware: by default what `detect()` finds; the weights are loaded in its compute dtype, onto its device.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError, OSError: transformers cannot load it; the words are transformers' own.
    """
    folder, hardware = Path(folder), given_or_detected(hardware)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name the folder of a merged model")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with without_short_bars(size):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=hardware.compute_dtype,
            device_map={"": 0 if hardware.device == "cuda" else "cpu"},
            local_files_only=True,
            trust_remote_code=False,
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return model.eval(), tokenizer


def let_go() -> None:
    """Give back the memory of models that nothing holds any more, also on a GPU, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
