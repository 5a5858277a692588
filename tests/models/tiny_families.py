"""Tiny models of several families, each with something of its own in what comes in 4 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
CONFIGS = {
    "llama": {"model_type": "llama", **_SIZES},
    "tied": {"model_type": "llama", **_SIZES, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe", **_SIZES, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe", **_SIZES, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 64,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", **_SIZES, **_ROPE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "olmoe": {"model_type": "olmoe", **_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "mixtral": {"model_type": "mixtral", **_SIZES, "num_local_experts": 4},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "falcon": {"model_type": "falcon", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **_SIZES, "head_dim": 16, "sliding_window": 16},
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
}  # fmt: skip


def built(family: str) -> PreTrainedModel:
    """A model of the family, with random values."""
    config = dict(CONFIGS[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


def saved(family: str, folder: Path) -> str:
    """The name of a folder with such a model."""
    built(family).save_pretrained(folder)
    return str(folder)
