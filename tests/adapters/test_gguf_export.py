"""A model's folder as a GGUF file: every tensor and entry, what is refused, and that nothing half-written is left."""

import json
import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.adapters import gguf_export
from qlora_helpers.adapters.gguf_export import KINDS, check_exportable, export_gguf, interleaved, rope_divisors
from qlora_helpers.adapters.hops import divide_rope
from qlora_helpers.json_files import new_file
from qlora_helpers.paths import data_path
from tests.support.tiny_chat_models import FAMILIES, ROWS, changed_json, saved_chat_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: saved_chat_model(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model_back(family, folders, tmp_path):
    file = export_gguf(folders[family], tmp_path / "a.gguf", "f32")
    own = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    assert divide_rope(read, file.path) == (family == "llama3")
    for (name, value), (other, found) in zip(own.named_parameters(), read.named_parameters(), strict=True):
        assert name == other and torch.equal(value, found), name
    ids = torch.arange(0, 300)[None]  # beyond the first 64 positions, where the scaled rotary embedding differs
    with torch.no_grad():
        assert torch.allclose(own(ids).logits, read(ids).logits, atol=1e-4)
    names = {tensor.name for tensor in GGUFReader(file.path).tensors}
    assert ("output.weight" in names) == (family != "smollm")  # that is the embedding's
    assert ("blk.1.attn_k.bias" in names) == (family == "qwen2")
    assert file.tensors == len(names) and file.bytes == file.path.stat().st_size
    assert file.parameters == sum(value.numel() for value in own.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_rounds_matrices_as_it_says_and_leaves_vectors(kind, folders, tmp_path):
    export_gguf(folders["qwen2"], tmp_path / "a.gguf", kind)
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    own = load_file(folders["qwen2"] / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].numpy()
    tensor = stored["blk.1.ffn_up.weight"]
    assert tensor.tensor_type == KINDS[kind][0] and stored["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    read = dequantize(tensor.data, tensor.tensor_type)
    wanted = {
        "f32": own,
        "f16": own.astype(np.float16).astype(np.float32),
        "bf16": torch.from_numpy(own).bfloat16().float().numpy(),
    }
    if kind in wanted:
        assert np.array_equal(read, wanted[kind])
    else:
        blocks, found = own.reshape(-1, 32), read.reshape(-1, 32)
        assert (abs(blocks - found).max(1) <= 0.57 * abs(blocks).max(1) / 127).all() and not np.array_equal(read, own)


def test_rows_that_are_no_multiple_of_a_block_are_in_float16(tmp_path):
    folder = saved_chat_model("smollm", tmp_path / "a", intermediate_size=80)
    export_gguf(folder, tmp_path / "a.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_the_file_says_what_the_model_is(folders, tmp_path):
    (folders["llama3"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", encoding="utf-8")
    changed_json(folders["llama3"] / "generation_config.json", eos_token_id=[1, 2])
    export_gguf(folders["llama3"], tmp_path / "a.gguf", name="Mine", base="someone/Base-1B")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "a.gguf").fields.items()}
    wanted = {
        "general.architecture": "llama", "general.name": "Mine", "general.license": "apache-2.0", "general.file_type": 1,
        "general.base_model.0.name": "Base-1B", "general.base_model.0.organization": "someone",
        "llama.context_length": 512, "llama.embedding_length": 64, "llama.block_count": 2, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10_000.0, "llama.vocab_size": ROWS, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {name: fields[name] for name in wanted} == wanted
    export_gguf(data_path("tiny-llama"), tmp_path / "b.gguf")
    fields = GGUFReader(tmp_path / "b.gguf").fields
    assert fields["general.license"].contents() == "cc-by-4.0" and fields["general.name"].contents() == "tiny-llama"
    assert "general.base_model.count" not in fields


def test_rows_are_interleaved_within_each_head_and_divisors_are_transformers_own():
    rows = torch.arange(12.0)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    config = {**FAMILIES["llama3"][0], "vocab_size": ROWS}
    divisors = rope_divisors(AutoConfig.for_model(config.pop("model_type"), **config))
    assert divisors.dtype == np.float32 and divisors.shape == (8,)
    assert divisors[0] == 1 and divisors[-1] == pytest.approx(8) and (np.diff(divisors) > -1e-5).all()
    assert 1 < divisors[2] < 8  # between the two, where the frequency is scaled by a part
    assert rope_divisors(AutoConfig.for_model("llama")) is None


def copied(folder, target, **entries):
    shutil.copytree(folder, target)
    changed_json(target / "config.json", **entries)
    return target


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"model_type": "mistral"}, "model_type='mistral': only the families Llama and Qwen2 .*convert_hf_to_gguf.py"),
        ({"model_type": "gemma3_text"}, "only the families Llama and Qwen2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type='yarn' of a llama model",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "was saved in 4 bits"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors that its config asks for, such as model.layers.2"),
        ({"num_hidden_layers": 1}, "has a tensor model.layers.1.*, for which its family has no place"),
        ({"intermediate_size": 128}, r"in the shape \(64, 96\) in F32; its config asks for \(64, 128\)"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors .* such as lm_head.weight"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(entries, match, folders, tmp_path):
    folder = copied(folders["smollm"], tmp_path / "model", **entries)
    with pytest.raises(ValueError, match=match):
        export_gguf(folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_weight_too_large_for_float16_is_named_and_fits_into_bfloat16(folders, tmp_path):
    folder = copied(folders["smollm"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 70_000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"kind='f16': model.layers.1.mlp.up_proj.weight has a weight of 70000, .*: take bf16"
    ):
        export_gguf(folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_gguf(folder, tmp_path / "a.gguf", "bf16")


def test_an_existing_file_is_kept_and_wrong_arguments_are_named(folders, tmp_path):
    (tmp_path / "a.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is there already"):
        export_gguf(folders["qwen2"], tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text(encoding="utf-8") == "mine"
    with pytest.raises(ValueError, match=r"^kind='q4_0': choose one of f32, f16, bf16, q8_0"):
        export_gguf(folders["qwen2"], tmp_path / "b.gguf", "q4_0")
    with pytest.raises(ValueError, match="use_sliding_window=True"):
        check_exportable({"model_type": "qwen2", "use_sliding_window": True}, "a model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        export_gguf(tmp_path / "model", tmp_path / "b.gguf")


def test_one_tensor_is_in_memory_at_a_time(folders, tmp_path, monkeypatch):
    """Each is read when it is written, and not before."""
    happened, values = [], gguf_export._values
    write = gguf_export.gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf_export, "_values", lambda entry, *rest: happened.append("read") or values(entry, *rest))
    monkeypatch.setattr(
        gguf_export.gguf.GGUFWriter, "write_tensor_data", lambda *args: happened.append("written") or write(*args)
    )
    file = export_gguf(folders["qwen2"], tmp_path / "a.gguf")
    assert happened == ["read", "written"] * file.tensors


def test_a_new_file_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_file(tmp_path / "a") as part:
        part.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="is there already"), new_file(tmp_path / "a") as part:
        part.write_text("whole", encoding="utf-8")
        (tmp_path / "a").write_text("of another", encoding="utf-8")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "of another"
