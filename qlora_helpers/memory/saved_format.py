"""A config that says its model is quantised already: how, what of it is not, and whether LoRA can be trained on it.

What is said of each method is from the installed libraries, transformers' `quantizers` and PEFT's dispatch of layers;
`tests/memory/test_saved_format.py` holds it against them.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

__all__ = ["SavedFormat", "quantization_entry", "saved_format"]


@dataclass(frozen=True)
class _Method:
    """What is known of a method.

    Attributes:
        label: its name in the field.
        trainable: whether transformers trains adapters on it; None if that depends on what is not in the config.
        packages: what loading it and adapting its layers need, with the least version, besides the course's own.
        stays: the entry's key for the modules that are not quantised.
        dequantise: the config with which transformers loads it in 16 bits instead; "" if there is none.
        note: what else to know.
    """

    label: str
    trainable: bool | None
    packages: tuple[str, ...] = ()
    stays: tuple[str, ...] = ("modules_to_not_convert",)
    dequantise: str = ""
    note: str = ""


_GPTQMODEL = ("gptqmodel>=7.0.0", "optimum>=1.24.0")  # PEFT 0.21, import_utils.is_gptqmodel_available
_METHODS = {
    "bitsandbytes_4bit": _Method("bitsandbytes 4 bits", True, stays=("llm_int8_skip_modules",)),
    "bitsandbytes_8bit": _Method("bitsandbytes 8 bits", True, stays=("llm_int8_skip_modules",)),
    "awq": _Method("AWQ", True, _GPTQMODEL),
    "gptq": _Method("GPTQ", True, _GPTQMODEL, note="modules_in_block_to_quantize, if it is there, names what is quantised"),
    "fp8": _Method(
        "FP8 by blocks", True, stays=("modules_to_not_convert", "ignored_layers"),
        dequantise="FineGrainedFP8Config(dequantize=True)",
        note="its backward pass dequantises each weight, and needs kernels for FP8",
    ),
    "mxfp8": _Method(
        "MXFP8", True, stays=("modules_to_not_convert", "ignored_layers"),
        dequantise="FineGrainedFP8Config(dequantize=True)",
        note="its backward pass dequantises each weight, and needs kernels for FP8",
    ),
    "fbgemm_fp8": _Method("FP8 of FBGEMM", False, ("fbgemm-gpu-genai",)),
    "compressed-tensors": _Method(
        "compressed-tensors", None, ("compressed-tensors>=0.15.0",), stays=("ignore",),
        dequantise="CompressedTensorsConfig(dequantize=True)",
        note="trainable but for transformers' FP8 kernel, which is for inference",
    ),
    "mxfp4": _Method(
        "MXFP4", False, dequantise="Mxfp4Config(dequantize=True)",
        note="without its kernels transformers dequantises it to 16 bits by itself",
    ),
    "nvfp4": _Method("NVFP4", False),
    "hqq": _Method("HQQ", True, ("hqq>=0.2.1",), stays=("skip_modules",)),
    "eetq": _Method("EETQ", True, ("eetq",)),
    "aqlm": _Method("AQLM", True, ("aqlm>=1.0.2",), stays=("linear_weights_not_to_quantize",)),
    "quanto": _Method("Quanto", True, ("optimum-quanto",), note="PEFT has no adapter layer of its own for it"),
    "torchao": _Method("torchao", None, ("torchao>=0.16.0",), note="transformers trains on its 8-bit types alone"),
    "auto-round": _Method("AutoRound", False, ("auto-round>=0.5.0",)),
    "gguf": _Method("GGUF", False, ("gguf>=0.10.0",), dequantise="GgufConfig(dequantize=True)"),
    "higgs": _Method("HIGGS", False),
    "quark": _Method("Quark", False),
    "spqr": _Method("SpQR", False),
    "metal": _Method("Metal", False, dequantise="MetalConfig(dequantize=True)"),
    "gemma": _Method("Gemma's own", False),
}  # fmt: skip


@dataclass(frozen=True)
class SavedFormat:
    """How a model is quantised, as its config says.

    Attributes:
        method: as the config names it; "" if it names none.
        label: the name of the method in the field.
        bits: of a weight, if the config or the method says so.
        stays: the modules that the config names as not quantised; None if it leaves that to the library, which keeps the
            output head and what is tied to it.
        dequantise: how transformers loads it in 16 bits instead; "" if there is no such way.
        trainable: whether LoRA can be trained on it with what is installed; None if that is not known from the config.
        missing: packages that this takes and that are not installed in the version needed.
        is_loaded_here: whether `load_model` takes it.
        note: what else to know.
    """

    method: str
    label: str
    bits: int | None
    stays: tuple[str, ...] | None
    dequantise: str
    trainable: bool | None
    missing: tuple[str, ...]
    is_loaded_here: bool
    note: str

    def __str__(self) -> str:
        said = [
            f"saved in {self.label}"
            + (f", {self.bits} bits a weight" if self.bits and "bits" not in self.label else "")
        ]
        if self.stays:
            shown = ", ".join(self.stays[:4]) + (f" and {len(self.stays) - 4} more" if len(self.stays) > 4 else "")
            said.append(f"not quantised: {shown}")
        if self.trainable is None:
            said.append("whether LoRA can be trained on it is not known here")
        elif self.trainable:
            said.append("LoRA can be trained on it")
        elif self.missing:
            said.append(f"LoRA on it needs {' and '.join(self.missing)}")
        else:
            said.append("LoRA cannot be trained on it")
        if self.dequantise:
            said.append(f"transformers loads it in 16 bits with quantization_config={self.dequantise}")
        if self.note:
            said.append(self.note)
        if not self.is_loaded_here:
            said.append("not loaded here: only bitsandbytes' 4 bits are")
        return "; ".join(said)


def quantization_entry(config: dict[str, Any]) -> Any:
    """The config's `quantization_config`, from the whole or its `text_config`; None if neither has one, or it is null."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if (entry := part.get("quantization_config")) is not None:
            return entry
    return None


