"""Merge an adapter into its base, in the three ways in common use.

A QLoRA adapter is trained on top of the *dequantised* 4-bit weights. It can be added to three bases:

- "4bit": each weight is dequantised, the difference added, and the sum rounded to 4 bits again (PEFT's merge_and_unload);
- "dequantised": the 4-bit weights are dequantised once, and the sum is kept in 16 bits: exactly what the run trained;
- "16bit": the original weights, which the run never saw; the sum differs by the quantisation error.

By default it is what was trained that is merged (`way_of_merging`): only then does the result answer as the model that the
run has scored. Whatever merges without being told how asks that function.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from qlora_helpers import validation
from qlora_helpers.adapters.files import describe, load_adapter, read_adapter_config
from qlora_helpers.adapters.lora_options import IN_MEMORY, check_options
from qlora_helpers.hardware import Hardware
from qlora_helpers.models.fingerprint import KEPT
from qlora_helpers.models.folder_config import read_config, saved_in_4_bits
from qlora_helpers.models.loading import SHIPPED_MODEL, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_helpers.adapters.tuned import TunedFiles

__all__ = ["BASES", "load_base", "merge", "merge_into", "way_of_merging"]

BASES = ("4bit", "dequantised", "16bit")

# PEFT warns at each layer that rounding may change generations; `adapters.drift` measures how much.
_ROUNDING = "Merge lora module to 4-bit linear"


def way_of_merging(tuned: TunedFiles, base: str | Path, into: str | None = None) -> tuple[str, str]:
    """The way of merging an adapter, and the reason for it.

    Args:
        tuned: the adapter and how its base was loaded for training.
        base: the folder of its base.
        into: one of `BASES`; by default what was trained: "4bit" after merge-aware steps, else "dequantised" if the run
            trained on a 4-bit base, "16bit" if on an unquantised one.

    Raises:
        ValueError: `into` is none of them, or the adapter cannot be merged in this way.
    """
    packed = saved_in_4_bits(read_config(base, str(base), argument="base"), str(base), argument="base")
    if into is not None:
        validation.one_of("into", into, BASES)
    if into == "16bit" and packed:
        raise validation.refuse(
            "into",
            into,
            f"the base, {tuned.base}, was saved in 4 bits ({packed}): choose dequantised, or name the 16-bit model (--base)",
        )
    if into == "dequantised" and tuned.quantization is None:
        raise validation.refuse(
            "into", into, f"the run trained on the unquantised base, {tuned.base}: 16bit is what was trained"
        )
    reasons = {
        "16bit": "the adapter is added to the original 16-bit weights, rounded once",
        "dequantised": "the adapter is added to the decoded 4-bit weights, and kept in 16 bits: what was trained",
        "4bit": "the adapter is added to the 4-bit weights, which are rounded to 4 bits again: small changes are lost",
    }
    if tuned.merge_aware:
        reasons = {way: f"{why}; the run's last steps were trained for 4bit instead" for way, why in reasons.items()}
        reasons["4bit"] = "the run's last steps were trained with the weights that this merge gives: what was trained"
        into = into or "4bit"
    if into is not None:
        return into, reasons[into]
    if tuned.quantization is None:
        return "16bit", "the run trained on the unquantised base, so this is what was trained"
    return "dequantised", (
        "the run trained on the decoded 4-bit weights, so this is what was trained, in 16 bits (--into 16bit would add it to "
        "the original weights, whose answers may be better or worse)"
    )


def load_base(into: str, name: str = SHIPPED_MODEL, hardware: Hardware | None = None) -> PreTrainedModel:
    """Load one of the three bases; see the module's docstring.

    Raises:
        ValueError: `into` is not one of them, or is "16bit" and the model was saved in 4 bits.
    """
    validation.one_of("into", into, BASES)
    model = load_model(name, quantization=None if into == "16bit" else "nf4", hardware=hardware)
    if into == "16bit" and getattr(model, "is_quantized", False):
        raise validation.refuse(
            "into", into, f"{name!r} was saved in 4 bits: name the 16-bit model, or choose another way"
        )
    return model.dequantize() if into == "dequantised" else model


def merge(
    adapter: str | Path, into: str, name: str = SHIPPED_MODEL, hardware: Hardware | None = None
) -> PreTrainedModel:
    """Load a base, add an adapter to its weights, and return the plain model.

    Args:
        adapter: its folder.
        into: "4bit", "dequantised" or "16bit".
        name: of the base, as `load_model` takes it.

    Raises:
        ValueError: `into` is not one of the three; the adapter belongs to another base (`adapters.files.WrongBase`); or it
            has an option with which a merge is not the live model (see `merge_into`).
    """
    validation.one_of("into", into, BASES)
    describe(adapter)  # names a folder that holds none
    check_options(
        f"adapter={str(adapter)!r}", read_adapter_config(adapter), IN_MEMORY
    )  # PEFT drops those it does not know
    return merge_into(load_adapter(load_base(into, name, hardware), adapter))


def merge_into(model: PeftModel) -> PreTrainedModel:
    """Add the active adapters of a PEFT model to the base weights, and return the plain model.

    Raises:
        ValueError: the model has no active LoRA adapter; or PEFT's merge would not give the live model: an option such as
            layer_replication, or LoRA on an embedding that is the output head, too.
    """
    _check_mergeable(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ROUNDING)
        merged = model.merge_and_unload().eval()
    setattr(merged, KEPT, None)  # its weights are no longer those of its files
    return merged


def _check_mergeable(model: PeftModel) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__} without adapters: load one with load_adapter first")
    for name, config in sorted(model.peft_config.items()):
        check_options(f"model's adapter {name!r}", config.to_dict(), IN_MEMORY)
    status = model.get_model_status()
    if status.enabled is not True or status.active_adapters in ([], "irregular"):
        raise ValueError(
            "model has no adapter that is active in every layer: call model.set_adapter with one of "
            f"{', '.join(sorted(model.peft_config))}, outside of disable_adapter()"
        )
    base = model.get_base_model()
    if base.config.get_text_config().tie_word_embeddings:
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            if any(isinstance(part, LoraLayer) for part in layer.modules()):
                raise ValueError(
                    "model has LoRA on an embedding that is its output head, too (target_modules, tie_word_embeddings): "
                    "a merge would change both. Keep the adapter beside its base, with load_adapter"
                )
