"""The shape of a model, from its config: its layers, and how many parameters each of them has.

Names and counts are those of transformers. `tests/memory/test_shape.py` checks them against models on the "meta"
device, and the trainable parameters against PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers import validation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "Linear", "ModelShape", "config_and_name", "is_named"]


def is_named(name: str, target: str) -> bool:
    """Whether PEFT takes a module's name for a target: all of it, or its last parts."""
    return name == target or name.endswith(f".{target}")


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer: its name in transformers, its input and output sizes, and whether it has a bias."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


# What GPT-J's config calls these fields.
_GPTJ_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}

# transformers' default for each field that a config leaves out (configuration_*.py of 5.17 and 5.23).
# None: it follows from other fields.
_LLAMA = {
    "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_DEFAULTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14_336, "num_key_value_heads": 8, "sliding_window": 4_096},
    "qwen2": _LLAMA | {"vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32},
    "qwen3": _LLAMA | {
        "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32, "head_dim": 128,
    },
    "gemma2": _LLAMA | {
        "vocab_size": 256_000, "hidden_size": 2_304, "intermediate_size": 9_216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True,
    },
    "phi3": _LLAMA | {"vocab_size": 32_064, "hidden_size": 3_072, "intermediate_size": 8_192},
    "gpt_neox": _LLAMA | {
        "vocab_size": 50_432, "hidden_size": 6_144, "intermediate_size": 24_576, "num_hidden_layers": 44,
        "num_attention_heads": 64, "attention_bias": True, "use_parallel_residual": True, "rotary_pct": 0.25,
    },
    "gptj": _LLAMA | {
        "vocab_size": 50_400, "hidden_size": 4_096, "intermediate_size": None, "num_hidden_layers": 28,
        "num_attention_heads": 16, "rotary_dim": 64,
    },
}  # fmt: skip
FAMILIES = tuple(_DEFAULTS)
_EAGER_ONLY = ("gemma2", "gptj")  # transformers offers no sdpa for these families
# the fields that a config has under the same name
_IN_CONFIGS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "max_position_embeddings",
)  # fmt: skip
NULL_MEANS_SOMETHING = ("num_key_value_heads", "rotary_dim", "sliding_window")


