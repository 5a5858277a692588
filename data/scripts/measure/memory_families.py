"""The third plan: runs of model families that the memory predictor did not know when the plan was made.

`memory.py --families` measures them. Half of the rows are held out, by a rule that was fixed before anything was
measured: the SHA-256 of the row's label, read as a number, is even. Their figures go to a table of their own
(data/measured/memory_families_held_out.json), so that nobody meets them by chance while the predictor is being made.

Beside the settings of `memory_plan.py`, a row has
    source                  where the model's configuration comes from: repository, path, commit. On the Hugging Face Hub
                            unless it begins with "github.com/". Fields that the file leaves out have the default of
                            the model's class in transformers
    checkpointed_layers     only the first so many decoder layers are checkpointed; null for all, or for none if
                            `gradient_checkpointing` is false
    logits                  "tiled": TRL's SFTTrainer, which never holds the logits of all tokens; "whole": the model's
                            own loss in transformers' Trainer, which does
    eval_batch_size         with so many sequences at once `trainer.evaluate()` is called after training; null for never
    accumulation            batches per step

Names such as "mixtral-8x7b-4-layers" are models cut to their first layers; "gemma-3-4b-text" is the language model of
a model that also has a vision tower, "gemma-3-4b" is the whole of it, trained on text alone. In a model of experts,
PEFT's "all-linear" means the experts too, each with an adapter of its own, and takes no dropout there (only
GPT-OSS's and Granite's experts have no adapters).
"""

import dataclasses
import hashlib

from data.scripts.measure.memory_plan import (
    ALONE,
    EAGER,
    EIGHT,
    F32,
    FUSED,
    HALF,
    KEEP,
    PAGED_32,
    QV,
    SINGLE,
    T4,
    TORCH,
    UPCAST,
    USUAL,
    dropout,
    label_of,
    memory_settings,
    rank,
    targets,
)

__all__ = ["MODELS", "NEW_FAMILIES", "family_rows", "held_out"]


def layers(config: dict, count: int) -> dict:
    """A model cut to its first layers."""
    lists = {key: config[key][:count] for key in ("layer_types", "no_rope_layers") if key in config}
    return config | {"num_hidden_layers": count} | lists


