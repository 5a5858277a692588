"""What of a model is really in 4 bits, part by part, and why the rest is not.

"Loaded in 4 bits" is a request, not a result: bitsandbytes quantises the layers that are an `nn.Linear`, and leaves everything
else in 16 bits without a word. transformers 5 keeps the experts of a mixture as one parameter of three dimensions, so of
such a model almost nothing comes in 4 bits. `in_4_bits` looks at a model; `planned_4_bits` answers from a config alone,
before anything is downloaded or loaded.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_helpers import validation
from qlora_helpers.memory.loaded import constant_sizes
from qlora_helpers.memory.saved_format import quantization_entry, saved_format
from qlora_helpers.models.four_bit_rule import replace_layers
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import constant_bytes
from qlora_helpers.settings import DTYPES
from qlora_helpers.units import KIB, MIB, in_words

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["KINDS", "MATRICES", "MOSTLY", "FourBits", "Part", "in_4_bits", "planned_4_bits", "refuse_unless_mostly"]

MATRICES = ("attention", "mlp", "experts", "router", "other matrices")  # of the decoder: what QLoRA means to quantise
KINDS = (
    *MATRICES,
    "embeddings",
    "output head",
    "norms and biases",
    "vision tower",
    "outside the decoder",
    "adapters",
    "buffers",
)
MOSTLY = 0.5  # of the bytes of the decoder's matrices; one in 16 bits weighs as much as four in 4 bits
WIDTH = 100  # characters


@dataclass(frozen=True)
class Part:
    """One kind of a model's parameters.

    Attributes:
        kind: one of `KINDS`. "experts" are those that a router chooses among; one that every token passes through is "mlp".
        parameters: how many it has.
        bytes_in_4_bits: of its 4-bit weights, with their scales and codebooks.
        other_bytes: of the rest, by dtype.
        bytes_if_in_4_bits: what it would take if all its matrices were in 4 bits; as it is, for what QLoRA leaves as it is.
        reasons: bytes that are not in 4 bits, by the reason.
    """

    kind: str
    parameters: int
    bytes_in_4_bits: int
    other_bytes: dict[str, int]
    bytes_if_in_4_bits: int
    reasons: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return self.bytes_in_4_bits + sum(self.other_bytes.values())


@dataclass(frozen=True)
class FourBits:
    """What of a model is in 4 bits; printed, a table of at most 100 characters a line.

    Attributes:
        name: of the model; "" if it has none.
        parts: one for each kind that it has, in the order of `KINDS`.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """All parameters; one that two layers share counts once."""
        return sum(part.parameters for part in self.parts)

    @property
    def total_bytes(self) -> int:
        return sum(part.total_bytes for part in self.parts)

    @property
    def bytes_in_4_bits(self) -> int:
        """Bytes of the 4-bit weights, with their scales and codebooks."""
        return sum(part.bytes_in_4_bits for part in self.parts)

    @property
    def bytes_if_in_4_bits(self) -> int:
        """What the model would take if every matrix of its decoder were in 4 bits: the size that its name promises."""
        return sum(part.bytes_if_in_4_bits for part in self.parts)

    @property
    def share(self) -> float:
        """The share of the bytes of the decoder's matrices that is in 4 bits, from 0 to 1."""
        matrices = [part for part in self.parts if part.kind in MATRICES]
        total = sum(part.total_bytes for part in matrices)
        return sum(part.bytes_in_4_bits for part in matrices) / total if total else 0.0

    @property
    def is_mostly_4_bit(self) -> bool:
        """Whether at least half of the bytes of the decoder's matrices are in 4 bits."""
        return self.share >= MOSTLY

    @property
    def largest_in_full(self) -> tuple[str, str, int]:
        """Of the decoder's matrices that are not in 4 bits, those that take most: their kind, the reason, their bytes."""
        return max(
            (
                (part.kind, why, size)
                for part in self.parts
                if part.kind in MATRICES
                for why, size in part.reasons.items()
            ),
            key=lambda found: found[2],
            default=("", "", 0),
        )

    def __str__(self) -> str:
        name = self.name or "the model"
        lines = [
            _wrapped(f"{name}: {_percent(self.share)} of the bytes of its decoder's matrices are in 4 bits"),
            "",
            f"{'part':19}{'parameters':>15}{'in 4 bits':>12}{'not':>12}  why not",
        ]
        for part in self.parts:
            lines += _row(part.kind, part.parameters, part.bytes_in_4_bits, part.other_bytes, _reasons(part))
        other = Counter()
        for part in self.parts:
            other.update(part.other_bytes)
        lines += _row("all", self.parameters, self.bytes_in_4_bits, other, "")
        lines += [
            "",
            f"{'all that it takes':46}{_amount(self.total_bytes):>12}",
            f"{'with every matrix of its decoder in 4 bits':46}{_amount(self.bytes_if_in_4_bits):>12}",
        ]
        return "\n".join(lines)