@dataclass(frozen=True)
class ModelShape:
    """What a decoder model is made of. Make one with `ModelShape.from_config`; sizes count elements.

    `max_position_embeddings` is None if the config does not state it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int | None = None
    rotary_dim: int = 0  # elements of a head that are rotated; 0 for the whole head
    use_parallel_residual: bool = False
    sliding_window: int | None = None  # how many tokens attention looks back; a sequence that long needs a mask
    name: str = field(default="", compare=False)
    assumed: tuple[str, ...] = field(default=(), compare=False)  # what was assumed to find it by its name

    @classmethod
    def from_config(cls, config: dict | PretrainedConfig | str | Path) -> ModelShape:
        """The shape of a model, from its config.

        Args:
            config: a dict as in a `config.json`, a transformers `PretrainedConfig`, the path of a `config.json`, or the
                path of a model's folder. Missing fields take transformers' defaults; `model_type` must be there.

        Raises:
            ValueError: the file is not JSON, the family is not known here, or a field has no sense; the message names it.
            FileNotFoundError: there is no such file.
        """
        try:
            return cls._of(*config_and_name(config))
        except RecursionError:  # while the file is read, or a value is shown
            what = f"config: {config}" if isinstance(config, str | Path) else "config"
            raise ValueError(f"{what} is nested too deeply: give the config.json of a model") from None

    @classmethod
    def _of(cls, config: dict, name: str) -> ModelShape:
        family = config.get("model_type")
        if not isinstance(family, str) or family not in _DEFAULTS:
            raise validation.refuse(
                "model_type",
                family,
                f"known families are {', '.join(FAMILIES)}. The layers of any other would be a guess",
            )
        fields_of = _Fields(family, config)
        sizes = fields_of.sizes()
        _complete_heads(fields_of, sizes)
        sizes["rotary_dim"] = fields_of.rotary_dim(sizes)
        stated = config.get("_name_or_path")
        return cls(
            model_type=family,
            tie_word_embeddings=fields_of.switch("tie_word_embeddings"),
            attention_bias=fields_of.switch("attention_bias") or family == "qwen2",
            mlp_bias=fields_of.switch("mlp_bias") or family in ("gpt_neox", "gptj"),
            use_parallel_residual=fields_of.switch("use_parallel_residual") or family == "gptj",
            name=name or (stated if isinstance(stated, str) else ""),
            **sizes,
        )

    def as_config(self) -> dict:
        """The shape as a transformers config: the fields of a `config.json` that decide it."""
        config = {key: getattr(self, key) for key in _IN_CONFIGS if getattr(self, key) is not None}
        if self.model_type == "gpt_neox":
            share = self.rotary_dim / self.head_dim
            config |= {"rotary_pct": share, "use_parallel_residual": self.use_parallel_residual}
        elif self.model_type == "gptj":
            config = {_GPTJ_NAMES.get(key, key): value for key, value in config.items()}
            config |= {"rotary_dim": self.rotary_dim or None, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
        else:
            config |= {"head_dim": self.head_dim, "num_key_value_heads": self.num_key_value_heads}
            if self.sliding_window is not None:
                config |= {"sliding_window": self.sliding_window, "use_sliding_window": True}
            elif self.model_type in ("mistral", "phi3"):
                config |= {"sliding_window": None}
        return config

    @property
    def eager_only(self) -> bool:
        """Whether transformers has no `scaled_dot_product_attention` for it."""
        return self.model_type in _EAGER_ONLY

    @property
    def four_bit_layers(self) -> int:
        """How many layers are in 4 bits once the model is loaded so."""
        return self.num_hidden_layers * len(self.linears)

    def linear_names(self) -> tuple[str, ...]:
        """The last part of the name of each linear layer of a decoder layer, in the order they run."""
        return tuple(linear.name.rpartition(".")[2] for linear in self.linears)

    @property
    def query_width(self) -> int:
        """Elements of one token's queries, over all heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Elements of one token's keys, over all heads; its values have the same number."""
        return self.num_key_value_heads * self.head_dim

    @property
    def has_layer_norm(self) -> bool:
        """Whether the norms are LayerNorm, with a weight and a bias. The other families have RMSNorm."""
        return self.model_type in ("gpt_neox", "gptj")

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer, in the order they run: what QLoRA stores in 4 bits."""
        h, i, q, kv = self.hidden_size, self.intermediate_size, self.query_width, self.key_value_width
        if self.model_type == "gpt_neox":
            bias = self.attention_bias
            return (
                Linear("attention.query_key_value", h, 3 * h, bias),
                Linear("attention.dense", h, h, bias),
                Linear("mlp.dense_h_to_4h", h, i, True),
                Linear("mlp.dense_4h_to_h", i, h, True),
            )
        if self.model_type == "gptj":
            attention = tuple(Linear(f"attn.{name}", h, h) for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
            return (*attention, Linear("mlp.fc_in", h, i, True), Linear("mlp.fc_out", i, h, True))
        if self.model_type == "phi3":
            return (
                Linear("self_attn.qkv_proj", h, q + 2 * kv),
                Linear("self_attn.o_proj", q, h),
                Linear("mlp.gate_up_proj", h, 2 * i),
                Linear("mlp.down_proj", i, h),
            )
        # Mistral has no biases, whatever its config says. Qwen2 always has them on q, k and v, and never on o.
        bias = self.attention_bias and self.model_type != "mistral"
        mlp_bias = self.mlp_bias and self.model_type == "llama"
        return (
            Linear("self_attn.q_proj", h, q, bias),
            Linear("self_attn.k_proj", h, kv, bias),
            Linear("self_attn.v_proj", h, kv, bias),
            Linear("self_attn.o_proj", q, h, bias and self.model_type != "qwen2"),
            Linear("mlp.gate_proj", h, i, mlp_bias),
            Linear("mlp.up_proj", h, i, mlp_bias),
            Linear("mlp.down_proj", i, h, mlp_bias),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers, without biases: what QLoRA stores in 4 bits."""
        return self.num_hidden_layers * sum(linear.weights for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """The token embeddings, and the output head unless it shares them."""
        head_bias = self.vocab_size if self.model_type == "gptj" else 0
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + head_bias

    @property
    def small_parameters(self) -> int:
        """Parameters of norms and biases."""
        h = self.hidden_size
        per_layer = sum(linear.out_features for linear in self.linears if linear.bias)
        last = h
        if self.has_layer_norm:  # a weight and a bias each; GPT-J has one norm per layer, GPT-NeoX two
            per_layer += 2 * h * (1 if self.model_type == "gptj" else 2)
            last = 2 * h
        else:
            per_layer += h * (4 if self.model_type == "gemma2" else 2)
            if self.model_type == "qwen3":
                per_layer += 2 * self.head_dim  # norms of queries and keys
        return self.num_hidden_layers * per_layer + last

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest tensor in the model's files."""
        return max(self.vocab_size * self.hidden_size, *(linear.weights for linear in self.linears))

    @property
    def buffer_bytes(self) -> int:
        """Tables that are not parameters: GPT-J keeps float32 sines for every position in every layer."""
        if self.model_type != "gptj":
            return 0
        positions = self.max_position_embeddings or 2_048
        return self.num_hidden_layers * positions * (self.rotary_dim or self.hidden_size) * 4

    @property
    def parameters(self) -> int:
        """All parameters, as transformers' `num_parameters()` counts them."""
        return self.linear_parameters + self.embedding_parameters + self.small_parameters

    def targets(self, target_modules: str | Collection[str]) -> tuple[Linear, ...]:
        """The linear layers of a decoder layer that PEFT adapts for `target_modules`.

        Args:
            target_modules: "all-linear", or a list of names such as ["q_proj", "v_proj"], matched as in PEFT: the whole
                name or its last parts.

        Raises:
            ValueError: a plain string other than "all-linear", or a name that no layer has. PEFT would pass over it.
        """
        if target_modules == "all-linear":
            return self.linears
        if isinstance(target_modules, str) or not all(isinstance(name, str) for name in target_modules or ()):
            raise validation.refuse("target_modules", target_modules, 'must be "all-linear", or a list of names')
        names = [linear.name for linear in self.linears]
        if unknown := [
            target for target in target_modules or [""] if not any(is_named(name, target) for name in names)
        ]:
            known = ", ".join(self.linear_names())
            cure = f"none of them is in {self.model_type}, which has {known}"
            if len(unknown) < len(target_modules):
                cure = f"{self.model_type} has no {' and no '.join(map(repr, unknown))}, but {known}"
            raise validation.refuse("target_modules", list(target_modules), cure)
        return tuple(linear for linear in self.linears if any(is_named(linear.name, name) for name in target_modules))

    def lora_parameters(self, rank: int, target_modules: str | Collection[str] = "all-linear") -> int:
        """Trainable parameters of LoRA: rank * (in + out) for each adapted layer."""
        sides = sum(linear.in_features + linear.out_features for linear in self.targets(target_modules))
        return self.num_hidden_layers * rank * sides


# ---- Reading a config

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rotary_dim", "sliding_window",
)  # fmt: skip


def config_and_name(config: dict | PretrainedConfig | str | Path) -> tuple[dict, str]:
    """A config in any form that `ModelShape.from_config` takes, as a dict; and the name of its folder if it has one."""
    name = ""
    if isinstance(config, str | Path):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"config: there is no file {path}; give a config.json or a folder that has one")
        try:
            name, config = path.resolve().parent.name, json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # not UTF-8, or not JSON
            raise ValueError(f"config: {path} is not JSON ({error}): give the config.json of a model") from error
        except RecursionError:
            raise ValueError(f"config: {path} is nested too deeply: give the config.json of a model") from None
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, dict):
        where = f" in {name}" if name else ""
        raise ValueError(f"config{where} is a {type(config).__name__}; give a dict, a PretrainedConfig or a path")
    return config, name


