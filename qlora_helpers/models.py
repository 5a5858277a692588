"""Load the shipped model or one from the Hub, in 4 bit or unquantised, and look at what was loaded.

On a CPU this module keeps two silent faults of bitsandbytes 0.50 away (both are shown in `tests/test_bitsandbytes_faults.py`):

A. With AVX512-BF16, the first forward pass in evaluation repacks every 4-bit weight in place. Training after that
   computes wrong gradients. `load_model` switches the repacking off.
B. With AVX512, dequantisation is wrong where the last dimension is no multiple of the block size but of 16.
   `load_model` refuses such shapes.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from qlora_helpers.attention import REPEATED_KV
from qlora_helpers.files import data_path, whole_folder
from qlora_helpers.hardware import Hardware, detect
from qlora_helpers.hub import DEFAULT_MODEL, HubError, fetch
from qlora_helpers.quantize import Codebook, dequantize, quantize
from qlora_helpers.quiet import quieten

quieten()  # before bitsandbytes is imported

import bitsandbytes as bnb
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

SHIPPED_MODEL = "tiny-llama"
SMALL = 10**8  # bytes
BLOCK_SIZE = 64  # values that share a scale in a 4-bit layer; transformers has no option for another


def _folder(name: str) -> Path:
    """Where a model lies on this disk; one of the Hub is fetched first."""
    if name == SHIPPED_MODEL:
        return data_path(SHIPPED_MODEL)
    return Path(name) if Path(name).is_dir() else fetch(name)


def default_model(hardware: Hardware | None = None) -> str:
    """The model that this machine's gear trains: the shipped one on a CPU, one of 1.5B from the Hub on a GPU.

    The environment variable QLORA_MODEL names another: a model of the Hub, a folder, or "tiny-llama".
    """
    on_gpu = (hardware or detect()).device == "cuda"
    return os.environ.get("QLORA_MODEL", "").strip() or (DEFAULT_MODEL if on_gpu else SHIPPED_MODEL)


def load_tokenizer(name: str = SHIPPED_MODEL):
    """The tokenizer of a model, padding on the left as generation needs it.

    Its chat template marks what the assistant says, which training on the answers alone needs. Most published templates
    do not; TRL has marked versions of the common ones, and the one that renders the same text is taken.

    Raises:
        HubError: a model of the Hub could not be fetched.
        ValueError: the template has no marks, and TRL knows no marked version of it.
    """
    tokenizer = AutoTokenizer.from_pretrained(_folder(name), padding_side="left", local_files_only=True)
    if "generation %}" not in (tokenizer.chat_template or "").replace("-%}", " %}"):
        from trl.chat_template_utils import get_training_chat_template  # only here: it takes seconds to import

        tokenizer.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    return tokenizer


def load_model(
    name: str = SHIPPED_MODEL,
    quantization: str | None = "nf4",
    double_quant: bool = True,
    hardware: Hardware | None = None,
):
    """Load a causal language model onto this machine's device.

    Args:
        name: "tiny-llama" (shipped), a folder, or a model of the Hub (owner/model).
        quantization: "nf4" or "fp4" for 4-bit linear layers through bitsandbytes, None to leave them as they are. A model
            that was saved in 4 bits stays as it was saved.
        double_quant: store the scales of a 4-bit layer in 8 bits.
        hardware: what to load for; by default what `detect()` finds. Whatever is not 4-bit is loaded in its compute
            dtype: float32 on a CPU, float16 on a T4, bfloat16 on newer GPUs. On a T4 attention repeats keys and values
            (see `qlora_helpers.attention`).

    Raises:
        HubError: a model of the Hub could not be fetched.
        ValueError: unknown `quantization`; or, on a CPU, a layer whose shape bitsandbytes decodes wrongly.
    """
    if quantization not in ("nf4", "fp4", None):
        raise ValueError(f"quantization={quantization!r}: choose 'nf4', 'fp4' or None")
    hardware = hardware or detect()
    folder, options = _folder(name), {}
    saved_in_4_bits = "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantization and not saved_in_4_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=hardware.compute_dtype,
        )
    bars = transformers_logging.is_progress_bar_enabled()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size < SMALL:  # loaded in less than a second: no bar
        transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=hardware.compute_dtype,
            device_map={"": 0 if hardware.device == "cuda" else "cpu"},
            attn_implementation=REPEATED_KV if hardware.gear == "t4" else "sdpa",
            local_files_only=True,
            **options,
        )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if (quantization or saved_in_4_bits) and hardware.device == "cpu":
        make_safe_on_cpu(model)
    return model


def name_of(model: torch.nn.Module) -> str:
    """The name of a loaded model or of the base below its adapters: "owner/model", or its folder's own name."""
    return name_in(Path(model.config.name_or_path))


