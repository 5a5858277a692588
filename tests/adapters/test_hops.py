"""Each kind of break between an adapter and the file that a server loads, made on purpose: the hop is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_helpers.adapters import gguf_export
from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.adapters.gguf_export import export_gguf
from qlora_helpers.adapters.hops import EXPORT, MERGE, prove
from qlora_helpers.models.loading import load_model, load_tokenizer
from tests.support.merged_models import BASE, SHIPPED
from tests.support.short_runs import CPU
from tests.support.tiny_chat_models import FAMILIES, changed_json, saved_chat_model

CHATS = [
    [{"role": "user", "content": "What is a bit? Say 1234."}],
    [
        {"role": "user", "content": "memory of a GPU " * 12},  # beyond the positions where Llama 3.1's scaling differs
        {"role": "assistant", "content": "It's full."},
        {"role": "user", "content": "Why?"},
    ],
]
QUESTIONS = [
    [{"role": "user", "content": text}]
    for text in ("What does Carl Kirkcroft play in a band?", "When was Isabel Grayfield born?")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: saved_chat_model(family, root / family) for family in FAMILIES}


def proved(folder, tmp_path, kind="f32", tokenizer_folder=None, chats=CHATS, **options):
    """The proof of a file exported from the folder, with another tokenizer if one is given."""
    file = export_gguf(folder, tmp_path / "a.gguf", kind, tokenizer_folder=tokenizer_folder)
    return prove(file.path, folder, chats, max_new_tokens=8, hardware=CPU, **options)


def measured(proof, what):
    return next(check for check in proof.checks if check.what == what and check.hop == EXPORT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_file_holds_and_what_is_equal_is_called_equal(family, folders, tmp_path):
    proof = proved(folders[family], tmp_path)
    assert proof.broken is None and str(proof).endswith("Every hop holds.")
    assert {check.what for check in proof.checks} == {"prompt", "tokens", "vocabulary", "weights", "logits", "answers"}
    assert measured(proof, "weights").measured.endswith("all equal")
    assert (proof.export.largest_logit_difference == 0) == (family != "llama3")  # whose divisors are rounded
    assert proof.export.mean_kl < 1e-9 and proof.export.same_answers == 2


def test_no_bar_of_the_reader_stays_on_the_page(folders, tmp_path, capfd):
    proved(folders["llama3"], tmp_path)
    assert "de-quantizing" not in capfd.readouterr().err


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-6), ("q8_0", 0.02)])
def test_rounding_is_within_what_is_expected_of_it_and_no_more(kind, most, folders, tmp_path):
    proof = proved(folders["qwen2"], tmp_path, kind)
    assert proof.broken is None and 0 < proof.export.mean_kl < most
    assert measured(proof, "weights").measured.endswith("within that")


def test_the_shipped_adapter_holds_at_both_hops(tmp_path):
    folder = merge_files(BASE, SHIPPED, tmp_path / "merged")
    proof = proved(folder, tmp_path, "f16", chats=QUESTIONS, live=live)
    assert proof.broken is None and [check.hop for check in proof.checks] == [MERGE] * 4 + [EXPORT] * 6
    assert "with the blank before each message" in measured(proof, "prompt").expected
    assert proof.export.same_answers == 2 and proof.export.mean_kl < 1e-6


def live():
    return load_adapter(load_model(quantization=None, hardware=CPU), SHIPPED), load_tokenizer()


def broken(proof, hop, what, measured):
    found = proof.broken
    assert (found.hop, found.what) == (hop, what) and measured in found.measured, proof
    assert f"The hop {hop} breaks: {what}." in str(proof)


@pytest.mark.parametrize("family", ["llama3", "smollm"])
def test_queries_and_keys_in_transformers_order_break_the_weights(family, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "interleaved", lambda weight, heads: weight)
    proof = proved(folders[family], tmp_path)
    broken(proof, EXPORT, "weights", "self_attn.k_proj.weight (blk.0.attn_k.weight, F32) differs at")
    assert "and 3 more" in proof.broken.measured and proof.export.mean_kl > 0.1


def test_qwen2_with_the_order_of_llama_breaks_them_too(folders, tmp_path, monkeypatch):
    values = gguf_export._values

    def wrong(entry, config, kind):
        array = values(entry, config, kind)
        return interleave(array) if "attn_q.weight" in entry.name else array

    def interleave(array):
        return gguf_export.interleaved(torch.from_numpy(array), 4).contiguous().numpy()

    monkeypatch.setattr(gguf_export, "_values", wrong)
    proof = proved(folders["qwen2"], tmp_path)
    broken(proof, EXPORT, "weights", "self_attn.q_proj.weight (blk.0.attn_q.weight")
    assert proof.export.mean_kl > 0.05


@pytest.mark.parametrize(
    ("family", "dropped", "named"),
    [
        ("qwen2", "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight is not in the file (blk.1.ffn_up.weight)"),
        ("qwen2", "blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias is not in the file"),
        (
            "llama3",
            "output.weight",
            "lm_head.weight is not in the file (output.weight)",
        ),  # the reader takes the embedding
    ],
)
def test_a_dropped_tensor_is_named(family, dropped, named, folders, tmp_path, monkeypatch):
    plan = gguf_export._plan
    monkeypatch.setattr(gguf_export, "_plan", lambda *args: [entry for entry in plan(*args) if entry.name != dropped])
    proof = proved(folders[family], tmp_path)
    broken(proof, EXPORT, "weights", named)
    assert not measured(proof, "logits").holds


def test_a_head_that_is_no_longer_the_embedding_is_named(folders, tmp_path, monkeypatch):
    plan = gguf_export._plan

    def with_head(config, files, said):
        entries = plan(config, files, said)
        embedding = next(entry for entry in entries if entry.name == "token_embd.weight")
        return [*entries, gguf_export._Entry("output.weight", embedding.path, "model.norm.weight", embedding.shape)]

    values = gguf_export._values

    def head(entry, config, kind):
        if entry.name == "output.weight":
            return torch.zeros(entry.shape).numpy()
        return values(entry, config, kind)

    monkeypatch.setattr(gguf_export, "_plan", with_head)
    monkeypatch.setattr(gguf_export, "_values", head)
    proof = proved(folders["smollm"], tmp_path)
    broken(proof, EXPORT, "weights", "the output head, which is the embedding, is a tensor of its own")
    assert not measured(proof, "logits").holds


def test_a_rotary_embedding_without_its_scaling_breaks_the_logits_alone(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "rope_divisors", lambda config: None)
    proof = proved(folders["llama3"], tmp_path)
    broken(proof, EXPORT, "logits", "KL")
    assert measured(proof, "weights").holds and proof.export.mean_kl > 1e-3


def with_tokenizer(folder, target, change):
    """A copy of a folder whose tokenizer is changed."""
    shutil.copytree(folder, target)
    path = target / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    change(saved)
    path.write_text(json.dumps(saved), encoding="utf-8")
    return target


def swap_merges(saved):
    """The first two merges of which the order matters to a text: of "in" and "re"."""
    merges = saved["model"]["merges"]
    merges[0], merges[40] = merges[40], merges[0]


def drop_merge(saved):
    saved["model"]["merges"].pop(0)


@pytest.mark.parametrize("change", [swap_merges, drop_merge])
def test_another_merge_breaks_the_tokens_or_the_vocabulary(change, folders, tmp_path):
    other = with_tokenizer(folders["qwen2"], tmp_path / "other", change)
    proof = proved(folders["qwen2"], tmp_path, tokenizer_folder=other)
    assert (proof.broken.hop, proof.broken.what) in ((EXPORT, "tokens"), (EXPORT, "vocabulary"))
    assert measured(proof, "vocabulary").measured.startswith("merge 1, ") and not measured(proof, "vocabulary").holds
    assert measured(proof, "prompt").holds and measured(proof, "weights").holds


def test_another_name_for_the_way_to_cut_breaks_the_vocabulary_even_if_the_tokens_are_the_same(
    folders, tmp_path, monkeypatch
):
    """No reader notices a wrong `tokenizer.ggml.pre`, and a tokenizer with few merges makes the same tokens of most texts."""
    write = gguf_export.gguf.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(gguf_export.gguf.GGUFWriter, "add_tokenizer_pre", lambda self, pre: write(self, "gpt-2"))
    proof = proved(folders["qwen2"], tmp_path)
    broken(proof, EXPORT, "vocabulary", "cut into")


def test_a_wrong_template_breaks_the_prompt(folders, tmp_path):
    other = shutil.copytree(folders["smollm"], tmp_path / "other")
    template = (other / "chat_template.jinja").read_text(encoding="utf-8")
    (other / "chat_template.jinja").write_text(template.replace("You are helpful", "Be helpful"), encoding="utf-8")
    proof = proved(folders["smollm"], tmp_path, tokenizer_folder=other)
    broken(proof, EXPORT, "prompt", "You are helpful")
    assert proof.export is None  # other prompts cannot be compared


def test_a_merge_that_forgot_the_adapter_is_named_as_the_first_hop(tmp_path):
    folder = shutil.copytree(BASE, tmp_path / "merged")
    proof = proved(folder, tmp_path, chats=QUESTIONS, live=live)
    broken(proof, MERGE, "logits", "KL")
    assert all(check.holds for check in proof.checks if check.hop == EXPORT)  # the file is that of the base


def test_a_merged_model_with_another_template_is_named_and_the_file_is_not_asked(tmp_path):
    folder = merge_files(BASE, SHIPPED, tmp_path / "merged")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("'<|user|>'", "'<|user|> Well'"), encoding="utf-8")
    proof = proved(folder, tmp_path, chats=QUESTIONS, live=live)
    broken(proof, MERGE, "prompt", "Well")
    assert {check.hop for check in proof.checks} == {MERGE}


def test_a_changed_weight_of_the_merged_model_after_the_export_is_found(folders, tmp_path):
    """A file of another model of the same shape."""
    folder = shutil.copytree(folders["qwen2"], tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][5, 7] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    changed_json(folder / "generation_config.json", eos_token_id=1)
    file = export_gguf(folders["qwen2"], tmp_path / "a.gguf", "f16")
    proof = prove(file.path, folder, CHATS, max_new_tokens=4, hardware=CPU)
    broken(proof, EXPORT, "weights", "mlp.down_proj.weight (blk.0.ffn_down.weight, F16) differs at 1 of 6,144 places")
