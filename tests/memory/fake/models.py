"""Tiny models of a few architectures, and runs of them."""

from dataclasses import replace

from qlora_helpers.memory import find_gpu
from qlora_helpers.settings import GPU_RUN

GPU = find_gpu("h200")
_SIZES = {
    "vocab_size": 1_000, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
}  # fmt: skip
LLAMA = {"model_type": "llama", "num_hidden_layers": 6, "tie_word_embeddings": False} | _SIZES
GEMMA3 = {
    "model_type": "gemma3_text", "num_hidden_layers": 9, "sliding_window": 32, "sliding_window_pattern": 3,
    "layer_types": 3 * ["sliding_attention", "sliding_attention", "full_attention"],
} | _SIZES  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_hidden_layers": 7, "mlp_only_layers": [0, 3]} | EXPERTS | _SIZES
DEEPSEEK = {
    "model_type": "deepseek_v2", "num_hidden_layers": 6, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "q_lora_rank": None,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1,
} | {**_SIZES, "num_key_value_heads": 4}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "num_hidden_layers": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
    "layer_types": 3 * ["sliding_attention", "full_attention"],
} | _SIZES  # fmt: skip
GEMMA3_OF_PICTURES = {
    "model_type": "gemma3",
    "text_config": GEMMA3,
    "vision_config": {
        "model_type": "siglip_vision_model", "num_hidden_layers": 9, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}  # fmt: skip
RUN = replace(GPU_RUN, batch_size=2, max_length=64, compute_dtype="bfloat16", optimizer="adamw_torch_fused", rank=4)
