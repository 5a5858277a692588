"""The shapes of well-known models, as published in the `config.json` of each: enough to count parameters without loading.

Source: the models' repositories on the Hugging Face Hub; the counts are checked in `tests/test_shapes.py`.
"""

LLAMA_3_2_1B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_1_8B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_2_70B = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 8_192, "intermediate_size": 28_672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_1_70B = LLAMA_2_70B | {"vocab_size": 128_256}

LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_2_5_1_5B = {
    "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 1_536, "intermediate_size": 8_960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_2_5_3B = QWEN_2_5_1_5B | {
    "hidden_size": 2_048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16,
}  # fmt: skip
QWEN_2_5_7B = QWEN_2_5_1_5B | {
    "vocab_size": 152_064, "hidden_size": 3_584, "intermediate_size": 18_944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip

KNOWN = {
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "Mistral-7B": MISTRAL_7B,
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Llama-2-70B": LLAMA_2_70B,
    "Llama-3.1-70B": LLAMA_3_1_70B,
}
# these and the ones above; the lessons' tables show the ones above
ALL = KNOWN | {
    "Llama-2-7B": LLAMA_2_7B,
    "Qwen2.5-1.5B": QWEN_2_5_1_5B,
    "Qwen2.5-3B": QWEN_2_5_3B,
    "Qwen2.5-7B": QWEN_2_5_7B,
}


def meta_model(shape: dict):
    """The transformers model of a shape on the "meta" device: all its layers, none of its memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in shape.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape["model_type"], **options))