SLIDING, FULL = "sliding_attention", "full_attention"
ROPE_8 = {"factor": 8.0, "rope_type": "linear"}
GEMMA_3_270M = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "sliding_window": 512,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 3, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
}  # fmt: skip
GEMMA_3_4B_TEXT = {
    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
    "sliding_window": 1024, "rope_scaling": ROPE_8,
}  # fmt: skip
GEMMA_3_4B = {
    "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144,
    "mm_tokens_per_image": 256, "text_config": GEMMA_3_4B_TEXT,
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
SMOLLM3_3B = {
    "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 65536,
    "layer_types": [FULL] * 36, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
    "rope_theta": 5000000.0, "tie_word_embeddings": True,
}  # fmt: skip
OLMO_2_7B = {
    "model_type": "olmo2", "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "attention_bias": False, "rope_theta": 500000, "tie_word_embeddings": False,
}  # fmt: skip
GRANITE_2B = {
    "model_type": "granite", "vocab_size": 49155, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "attention_dropout": 0.1, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
    "residual_multiplier": 0.22, "rope_theta": 5000000.0, "tie_word_embeddings": True,
}  # fmt: skip
GRANITE_8B = {
    "model_type": "granite", "vocab_size": 49155, "hidden_size": 4096, "intermediate_size": 12800,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "attention_dropout": 0.0, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
    "logits_scaling": 16.0, "residual_multiplier": 0.22, "rope_theta": 10000000.0, "tie_word_embeddings": True,
}  # fmt: skip
GLM_4_9B = {
    "model_type": "glm4", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 32768, "attention_bias": True, "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}  # fmt: skip
STARCODER2_3B = {
    "model_type": "starcoder2", "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288,
    "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2, "max_position_embeddings": 16384,
    "attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": 4096, "rope_theta": 999999.4420358813,
}  # fmt: skip
STARCODER2_7B = {
    "model_type": "starcoder2", "vocab_size": 49152, "hidden_size": 4608, "intermediate_size": 18432,
    "num_hidden_layers": 32, "num_attention_heads": 36, "num_key_value_heads": 4, "max_position_embeddings": 16384,
    "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": 4096,
    "rope_theta": 1000000,
}  # fmt: skip
COMMAND_R7B = {
    "model_type": "cohere2", "vocab_size": 256000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 16384, "layer_types": ([SLIDING] * 3 + [FULL]) * 8, "logit_scale": 0.25,
    "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5472,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 262144, "rope_theta": 10000000, "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": False,
}  # fmt: skip
OLMOE_1B_7B = {
    "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
    "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_local_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "attention_bias": True, "max_position_embeddings": 131072,
    "layer_types": [SLIDING, FULL] * 12, "sliding_window": 128, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
GRANITE_MOE_3B = {
    "model_type": "granitemoe", "vocab_size": 49155, "hidden_size": 1536, "intermediate_size": 512,
    "num_local_experts": 40, "num_experts_per_tok": 8, "num_hidden_layers": 32, "num_attention_heads": 24,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22, "rope_theta": 10000000.0,
    "router_aux_loss_coef": 0.0, "tie_word_embeddings": True,
}  # fmt: skip
EXAONE_4_1B = {
    "model_type": "exaone4", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 4096,
    "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 65536, "layer_types": [FULL] * 30, "sliding_window": None,
    "sliding_window_pattern": None, "tie_word_embeddings": True,
}  # fmt: skip
ERNIE_4_5_03B = {
    "model_type": "ernie4_5", "vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 131072, "use_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
LFM2_1B = {
    "model_type": "lfm2", "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 12288,
    "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000,
    "conv_L_cache": 3, "conv_bias": False, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "layer_types": [FULL if place in (2, 5, 8, 10, 12, 14) else "conv" for place in range(16)],
}  # fmt: skip
BAMBA_9B = {
    "model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "attn_layer_indices": [9, 18, 27],
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128,
    "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "rope_theta": 10000, "tie_word_embeddings": False,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
STABLELM_2_1B = {
    "model_type": "stablelm", "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.25, "use_qkv_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
STABLELM_2_12B = {
    "model_type": "stablelm", "vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 13824,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.25, "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
FALCON_7B = {
    "model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
    "num_attention_heads": 71, "alibi": False, "bias": False, "multi_query": True, "new_decoder_architecture": False,
    "parallel_attn": True,
}  # fmt: skip
PHI_2 = {
    "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048,
    "hidden_act": "gelu_new", "partial_rotary_factor": 0.4, "qk_layernorm": False, "embd_pdrop": 0.0,
    "resid_pdrop": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
MINITRON_4B = {
    "model_type": "nemotron", "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 9216,
    "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "hidden_act": "relu2", "max_position_embeddings": 4096, "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}  # fmt: skip
GPT2_XL = {
    "model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_inner": 6400, "n_layer": 48, "n_head": 25,
    "n_positions": 1024,
}  # fmt: skip
OPT_1B = {
    "model_type": "opt", "vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192, "word_embed_proj_dim": 2048,
    "num_hidden_layers": 24, "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
BLOOM_560M = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}

GEMMA_SOURCE = "mlx-community/gemma-3-4b-it-bf16, config.json, main (as google/gemma-3-4b-it)"
QWEN_SOURCE = "RTP-LLM/Qwen3-Coder-30B-A3B-Instruct-RTPurbo, config.json, main (as Qwen/Qwen3-Coder-30B-A3B-Instruct)"
DEEPSEEK_SOURCE = "deepseek-ai/DeepSeek-Coder-V2-Lite-Base, config.json, 5a3cf15"
GPT_OSS_SOURCE = (
    "github.com/jihengzhang/jihz-gpt-oss-20b, gpt-oss-20b/config.json, 7ec89800d2b55da8f65106e8a6f794b7b6433df8"
)
MIXTRAL_SOURCE = "mistralai/Mixtral-8x7B-Instruct-v0.1, config.json, eba92302a2861cdc0098cc54bc9f17cb2c47eb61"
LLM_ANALYSIS = (
    "github.com/cli99/llm-analysis, llm_analysis/model_configs/{}.json, b60b392f747850d198145889205d8a3586d00282"
)
MODELS: dict[str, tuple[dict, str]] = {
    "gemma-3-270m": (GEMMA_3_270M, "Codingstark/gemma3-270m-leetcode, config.json, main (as google/gemma-3-270m-it)"),
    "gemma-3-4b-text": (GEMMA_3_4B_TEXT, GEMMA_SOURCE + ": text_config"),
    "gemma-3-4b": (GEMMA_3_4B, GEMMA_SOURCE),
    "smollm3-3b": (
        SMOLLM3_3B, "github.com/21-grams/notso-smollm3-bot, README.md, 105232c896e9bff8c2b55e64acfac033f0fc73d9, and "
        "koutch/0.json_train_grpo_v1_dev, config.json, main (as HuggingFaceTB/SmolLM3-3B)",
    ),
    "olmo-2-7b": (OLMO_2_7B, "allenai/OLMo-2-1124-7B, config.json, 7ab0c15"),
    "granite-3.2-2b": (GRANITE_2B, "unsloth/granite-3.2-2b-instruct, config.json, 918d2374b981d0ec5c1a0ae560cc9c60d0001353"),
    "granite-3.2-8b": (GRANITE_8B, "huihui-ai/granite-3.2-8b-instruct-abliterated, config.json, main"),
    "glm-4-9b": (
        GLM_4_9B, "ccui46/hazardworld_per_chunk_act_glm_tokfix_diffPrompt_2000, config.json, main (as THUDM/GLM-4-9B-0414)",
    ),
    "starcoder2-3b": (
        STARCODER2_3B, "OpenVINO/starcoder2-3b-int8-ov, config.json, c1cc7147d839e0d240c5e7ed994f494f38ef7cb2 (as "
        "bigcode/starcoder2-3b)",
    ),
    "starcoder2-7b": (STARCODER2_7B, "bigcode/starcoder2-7b, config.json, 56cbdc2"),
    "command-r7b": (
        COMMAND_R7B, "Shams03/ArEgy-Medical-Command-R7B-FineTuned, config.json, main (as "
        "CohereForAI/c4ai-command-r7b-12-2024), and the class's vocab_size, sliding_window and tie_word_embeddings",
    ),
    "qwen3-30b-a3b": (QWEN3_30B_A3B, QWEN_SOURCE),
    "qwen3-30b-a3b-8-layers": (layers(QWEN3_30B_A3B, 8), QWEN_SOURCE),
    "olmoe-1b-7b": (OLMOE_1B_7B, "allenai/OLMoE-1B-7B-0924, config.json, fba02cfdd0fb5b8d8b843154a3aee75c02abd4a5"),
    "gpt-oss-20b": (GPT_OSS_20B, GPT_OSS_SOURCE),
    "gpt-oss-20b-6-layers": (layers(GPT_OSS_20B, 6), GPT_OSS_SOURCE),
    "mixtral-8x7b-4-layers": (layers(MIXTRAL_8X7B, 4), MIXTRAL_SOURCE),
    "granite-3.1-3b-a800m": (
        GRANITE_MOE_3B, "ibm-granite/granite-3.1-3b-a800m-instruct, config.json, f00c449",
    ),
    "exaone-4.0-1.2b": (
        EXAONE_4_1B, "BuAs/mm3, config.json, main (as LGAI-EXAONE/EXAONE-4.0-1.2B), and vocab_size, sliding_window and "
        "tie_word_embeddings of optimum-intel-internal-testing/tiny-random-exaone4, config.json, main",
    ),
    "ernie-4.5-0.3b": (
        ERNIE_4_5_03B, "github.com/huggingface/transformers, src/transformers/models/ernie4_5/configuration_ernie4_5.py, "
        "2b6c089d5a0b18d59a08c36b91404ece60915cf3: the class's defaults",
    ),
    "lfm2-1.2b": (LFM2_1B, "saranshagarwal2020/p-vector, config.json, main (as LiquidAI/LFM2-1.2B)"),
    "bamba-9b": (BAMBA_9B, "ibm-fms/Bamba-9B, config.json, 43f21514c01057cdbfbd5e3fbc97bd3df3360aba"),
    "deepseek-v2-lite": (DEEPSEEK_V2_LITE, DEEPSEEK_SOURCE + ", and the class's vocab_size and v_head_dim"),
    "deepseek-v2-lite-6-layers": (
        layers(DEEPSEEK_V2_LITE, 6), DEEPSEEK_SOURCE + ", and the class's vocab_size and v_head_dim"
    ),
    "stablelm-2-1.6b": (
        STABLELM_2_1B, "stabilityai/stablelm-2-1_6b-chat, config.json, 5ea35f5d91904163c96944881d3b5011f4ed86a6",
    ),
    "stablelm-2-12b": (
        STABLELM_2_12B, "stabilityai/stablelm-2-12b, config.json, 20dc0219dedf0ef60844a41707043d4067b19e61",
    ),
    "falcon-7b": (FALCON_7B, "tiiuae/falcon-7b-instruct, config.json, cf4b3c4"),
    "phi-2": (PHI_2, "Ziming2000/phi2-code-sft, config.json, 22f01e2 (as microsoft/phi-2)"),
    "minitron-4b": (MINITRON_4B, "nvidia/Minitron-4B-Base, config.json, 475785aa6f0a23f18b968821c9e2191697278bfd"),
    "gpt2-xl": (GPT2_XL, LLM_ANALYSIS.format("gpt2-xl")),
    "opt-1.3b": (OPT_1B, LLM_ANALYSIS.format("facebook_opt-1.3b")),
    "bloom-560m": (BLOOM_560M, LLM_ANALYSIS.format("bigscience_bloom-560m")),
}  # fmt: skip

WHOLE = {"logits": "whole"}
ATTENTION = targets("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = targets("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")  # multi-head latent attention's


def first(count: int) -> dict:
    return {"checkpointed_layers": count}


def accumulate(batches: int) -> dict:
    return {"accumulation": batches}


def evaluate(sequences: int) -> dict:
    return {"eval_batch_size": sequences}


# model, method, batch size, tokens, GiB that it may need at most (generous), differences from USUAL
NEW_FAMILIES = [
    ("gemma-3-4b-text", "qlora", 2, 2_048, 16, ALONE),
    ("granite-3.2-8b", "qlora", 1, 2_048, 20, ALONE, rank(128), PAGED_32, accumulate(4)),
    ("command-r7b", "qlora", 1, 4_096, 28, ALONE),
    ("qwen3-30b-a3b", "qlora", 1, 1_024, 80, ALONE, ATTENTION),
    ("granite-3.1-3b-a800m", "full", 1, 512, 44, ALONE),
    ("olmoe-1b-7b", "qlora", 2, 1_024, 44, ALONE, rank(32), dropout(0)),
    ("gemma-3-270m", "full", 4, 2_048, 12, FUSED),
    ("gemma-3-270m", "full", 2, 768, 20, KEEP, TORCH, WHOLE),
    ("gemma-3-4b-text", "lora", 1, 1_536, 34, KEEP, QV, dropout(0), TORCH),
    ("gemma-3-4b", "qlora", 1, 1_024, 16, rank(32), EIGHT),
    ("gemma-3-4b", "qlora", 2, 768, 40, KEEP, EAGER, dropout(0.1), FUSED),
    ("smollm3-3b", "qlora", 4, 1_024, 14, FUSED, evaluate(6)),
    ("smollm3-3b", "qlora", 2, 1_536, 12, T4, EIGHT),
    ("smollm3-3b", "lora", 1, 4_096, 50, first(18), rank(64), FUSED),
    ("olmo-2-7b", "qlora", 2, 1_024, 22, UPCAST, F32, FUSED),
    ("olmo-2-7b", "lora", 1, 768, 44, KEEP, WHOLE, rank(8), EIGHT),
    ("granite-3.2-2b", "qlora", 6, 512, 44, KEEP, dropout(0), TORCH),
    ("granite-3.2-2b", "full", 2, 1_024, 34, EIGHT),
    ("granite-3.2-2b", "qlora", 1, 3_072, 12, T4, dropout(0), FUSED),
    ("glm-4-9b", "qlora", 1, 2_048, 22, TORCH, SINGLE),
    ("glm-4-9b", "qlora", 2, 512, 50, first(20), EAGER, FUSED),
    ("starcoder2-3b", "lora", 2, 1_024, 18, FUSED),
    ("starcoder2-7b", "qlora", 1, 1_024, 40, KEEP, F32, EIGHT),
    ("command-r7b", "qlora", 2, 1_024, 40, WHOLE, EIGHT),
    ("qwen3-30b-a3b-8-layers", "lora", 2, 1_024, 50, KEEP, ATTENTION, FUSED),
    ("qwen3-30b-a3b-8-layers", "qlora", 4, 512, 50, accumulate(2), EIGHT, dropout(0)),
    ("olmoe-1b-7b", "qlora", 1, 1_024, 44, KEEP, QV, dropout(0), FUSED),
    ("gpt-oss-20b", "qlora", 1, 768, 56, EAGER, FUSED),
    ("gpt-oss-20b-6-layers", "lora", 1, 1_024, 44, EAGER, KEEP, TORCH, dropout(0)),
    ("mixtral-8x7b-4-layers", "qlora", 1, 2_048, 34, ATTENTION, F32, FUSED),
    ("mixtral-8x7b-4-layers", "lora", 2, 512, 70, KEEP, rank(8), dropout(0), EIGHT),
    ("granite-3.1-3b-a800m", "qlora", 4, 512, 50, KEEP, rank(8), EIGHT),
    ("exaone-4.0-1.2b", "qlora", 3, 768, 30, KEEP, evaluate(6), TORCH),
    ("exaone-4.0-1.2b", "full", 1, 2_048, 24, FUSED),
    ("ernie-4.5-0.3b", "full", 4, 512, 20, KEEP, EIGHT),
    ("ernie-4.5-0.3b", "lora", 6, 1_024, 34, WHOLE, evaluate(4), FUSED),
    ("lfm2-1.2b", "qlora", 2, 2_048, 14, rank(64), FUSED),
    ("lfm2-1.2b", "full", 2, 512, 30, KEEP, TORCH),
    ("bamba-9b", "qlora", 1, 512, 80, FUSED),
    ("deepseek-v2-lite", "qlora", 1, 1_024, 52, LATENT, FUSED),
    ("deepseek-v2-lite-6-layers", "lora", 2, 768, 70, KEEP, rank(32), dropout(0), EIGHT),
    ("stablelm-2-1.6b", "qlora", 2, 1_024, 16, UPCAST, dropout(0.1), FUSED),
    ("stablelm-2-12b", "qlora", 1, 1_024, 22, rank(8), FUSED),
    ("falcon-7b", "qlora", 2, 1_024, 22, targets("query_key_value"), FUSED),
    ("falcon-7b", "lora", 1, 512, 44, KEEP, dropout(0), EIGHT),
    ("phi-2", "qlora", 2, 768, 34, first(8), FUSED),
    ("phi-2", "lora", 1, 2_048, 24, EAGER, rank(128), TORCH),
    ("minitron-4b", "qlora", 2, 1_024, 20, HALF, accumulate(2), EIGHT),
    ("gpt2-xl", "lora", 2, 1_024, 18, rank(8), FUSED),
    ("opt-1.3b", "qlora", 4, 1_024, 34, KEEP, FUSED),
    ("opt-1.3b", "full", 2, 512, 20, EIGHT),
    ("bloom-560m", "qlora", 3, 768, 16, EAGER, dropout(0.1), FUSED),
    ("granite-3.2-2b", "qlora", 2, 1_024, 24, first(10), FUSED),
    ("olmo-2-7b", "lora", 1, 1_536, 50, first(12), QV, EIGHT),
    ("gpt-oss-20b-6-layers", "qlora", 2, 768, 34, EAGER, dropout(0), EIGHT),
    ("lfm2-1.2b", "lora", 3, 768, 24, KEEP, rank(8), FUSED),
]  # fmt: skip


def held_out(label: str) -> bool:
    """Whether a row is kept for testing the predictor; only its label decides."""
    return int(hashlib.sha256(label.encode()).hexdigest(), 16) % 2 == 0


def family_label(row: dict) -> str:
    """The row's settings in short, as in the other plans."""
    words = [label_of(row)]
    words += [f"accumulate-{row['accumulation']}"] if row["accumulation"] != 1 else []
    words += [f"first-{row['checkpointed_layers']}"] if row["checkpointed_layers"] is not None else []
    words += ["whole-logits"] if row["logits"] == "whole" else []
    words += [f"evaluate-{row['eval_batch_size']}"] if row["eval_batch_size"] is not None else []
    return " ".join(words)


def family_rows() -> list[dict]:
    """The rows of NEW_FAMILIES, with `label`, `held_out`, `gib` and `alone`; those measured alone come first."""
    rows = []
    for model, method, batch_size, max_length, gib, *changes in NEW_FAMILIES:
        settings: dict = {"method": method, "batch_size": batch_size, "max_length": max_length}
        for change in changes:
            settings |= change
        alone, t4_kernels = settings.pop("alone", False), settings.pop("t4_kernels", False)
        config, source = MODELS[model]
        row = {"model": model, "source": source, "config": config}
        row |= memory_settings(dataclasses.replace(USUAL, **settings))
        row |= {"t4_kernels": True} if t4_kernels else {}
        label = family_label(row)
        rows.append({"label": label, "held_out": held_out(label), "gib": gib, "alone": alone} | row)
    return sorted(rows, key=lambda row: (not row["alone"], -row["gib"]))