def _row(kind: str, parameters: int, in_4_bits: int, other: dict[str, int], why: str) -> list[str]:
    size = sum(other.values())
    start = f"{kind:19}{parameters:15,}{_amount(in_4_bits):>12}{_amount(size):>12}"
    return textwrap.wrap(why, WIDTH, initial_indent=f"{start}  ", subsequent_indent=" " * 60) or [start]


def _amount(size: int) -> str:
    """Bytes in words; small ones in KiB, so that they do not read 0.0."""
    if 0 < size < MIB:
        return f"{size / KIB:.1f} KiB"
    return in_words(size) if size else "-"


def _reasons(part: Part) -> str:
    """Why a part is not in 4 bits, the largest reason first, and in which dtypes it is instead."""
    if not part.reasons:
        return ""
    least = sum(part.reasons.values()) / 10  # what is less than that explains nothing
    said = "; ".join(why for why, size in sorted(part.reasons.items(), key=lambda found: -found[1]) if size >= least)
    return f"{' and '.join(part.other_bytes)}: {said}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


# ---- A model


def in_4_bits(model: PreTrainedModel | PeftModel, name: str = "") -> FourBits:
    """What of a model is in 4 bits.

    Args:
        model: loaded, or on the "meta" device; with adapters of PEFT or without.
        name: for the report; by default that in the model's config.
    """
    base, adapters = _without_adapters(model)
    places = _Places(base, adapters)
    tally: dict[str, _Tally] = {kind: _Tally() for kind in KINDS}
    for path, module, parameter in _parameters(base):
        kind = places.kind(path, module, parameter)
        entry, count, packed = tally[kind], *_size(parameter)
        entry.parameters += count
        if packed is not None:
            entry.in_4_bits += packed
            entry.if_in_4_bits += packed
            continue
        dtype = str(parameter.dtype).removeprefix("torch.")
        entry.other[dtype] += parameter.nbytes
        entry.reasons[places.reason(path, module, parameter, kind)] += parameter.nbytes
        in_full = kind not in MATRICES or path.endswith("bias")
        entry.if_in_4_bits += parameter.nbytes if in_full else _packed(count, double_quant=True)
    for buffer in base.buffers():
        entry = tally["buffers"]
        entry.other[str(buffer.dtype).removeprefix("torch.")] += buffer.nbytes
        entry.if_in_4_bits += buffer.nbytes
    parts = tuple(entry.part(kind) for kind, entry in tally.items() if entry.in_4_bits or entry.other)
    return FourBits(name or getattr(base.config, "name_or_path", "") or "", parts)


class _Tally:
    """A part while it is counted."""

    def __init__(self) -> None:
        self.parameters = self.in_4_bits = self.if_in_4_bits = 0
        self.other, self.reasons = Counter(), Counter()

    def part(self, kind: str) -> Part:
        return Part(kind, self.parameters, self.in_4_bits, dict(self.other), self.if_in_4_bits, dict(self.reasons))


