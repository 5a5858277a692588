"""Folders of tiny chat models of the families that are exported: random weights, and a tokenizer trained on a few lines."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests import ROOT

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# name: config, special tokens (BOS, EOS, others), how text is cut, the chat template
FAMILIES = {
    "llama3": (
        {"model_type": "llama", **_SIZES, "rope_parameters": _ROPE, "tie_word_embeddings": False},
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), LLAMA3, HEADERS,
    ),
    "smollm": (
        {"model_type": "llama", **_SIZES, "tie_word_embeddings": True},
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "digits", CHATML,
    ),
    "qwen2": (
        {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": False},
        ("<|endoftext|>", "<|im_end|>", "<|im_start|>"), QWEN2, CHATML,
    ),
}  # fmt: skip
TOKENS, ROWS = 400, 416  # the embedding has more rows than there are tokens, as that of Qwen2.5 has


def trained_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that cuts text as the family does."""
    _, special, cut, template = FAMILIES[family]
    backend = Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if cut == "digits"
        else pre_tokenizers.Split(Regex(cut), behavior="isolated")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut == "digits")]
    )
    backend.decoder = decoders.ByteLevel()
    if family == "qwen2":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in special],
        show_progress=False,
    )
    text = (ROOT / "GLOSSARY.md").read_text(encoding="utf-8")
    backend.train_from_iterator(text.splitlines(), trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    if family == "llama3":
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], backend.token_to_id(special[0]))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[1])
    tokenizer.pad_token, tokenizer.chat_template = special[-1], template
    return tokenizer


def saved_chat_model(family: str, folder: Path, dtype: torch.dtype = torch.float32, **entries: object) -> Path:
    """The folder of a tiny model whose logits are far apart, and whose biases are not zero."""
    config = {**FAMILIES[family][0], "vocab_size": ROWS, **entries}
    tokenizer = trained_tokenizer(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                value.mul_(6)
            elif "norm" not in name:
                value.normal_(std=0.5)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.generation_config.update(**ids)
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed_json(path: Path, **entries: object) -> None:
    """Write other entries into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")