def saved_format(config: dict[str, Any]) -> SavedFormat | None:
    """How the model of a config is quantised; None if it is not.

    Args:
        config: as in a `config.json`.
    """
    entry = quantization_entry(config)
    if entry is None:
        return None
    if not isinstance(entry, dict):
        return SavedFormat(
            "", repr(entry), None, None, "", None, (), False, "the entry is no object, so it says nothing"
        )
    name = entry.get("quant_method")
    name = name if isinstance(name, str) else ""
    key = _key(entry, name)
    method = _METHODS.get(key)
    if method is None:
        note = "transformers passes over a method that it does not know" if name else "the entry names no quant_method"
        return SavedFormat(
            name, repr(name or "a way that is not named"), _bits(entry, ""), None, "", None, (), False, note
        )
    missing = tuple(package for package in method.packages if not _is_there(package))
    return SavedFormat(
        method=name or "bitsandbytes",
        label=method.label,
        bits=_bits(entry, key),
        stays=_stays(entry, method.stays),
        dequantise=method.dequantise,
        trainable=False if missing else method.trainable,
        missing=missing,
        is_loaded_here=key == "bitsandbytes_4bit",
        note=method.note,
    )


def _key(entry: dict[str, Any], name: str) -> str:
    """The method under transformers' name for it, which has one for each width of bitsandbytes."""
    if name in ("", "bitsandbytes"):
        for width in ("4bit", "8bit"):
            if entry.get(f"load_in_{width}") is True:
                return f"bitsandbytes_{width}"
    return name


_BITS = {"bitsandbytes_4bit": 4, "bitsandbytes_8bit": 8, "fp8": 8, "mxfp8": 8, "fbgemm_fp8": 8, "mxfp4": 4, "nvfp4": 4}


def _bits(entry: dict[str, Any], key: str) -> int | None:
    if key in _BITS:
        return _BITS[key]
    stated = entry.get("bits", entry.get("w_bit", entry.get("nbits")))
    groups = entry.get("config_groups")  # compressed-tensors
    if stated is None and isinstance(groups, dict):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        widths = {weight.get("num_bits") for weight in weights if isinstance(weight, dict)}
        stated = widths.pop() if len(widths) == 1 else None
    return stated if isinstance(stated, int) and not isinstance(stated, bool) else None


def _stays(entry: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, ...] | None:
    for key in keys:
        if isinstance(named := entry.get(key), list):
            return tuple(map(str, named))
    return None


def _is_there(package: str) -> bool:
    name, _, least = package.partition(">=")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    from packaging.version import Version

    return not least or Version(found) >= Version(least)