def _without_adapters(model: torch.nn.Module) -> tuple[PreTrainedModel, set[int]]:
    """The model inside a PEFT model, and the ids of the parameters that PEFT added to it."""
    if "peft" not in sys.modules:  # then it can have added nothing, and need not be imported, which takes a second
        return model, set()
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    added, own = set(), set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            inner = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner = module.original_module
        else:
            continue
        added |= {id(parameter) for parameter in module.parameters()}
        own |= {id(parameter) for parameter in inner.parameters()}
    return base, added - own


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """Every parameter once: its path in the model, without the levels that PEFT puts between, and its module."""
    seen = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                own = [part for part in path.split(".") if part not in ("base_layer", "original_module")]
                yield ".".join([*own, name]).removeprefix("."), module, parameter


def _size(parameter: torch.nn.Parameter) -> tuple[int, int | None]:
    """How many parameters a tensor holds, and its bytes in 4 bits with constants; None if it is not in 4 bits."""
    if not isinstance(parameter, bnb.nn.Params4bit):
        return parameter.numel(), None
    if (state := parameter.quant_state) is not None:
        return math.prod(state.shape), parameter.nbytes + constant_bytes(state)
    count = parameter.numel()  # no values yet, so not packed
    return count, _packed(count, parameter.compress_statistics, parameter.blocksize)


def _packed(weights: int, double_quant: bool, block_size: int = 64) -> int:
    return -(-weights // 2) + sum(constant_sizes(weights, double_quant, block_size))


# ---- Where a parameter is, and why it is not in 4 bits

_ROUTER = re.compile(r"router|^gate$|_gate$|^wg$")
_EXPERTS = re.compile(r"^(?!shared).*experts?$")
_HAS_EXPERTS = re.compile(r"^(?!.*Shared).*Experts")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_forward|shared_expert|^fc\d|^fc_|_h_to_")
_VISION = re.compile(r"vision|visual|image|multi_modal|mm_|projector|audio")


class _Places:
    """The kind of each parameter of a model, and why it is not in 4 bits."""

    def __init__(self, model: PreTrainedModel, adapters: set[int]):
        self.adapters = adapters
        self.inputs, self.outputs = (_of(model, method) for method in ("get_input_embeddings", "get_output_embeddings"))
        self.decoder = _of(model, "get_decoder") or {id(parameter) for parameter in model.parameters()}
        quantizer = getattr(model, "hf_quantizer", None)
        self.skipped = getattr(quantizer, "modules_to_not_convert", None) or []
        asked = getattr(quantizer, "quantization_config", None)
        self.named = list(getattr(asked, "llm_int8_skip_modules", None) or [])
        self.is_quantised = any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) or bool(quantizer)

    def kind(self, path: str, module: torch.nn.Module, parameter: torch.nn.Parameter) -> str:
        of, levels = id(parameter), path.lower().split(".")
        if of in self.adapters:
            return "adapters"
        if of in self.inputs or (isinstance(module, torch.nn.Embedding) and of in self.decoder):
            return "embeddings"
        if of in self.outputs:
            return "output head"
        if of not in self.decoder:
            return "vision tower" if any(map(_VISION.search, levels)) else "outside the decoder"
        if parameter.ndim < 2:
            return "norms and biases"
        for kind, pattern in (("router", _ROUTER), ("experts", _EXPERTS), ("attention", _ATTENTION), ("mlp", _MLP)):
            # in this order: mlp.gate is a router, mlp.experts are experts
            if any(map(pattern.search, levels[:-1])) or (
                kind == "experts" and _HAS_EXPERTS.search(type(module).__name__)
            ):
                return kind
        return "other matrices"

    def reason(self, path: str, module: torch.nn.Module, parameter: torch.nn.Parameter, kind: str) -> str:
        layer, what = path.rpartition(".")[0], type(module).__name__
        if kind == "adapters":
            return "trained"
        if isinstance(module, torch.nn.Embedding):
            tied = id(parameter) in self.outputs
            return "a table, no nn.Linear" + (", and the output head, too" if tied else "")
        if parameter.ndim < 2:
            return "vectors"
        if not (type(module) is torch.nn.Linear or isinstance(module, Conv1D)):
            if isinstance(module, torch.nn.Linear):
                return f"{what}, a subclass of nn.Linear"
            if parameter.ndim > 2 and not type(module).__module__.startswith("torch."):
                return f"one parameter of {parameter.ndim} dimensions, no nn.Linear"
            return f"{what} is no nn.Linear"
        if not self.is_quantised:
            return "not loaded in 4 bits"
        if not should_convert_module(layer, self.named):
            return "named in llm_int8_skip_modules"
        if kind == "output head":
            return "left as it is by transformers"
        if not should_convert_module(layer, self.skipped):
            return "left as it is by transformers, by its name"
        return "not loaded in 4 bits"


