"""Load the shipped model, a folder or a model from the Hub, in 4 bits or unquantised."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import jinja2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_helpers import validation
from qlora_helpers.chats.templates import has_marks
from qlora_helpers.hardware import Hardware, detect, given_or_detected
from qlora_helpers.library_messages import without_short_bars
from qlora_helpers.models.attention import REPEATED_KV
from qlora_helpers.models.cpu_faults import make_safe_on_cpu
from qlora_helpers.models.fetched import FETCHABLE, NotFetched, fetched_folder
from qlora_helpers.models.fingerprint import KEPT, fingerprint
from qlora_helpers.models.folder_config import no_own_code, read_config, saved_in_4_bits
from qlora_helpers.models.hub import DEFAULT_MODEL, HubError, fetch
from qlora_helpers.models.in_4_bits import in_4_bits, planned_4_bits, refuse_unless_mostly
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.paths import data_path
from qlora_helpers.safe_folders import put_back

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "SHIPPED_MODEL",
    "default_model",
    "folder_of",
    "load_model",
    "load_or_shipped",
    "load_tokenizer",
    "name_in",
    "name_of",
]

SHIPPED_MODEL = "tiny-llama"


def folder_of(name: str, weights: bool = True) -> Path:
    """The local folder of a model; one from the Hub is fetched first.

    Args:
        name: "tiny-llama" (shipped), "smollm2-135m" (once fetched), a folder, or a model from the Hub (owner/model).
        weights: whether its weights are needed, too; without them, little is fetched.

    Raises:
        NotFetched: the model is one that `python -m qlora_helpers fetch` puts on this disk, and has not been fetched.
        HubError: a model from the Hub could not be fetched.
    """
    if name == SHIPPED_MODEL:
        return data_path(SHIPPED_MODEL)
    if name in FETCHABLE:
        return fetched_folder(name)
    folder = put_back(name)
    return folder if folder.is_dir() else fetch(name, weights=weights)


def default_model(hardware: Hardware | None = None) -> str:
    """The model that this machine's gear trains: the shipped one on a CPU, a 1.5B one from the Hub on a GPU.

    The environment variable QLORA_MODEL selects another: a model from the Hub, a folder, "tiny-llama", or
    one that `python -m qlora_helpers fetch` has put on this disk.
    """
    on_gpu = (hardware or detect()).device == "cuda"
    return os.environ.get("QLORA_MODEL", "").strip() or (DEFAULT_MODEL if on_gpu else SHIPPED_MODEL)


def load_tokenizer(name: str = SHIPPED_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with padding on the left, as generation needs it.

    Training on the answers alone needs to know which tokens are the assistant's. Few published chat templates mark them.
    TRL has marked versions of common ones: the one that renders the same text is used. Any other template stays as it is,
    and `qlora_helpers.chats.tokenized` finds the answers by comparison.

    Raises:
        HubError: a model from the Hub could not be fetched.
        NotFetched: it is one for `python -m qlora_helpers fetch`, and not on this disk.
        FileNotFoundError, ValueError: `name` is a folder without a tokenizer, and that of no model, or of an adapter; or
            the tokenizer needs code of its own.
    """
    folder = folder_of(name, weights=False)
    if not any((folder / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json")):
        read_config(folder, name)  # transformers would not say that the folder is no model's
    with no_own_code(name):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="left", local_files_only=True, trust_remote_code=False
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, of which transformers takes the one named default
        template = template.get("default")
    if template and not has_marks(template):
        from trl.chat_template_utils import get_training_chat_template  # only here: it takes seconds to import

        # it knows no marked version, or the template fails when TRL tries it with tools
        with suppress(ValueError, TypeError, jinja2.TemplateError):
            tokenizer.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    return tokenizer


def load_model(
    name: str = SHIPPED_MODEL,
    quantization: str | None = "nf4",
    double_quant: bool = True,
    hardware: Hardware | None = None,
) -> PreTrainedModel:
    """Load a causal language model onto this machine's device.

    Args:
        name: "tiny-llama" (shipped), "smollm2-135m" (once fetched), a folder, or a model from the Hub (owner/model).
        quantization: "nf4" or "fp4" for 4-bit linear layers through bitsandbytes, None to leave them as they are. A
            model that was saved in 4 bits stays as it was saved, with or without double quantisation.
        double_quant: store the scales of a 4-bit layer in 8 bits.
        hardware: what to load for; by default what `detect()` finds. All that is not in 4 bits is loaded in its compute
            dtype: float32 on a CPU, float16 on a T4, bfloat16 on newer GPUs. On a T4, attention repeats keys and values
            (see `qlora_helpers.models.attention`).

    Raises:
        HubError: a model from the Hub could not be fetched.
        NotFetched: it is one for `python -m qlora_helpers fetch`, and not on this disk.
        ValueError: an unknown `quantization`, or an argument of a wrong kind; most of the decoder would not be in 4 bits
            (see `qlora_helpers.models.in_4_bits`), which is found before the weights are fetched or read; the layers did
            not come as asked for; `name` is a folder that needs code of its own, is quantised in another way, or is that of
            an adapter; or, on a CPU, a layer has a shape that bitsandbytes decodes wrongly.
        FolderInUse: `name` is a folder that another process is just replacing.
    """
    if quantization is not None:
        validation.one_of("quantization", quantization, ("nf4", "fp4"), otherwise="None")
    double_quant = validation.switch("double_quant", double_quant)
    hardware = given_or_detected(hardware)
    folder, options = folder_of(name, weights=False), {}
    config = read_config(folder, name)
    saved = saved_in_4_bits(config, name)
    if saved and quantization not in (None, saved):
        raise validation.refuse(
            "quantization",
            quantization,
            f"{name!r} was saved in 4 bits as {saved}: pass quantization={saved!r}, or the model that it was made from",
        )
    if quantization:
        with no_own_code(name):
            described = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        dtype = str(hardware.compute_dtype).removeprefix("torch.")
        refuse_unless_mostly(planned_4_bits(described, quantization, double_quant, dtype, name), quantization)
    if quantization and not saved:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=hardware.compute_dtype,
        )
    folder = folder_of(name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with without_short_bars(size), no_own_code(name):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=hardware.compute_dtype,
            device_map={"": 0 if hardware.device == "cuda" else "cpu"},
            attn_implementation=REPEATED_KV if hardware.gear == "t4" else "sdpa",
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    setattr(model, KEPT, fingerprint(folder))
    if quantization or saved:
        _check_4_bits(model, name, quantization or saved, None if saved else double_quant)
    if quantization:  # None asks for what there is
        refuse_unless_mostly(in_4_bits(model, name), quantization)
    if (quantization or saved) and hardware.device == "cpu":
        make_safe_on_cpu(model)
    return model


def _check_4_bits(model: PreTrainedModel, name: str, quantization: str, double_quant: bool | None) -> None:
    """Hold the layers against what was asked for; transformers leaves some as they are by name, such as a tied head.

    Raises:
        ValueError: a layer is in another format, or there is no 4-bit layer at all.
    """
    skipped = model.hf_quantizer.modules_to_not_convert if getattr(model, "hf_quantizer", None) else []
    other = {}
    for layer_name, layer in linear_layers(model):
        is_4_bit = isinstance(layer, bnb.nn.Linear4bit) and layer.weight.quant_state is not None
        if is_4_bit:
            state = layer.weight.quant_state
            is_as_asked = state.quant_type == quantization and double_quant in (None, state.nested)
            kind = f"{state.quant_type}, {'with' if state.nested else 'without'} double quantisation"
        else:
            is_as_asked = not should_convert_module(layer_name, skipped)
            kind = f"{type(layer).__name__} in {layer.weight.dtype}"
        if not is_as_asked:
            other[layer_name] = kind
    if not other and not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()):
        other["every layer"] = "unquantised"
    if other:
        layer_name, kind = next(iter(other.items()))
        asked = "" if double_quant is None else f", {'with' if double_quant else 'without'} double quantisation"
        raise validation.refuse(
            "quantization",
            quantization,
            f"asks {name!r} for layers in {quantization}{asked}, but {layer_name} came as {kind} "
            f"(layers like it: {len(other)}): pass quantization=None, or a 16-bit model whose linear layers "
            "transformers can quantise",
        )


def name_of(model: PreTrainedModel | PeftModel) -> str:
    """The name of a loaded model, or of the base of its adapters: "owner/model", or the name of its folder."""
    return name_in(Path(model.config.name_or_path))


def name_in(folder: PurePath) -> str:
    """The name of the model in a folder."""
    if folder.name in ("", ".."):  # such as the working folder, "."
        folder = Path(folder).resolve()
    for part in folder.parts:  # the Hub's cache: models--owner--model/snapshots/commit
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def load_or_shipped(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load a model and its tokenizer; if it cannot be had, say why and load the shipped ones instead.

    Args:
        name, options: as in `load_model`.

    Returns:
        The model, its tokenizer, and the name of what was loaded.
    """
    try:
        tokenizer = load_tokenizer(name)
        model = load_model(name, **options)
    except (HubError, NotFetched) as error:
        print(f"{error}.\nThis lesson continues with the shipped model, {SHIPPED_MODEL}.")
        return load_model(SHIPPED_MODEL, **options), load_tokenizer(SHIPPED_MODEL), SHIPPED_MODEL
    local = name == SHIPPED_MODEL or name in FETCHABLE
    print(f"Loaded {name}" + ("" if local else f" at {folder_of(name).name}") + ".")
    return model, tokenizer, name