def name_in(folder: Path) -> str:
    """The name of the model that lies in a folder."""
    for part in folder.parts:  # the Hub's cache: models--owner--model/snapshots/commit
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def save_model(model, tokenizer, folder: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Save a whole model with its tokenizer as safetensors, which plain transformers loads.

    Args:
        folder: appears in whole or not at all; one that is there is kept.
        dtype: of the saved weights; by default as they are. A 4-bit model keeps its 4-bit weights.
        overwrite: replace a folder that is there. It stays until the new one is whole.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        ValueError: adapters are still attached, which would be saved in their place; or `dtype` for a 4-bit model.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "model has adapters attached: merge them first, or save them with qlora_helpers.adapters.save_adapter"
        )
    quantised = getattr(model, "is_quantized", False)
    if dtype is not None and quantised:
        raise ValueError(f"dtype={dtype}: the model is 4-bit. Dequantise it first, or leave dtype out")
    with whole_folder(folder, overwrite) as part:
        if dtype is None:
            model.save_pretrained(part)
        else:
            model.save_pretrained(
                part, state_dict={name: value.to(dtype) for name, value in model.state_dict().items()}
            )
            # transformers writes down the dtype of the model in memory, by which the files would be loaded again
            config = json.loads((part / "config.json").read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(part)
    return Path(folder)


def load_or_shipped(name: str, **options):
    """Load a model and its tokenizer; if the Hub is the trouble, say so in one line and load the shipped ones instead.

    Args:
        name, options: of `load_model`.

    Returns:
        The model, its tokenizer, and the name of what was loaded.
    """
    try:
        tokenizer = load_tokenizer(name)
        model = load_model(name, **options)
    except HubError as error:
        print(f"{error}.\nThis lesson goes on with the shipped model, {SHIPPED_MODEL}.")
        return load_model(SHIPPED_MODEL, **options), load_tokenizer(SHIPPED_MODEL), SHIPPED_MODEL
    print(f"Loaded {name}" + ("" if name == SHIPPED_MODEL else f" at {_folder(name).name}") + ".")
    return model, tokenizer, name


def make_safe_on_cpu(model: torch.nn.Module) -> None:
    """Switch fault A off in every 4-bit layer, and refuse shapes that meet fault B (see the module's docstring).

    Raises:
        ValueError: a layer's in_features is no multiple of its block size.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            block_size = layer.weight.quant_state.blocksize if layer.weight.quant_state else BLOCK_SIZE
            if layer.in_features % block_size:
                raise ValueError(
                    f"{name} has in_features={layer.in_features}, no multiple of the block size {block_size}: bitsandbytes "
                    "decodes such a layer wrongly on a CPU with AVX512. Use a GPU, or quantization=None"
                )


def linear_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The linear layers of the decoder, by name: all that QLoRA quantises, so without the output head."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head") and "lora_" not in name:
            yield name, module


def bytes_by_part(model: torch.nn.Module) -> dict[str, int]:
    """Bytes that a loaded model holds, by what they are for; parameters shared by two modules count once."""
    parts = dict.fromkeys(
        ("4-bit weights", "quantisation constants", "linear weights", "embeddings", "output head", "norms", "adapters"),
        0,
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            part = "adapters"
        elif isinstance(parameter, bnb.nn.Params4bit):
            part = "4-bit weights"
            parts["quantisation constants"] += _constant_bytes(parameter.quant_state)
        elif "embed" in name:
            part = "embeddings"
        elif "lm_head" in name:
            part = "output head"
        elif "norm" in name:
            part = "norms"
        else:
            part = "linear weights"
        parts[part] += parameter.nbytes
    return {part: count for part, count in parts.items() if count}


def _constant_bytes(state) -> int:
    """Scales, second-level scales, codebooks and offset of one bitsandbytes weight."""
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


@torch.no_grad()
def quantize_dequantize(model, codebook: Codebook, block_size: int = 64, double_quant: bool = False) -> None:
    """Round every linear weight of an unquantised model to a format and back, in place.

    This shows what a format costs in quality, also for formats that bitsandbytes does not have (INT4, INT3). It saves
    no memory.
    """
    for _, layer in linear_layers(model):
        weight = layer.weight.detach().cpu()
        layer.weight.copy_(dequantize(quantize(weight, codebook, block_size, double_quant)))


@torch.no_grad()
def shuffle_linear_weights(model, seed: int = 0) -> None:
    """Permute the values within every linear weight, in place: same distribution, no knowledge. A control."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in linear_layers(model):
        order = torch.randperm(layer.weight.numel(), generator=generator).to(layer.weight.device)
        layer.weight.copy_(layer.weight.flatten()[order].view_as(layer.weight))