def _of(model: PreTrainedModel, method: str) -> set[int]:
    """The ids of the parameters of a part of the model that transformers knows by a method; none if it has none."""
    find = getattr(model, method, None)
    try:
        part = find() if find else None
    except (NotImplementedError, AttributeError):  # transformers' answer for a model without such a part
        part = None
    return {id(parameter) for parameter in part.parameters()} if part is not None else set()


# ---- From a config alone


def planned_4_bits(
    config: dict[str, Any] | PretrainedConfig,
    quantization: str = "nf4",
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    name: str = "",
) -> FourBits:
    """What of a model will be in 4 bits once it is loaded with `load_in_4bit=True`: its layers without their values.

    A model that bitsandbytes saved in 4 bits comes as it was saved. Of one that is quantised in another way this is the answer
    for the 16-bit model that it was made from.

    Args:
        config: as in a `config.json`, or one of transformers.
        quantization, double_quant: as in `qlora_helpers.models.loading.load_model`.
        compute_dtype: of what is not in 4 bits: "bfloat16", "float16" or "float32". transformers keeps some parts of some
            models in float32 all the same.
        name: for the report.

    Raises:
        ValueError: an argument of a wrong kind, or a family that transformers does not know.
    """
    validation.one_of("quantization", quantization, ("nf4", "fp4"))
    double_quant = validation.switch("double_quant", double_quant)
    dtype = getattr(torch, validation.one_of("compute_dtype", compute_dtype, DTYPES))
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    whole = config if isinstance(config, dict) else config.to_dict()
    found = saved_format(whole)
    if saved := found is not None and found.is_loaded_here:
        asked = BitsAndBytesConfig.from_dict(quantization_entry(whole))
    model = meta_model(config, dtype)
    replace_layers(model, asked, dtype, pre_quantized=saved)
    stay = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]  # transformers' own list
    for path, parameter in model.named_parameters():
        if not isinstance(parameter, bnb.nn.Params4bit) and any(re.search(pattern, path) for pattern in stay):
            parameter.data = parameter.data.to(torch.float32)
    return in_4_bits(model, name)


# ---- Refused


def refuse_unless_mostly(found: FourBits, quantization: str) -> None:
    """Refuse a model that is called one in 4 bits and mostly is not.

    Args:
        found: of the model, or of its config.
        quantization: what was asked for.

    Raises:
        ValueError: less than half of the bytes of the decoder's matrices are in 4 bits.
    """
    if found.is_mostly_4_bit:
        return
    kind, why, size = found.largest_in_full
    in_full = sum(sum(part.other_bytes.values()) for part in found.parts)
    other = "a dense model (one without experts)" if kind == "experts" else "another model"
    raise validation.refuse(
        "quantization",
        quantization,
        f"of {found.name or 'this model'}, only {_percent(found.share)} of the bytes of the decoder's matrices come in 4 bits, "
        f"since bitsandbytes quantises nn.Linear alone. Not so: {kind}, {_amount(size)} ({why}). Loaded like this, it takes "
        f"{_amount(found.total_bytes)}, {_amount(in_full)} of it not in 4 bits, and not the "
        f"{_amount(found.bytes_if_in_4_bits)} that it would with every matrix in 4 bits. Pass {other}; or "
        "quantization=None, which loads it without quantisation",
    )