class _Fields:
    """The fields of a family's config under our names, with transformers' defaults for those that are missing."""

    def __init__(self, family: str, config: dict):
        self.family, self.config = family, config
        self.names = _GPTJ_NAMES if family == "gptj" else {}

    def __getitem__(self, key: str):
        for stated in (self.names.get(key, key), key):
            # null means the default, except in three fields: as many as attention heads; the whole head; no window
            if self.config.get(stated) is not None or (stated in self.config and key in NULL_MEANS_SOMETHING):
                return self.config[stated]
        return _DEFAULTS[self.family].get(key)

    def stated(self, key: str) -> str:
        """The name that the config itself has for a field, for messages."""
        ours = self.names.get(key, key)
        return key if self.config.get(ours) is None and self.config.get(key) is not None else ours

    def size(self, key: str) -> int | None:
        value = self[key]
        return None if value is None else validation.whole(self.stated(key), value)

    def switch(self, key: str) -> bool:
        value = self[key]
        return False if value is None else validation.switch(key, value)

    def sizes(self) -> dict[str, int | None]:
        """All sizes, each a positive whole number, or None if the family has none or it follows from others."""
        unused = {"rotary_dim"} if self.family != "gptj" else set()
        if self.family in ("gpt_neox", "gptj"):
            unused |= {"num_key_value_heads", "head_dim"}  # these two have neither
        asks_for_windows = self.family in ("qwen2", "qwen3") and self.switch("use_sliding_window")
        if not (self.family in ("mistral", "phi3") or asks_for_windows):
            unused.add("sliding_window")
        sizes = {key: None if key in unused else self.size(key) for key in _SIZES}
        if sizes["intermediate_size"] is None:
            sizes["intermediate_size"] = 4 * sizes["hidden_size"]  # GPT-J's default
        if sizes["num_key_value_heads"] is None:
            sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        return sizes

    def rotary_dim(self, sizes: dict) -> int:
        """Elements of a head that are rotated; 0 for the whole head."""
        if self.family != "gpt_neox":
            rotated = sizes["rotary_dim"] or 0
            if rotated > sizes["head_dim"]:
                raise validation.refuse("rotary_dim", rotated, f"must be no more than a head has, {sizes['head_dim']}")
            return rotated
        name, share = "rotary_pct", self["rotary_pct"]
        for key in ("rope_parameters", "rope_scaling"):  # the later goes before, as in transformers
            nested = self.config.get(key)
            if nested is not None and not isinstance(nested, dict):
                raise validation.refuse(key, nested, "must be an object, or null")
            if nested and nested.get("partial_rotary_factor") is not None:
                name, share = f"{key}.partial_rotary_factor", nested["partial_rotary_factor"]
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise validation.refuse(name, share, "must be a number above 0 and up to 1")
        return int(sizes["head_dim"] * share)


def _complete_heads(fields_of: _Fields, sizes: dict) -> None:
    """Fill in the head size where it follows from other fields, and check that the heads divide evenly."""
    hidden, heads, key_heads = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
    name_of_heads = fields_of.stated("num_attention_heads")
    if sizes["head_dim"] is None:
        if hidden % heads:
            cure = f"must be a multiple of {name_of_heads}={heads}, since the config states no head_dim"
            raise validation.refuse(fields_of.stated("hidden_size"), hidden, cure)
        sizes["head_dim"] = hidden // heads
    if heads % key_heads:
        raise validation.refuse(name_of_heads, heads, f"must be a multiple of num_key_value_heads={key_heads}")
