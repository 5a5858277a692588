"""A small config of every architecture that transformers has a language model of.

It is derived from the defaults of the configuration class: few layers, but each kind of them more than once, a small
vocabulary, few experts and short windows. Widths stay as they are: tensors without values cost nothing.
"""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_helpers.memory.any_shape import AnyShape

LAYERS, VOCABULARY, WINDOW = 6, 1_024, 32
TOKENS = 64

_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
_OTHER_LAYERS = ("encoder_layers", "num_encoder_layers", "depth", "conf_num_hidden_layers", "num_global_layers")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_WINDOWS = (
    "sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention",
    "attention_chunk_size",
)  # fmt: skip
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")

# What the rules above leave without sense: a field that counts layers in another way, a pattern longer than six layers.
# Or what the library's defaults leave out that its model needs.
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
}
_CHANGED: dict[str, dict] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"layers": 10, "num_kv_shared_layers": 5},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "jamba": {"layers": 16},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers": 24},
}
# PEFT refuses the state space's own projections, which its kernels read; and it cannot adapt layers that return two tensors,
# or that are many small ones in one.
_NOT_ADAPTED = ("conv1d", "o_a_proj", "out_proj", "router")
_NOT_ALL_LINEAR = (
    "deepseek_v4",
    "falcon_h1",
    "falcon_mamba",
    "llama4",
    "llama4_text",
    "mamba",
    "mamba2",
    "nemotron_h",
    "phimoe",
)
# TRL's tiled head looks for the number of experts, for their choices, or for the decoder's output, where these models have others.
_NO_TILED_HEAD = (
    "deepseek_v4", "doge", "electra", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "llama4",
    "llama4_text", "mllama", "phimoe", "rembert",
)  # fmt: skip
# Those whose code reads a weight by itself, or changes it, which in 4 bits is packed; with a part of the libraries' reason.
CANNOT_IN_4_BITS: dict[str, str] = {
    "falcon_mamba": "expected scalar type",
    "gemma3n_text": "can't be cast because it is not safe",
}
# Those that cannot run at all, with a part of the libraries' reason.
CANNOT: dict[str, str] = {
    "blt": "is invalid for input of size",
    "gemma3n": "requires the timm library",
    "gemma4_assistant": "set of layer types producing a cache",
    "gemma4_unified_assistant": "set of layer types producing a cache",
    "jetmoe": "Cannot copy out of meta tensor",
    "musicgen": "no attribute 'dropout'",
    "musicgen_melody": "no attribute 'dropout'",
    "reformer": "does not require grad",
}


def settings_of(shape: AnyShape) -> dict:
    """What a run of this family needs that others do not."""
    settings = {}
    if shape.model_type in _NO_TILED_HEAD:
        settings["logits"] = "whole"
    if shape.model_type in _NOT_ALL_LINEAR:
        settings["target_modules"] = tuple(name for name in shape.linear_names() if name not in _NOT_ADAPTED)
    return settings


# What a configuration class does not take its own default of.
_NEEDED = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 6, "num_kv_shared_layers": 6,
        }
    }
}  # fmt: skip


def model_types() -> list[str]:
    """Every family that the installed transformers has a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str) -> dict:
    """A small config of a family, as in a `config.json`."""
    config = CONFIG_MAPPING[model_type](**_NEEDED.get(model_type, {})).to_dict()
    config = {
        key: value for key, value in config.items() if key not in ("transformers_version", "id2label", "label2id")
    }
    return _small(config, _CHANGED.get(model_type, {})) | {"model_type": model_type}


def _small(config: dict, changed: dict) -> dict:
    """A config with few layers."""
    small = {}
    many = next((config[name] for name in _LAYERS if isinstance(config.get(name), int)), 0)
    few = min(many, changed.get("layers", LAYERS))
    lists = [value for value in config.values() if isinstance(value, list) and len(value) == many]
    few = max(few, _long_enough(lists, few)) if many else 0
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            of_text = key in ("text_config", "decoder")
            small[key] = _small(value, changed if of_text else {"layers": 2})
        elif isinstance(value, dict) and value and all(str(name).isdigit() for name in value):
            small[key] = {name: entry for name, entry in value.items() if int(name) < few}
        elif isinstance(value, list) and many and len(value) == many:
            small[key] = value[:few]
        elif isinstance(value, bool) or not isinstance(value, int):
            small[key] = value
        elif key in _LAYERS:
            small[key] = min(value, few)
        elif key in _OTHER_LAYERS:
            small[key] = min(value, 2)
        elif key in _EXPERTS:
            small[key] = min(value, 8)
        elif key in _WINDOWS:
            small[key] = min(value, WINDOW)
        elif key in _VOCABULARIES:
            small[key] = min(value, VOCABULARY)
        elif key.endswith(("token_id", "token_index")):
            small[key] = value % 1000
        elif key in ("n_group", "num_expert_group"):
            small[key] = min(value, 2)
        elif key == "topk_group":
            small[key] = 1
        elif key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"):
            small[key] = min(value, 2)
        else:
            small[key] = value
    return small | {key: value for key, value in changed.items() if key != "layers"}


def _long_enough(lists: list[list], few: int) -> int:
    """So many of the first layers hold each kind that the lists of a config tell apart."""
    kinds = [str(entry) for entry in zip(*lists, strict=True)]
    return max(few, *(kinds.index(kind) + 1 for kind in set(kinds))) if kinds else few
