"""The fields that decide a model's size, that its config leaves out, and that transformers fills in without a word."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from qlora_helpers import validation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["assumed_fields", "assumed_in_words", "decides_size"]

# Names of the fields of transformers' configuration classes on which the number of parameters depends. Not those that only
# decide what is computed with them, such as num_experts_per_tok, and not switches of biases, which weigh next to nothing.
_SIZE = re.compile(
    r"""
      vocab_size\w* | type_vocab_size | \w*hidden_size\w* | \w*intermediate_size\w* | intermediate_multiple_size | \w*ffn_dim
    | ffn_hidden_size | d_model | d_ff | dff | dim_ff | n_embd | n_inner | word_embed_proj_dim | embedding_size
    | num_hidden_layers | num_layers | n_layers? | num_kv_shared_layers | num_dense_layers | first_k_dense_replace
    | (?:moe_layer|attn_layer|expert_layer|decoder_sparse|interleave_moe_layer)_(?:period|offset|step)
    | moe_layer_(?:start_index|end_index|interval) | layer_group_size | block_multiple_of
    | \w*num_\w*heads | (?:index_)?n_heads? | \w*head_dim | dim_head | kv_channels
    | (?:moe_)?num_(?:local_|shared_)?experts | n_(?:routed|shared)_experts
    | \w*_rank | \w*lru_width | conv1d_width | mamba_(?:d|n)_\w+ | mamba_expand | (?:ssm_)?state_size | expand | n_groups | o_groups
    | conv_kernel | conv_L_cache | \w*conv_kernel_(?:size|dim) | linear_\w+_dim | altup_num_inputs | hc_mult
    | image_size | patch_size | num_channels
    """,
    re.VERBOSE,
)
_POSITIONS = ("max_position_embeddings", "n_positions")
_WITH_A_TABLE_OF_POSITIONS = (
    "biogpt",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "openai-gpt",
    "opt",
)  # one that is trained


def decides_size(field: str, model_type: str = "") -> bool:
    """Whether the number of a model's parameters depends on a field of its config.

    Args:
        field: its name in the configuration class.
        model_type: of the config; in a few families, the longest sequence has a table of its own.
    """
    if field in _POSITIONS:
        return model_type in _WITH_A_TABLE_OF_POSITIONS
    return field == "tie_word_embeddings" or bool(_SIZE.fullmatch(field))


def assumed_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that decide a model's size and that its config leaves out, with the values that transformers takes instead.

    A field whose default is null is not among them: it follows from others, as the size of a head from the hidden size and the
    number of heads. Nor is `tie_word_embeddings` where the family ties by default: such configs are published without it. In a
    part of a config (`text_config`), transformers 4 itself left out what equals its default, so that such fields count only
    if the config was not written by transformers, which states its version in the whole.

    Args:
        config: as in a `config.json`, with its `model_type`.

    Returns:
        The value of each, by its name; of a part, the name is "text_config.vocab_size". Of a part that is left out altogether,
        the value is "all defaults".

    Raises:
        ValueError: no `model_type`, or one that transformers does not know.
    """
    family = config.get("model_type")
    kind = _class_of(family)
    if kind is None:
        raise validation.refuse(
            "model_type", family, "transformers knows no such model: give the config.json of a model"
        )
    found = _assumed(config, kind)
    for name, part_class in kind.sub_configs.items():
        part = config.get(name)
        if not isinstance(part, dict):
            if name == "text_config":
                found[name] = "all defaults"
        elif not config.get("transformers_version"):
            own = _class_of(part.get("model_type")) or part_class
            found |= {f"{name}.{field}": value for field, value in _assumed(part, own).items()}
    return found


def assumed_in_words(config: dict[str, Any]) -> str:
    """The same as a sentence; "" if nothing is assumed."""
    fields = ", ".join(f"{name}={value}" for name, value in assumed_fields(config).items())
    return f"assumed, since its config leaves them out: {fields}. Sizes are right only if these are" if fields else ""


def _class_of(model_type: Any) -> type[PretrainedConfig] | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # only here: it takes seconds

    return CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None


def _assumed(config: dict[str, Any], kind: type[PretrainedConfig]) -> dict[str, Any]:
    aliases = kind.attribute_map  # one name may stand for another, in either direction
    stated = {name for key in config for name in (key, aliases.get(key))} | {
        name for name in aliases if aliases[name] in config
    }
    found = {}
    for field in dataclasses.fields(kind):
        value = field.default
        is_assumed = isinstance(value, int | float) and value is not True
        if is_assumed and field.name not in stated and decides_size(field.name, kind.model_type):
            found[field.name] = value
    return found
