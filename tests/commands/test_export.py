"""Exporting from the command line: what is written and kept, what is refused before anything is loaded, and the lines to serve it."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from qlora_helpers.__main__ import main
from qlora_helpers.adapters import gguf_export, proven_merge
from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.commands.merge import WHICH
from qlora_helpers.paths import data_path
from tests.support.tiny_chat_models import changed_json, saved_chat_model

ADAPTER, BASE = data_path("adapters", "sentences"), data_path("tiny-llama")


@pytest.fixture
def export(monkeypatch, capsys, tmp_path):
    """A function that calls `main` in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def main_with(*arguments):
        return main(["export", *map(str, arguments)]), *capsys.readouterr()

    return main_with


def test_an_adapter_becomes_a_file_that_is_checked_and_can_be_served(export, tmp_path):
    (tmp_path / "q.txt").write_text("What does Carl Kirkcroft play in a band?\n", encoding="utf-8")
    code, out, _ = export(
        ADAPTER,
        "people.gguf",
        "--to",
        "gguf",
        "--type",
        "q8_0",
        "--modelfile",
        "--merged",
        "merged",
        "--check",
        "q.txt",
    )
    assert code == 0 and "Every hop holds." in out and "1 of 1 the same" in out
    assert "Asking the adapter, the merged model and the file, which is read back, 1 question …" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "merged", "people.gguf", "q.txt"]
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")  # what was checked is in it
    assert "Not proven" not in card and "Every hop holds." in card and "Calls itself" not in card
    fields = GGUFReader(tmp_path / "people.gguf").fields
    assert fields["general.name"].contents() == "people"
    assert fields["general.base_model.0.name"].contents() == "tiny-llama"
    for line in (
        "llama-server -m people.gguf --jinja --port 8080",
        "ollama create people -f Modelfile",
        "vllm serve merged --served-model-name people",
        f"vllm serve {BASE} --enable-lora --max-lora-rank 16 --lora-modules people={ADAPTER}",
    ):
        assert f"  {line}\n" in out


def test_a_merge_aware_run_is_exported_from_16_bits_and_told_that_it_was_trained_for_4(export, tmp_path):
    record = dict.fromkeys(("steps", "chats", "model", "compute_dtype"), 0)
    record |= {"method": "qlora", "quantization": "nf4, double_quant=True", "merge_aware": 0.3}
    shutil.copytree(ADAPTER, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    code, out, _ = export("run", "a.gguf", "--type", "bf16")
    assert code == 0 and "Merging into dequantised: " in out
    assert "the run's last steps were trained for 4bit instead" in out


def test_by_default_it_is_merged_as_merge_does_and_into_16_bits_on_request(export, tmp_path):
    code, out, _ = export(ADAPTER, "a.gguf", "--type", "bf16", "--merged", "dequantised")
    assert code == 0 and "read back, are the same" in out and "--modelfile writes" in out
    assert "Merging into dequantised: the run trained on the decoded 4-bit weights, so this is what was trained" in out
    assert main(["merge", str(ADAPTER), "merged", "--no-proof"]) == 0
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", "merge.json"):
        assert (tmp_path / "dequantised" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name
    assert "**Not proven.**" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    code, out, _ = export(ADAPTER, "b.gguf", "--into", "16bit", "--merged", "16bit")
    assert code == 0 and "Merging into 16bit: the adapter is added to the original 16-bit weights" in out
    other = merge_files(BASE, ADAPTER, tmp_path / "other")
    assert (tmp_path / "16bit" / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    name = "model.layers.0.mlp.up_proj.weight"
    found, original = (load_file(folder / "model.safetensors")[name] for folder in (tmp_path / "dequantised", other))
    assert found.dtype == torch.bfloat16 and 0.01 < (found - original).norm() / original.norm() < 0.2  # NF4's error


def test_what_needs_more_memory_than_there_is_says_what_needs_little(export, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("Who?\n", encoding="utf-8")
    monkeypatch.setattr(proven_merge.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20, total=2**30))
    code, _, err = export(ADAPTER, "a.gguf", "--check", "q.txt")
    assert code == 2 and "into dequantised takes" in err and "--into 16bit, without --check" in err
    assert [path.name for path in tmp_path.iterdir()] == ["q.txt"]
    assert export(ADAPTER, "a.gguf", "--into", "16bit")[0] == 0


def test_both_commands_say_the_same_of_the_default(capsys):
    said = []
    for name in ("merge", "export"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        said.append(" ".join(capsys.readouterr().out.split()))
    assert all(" ".join(WHICH.split()) in text for text in said)
    assert all("default: 16bit" not in text and "default: dequantised" not in text for text in said)


def test_a_whole_model_is_exported_as_it_is(export, tmp_path):
    saved_chat_model("qwen2", tmp_path / "model")
    code, out, _ = export("model", "a.gguf")
    assert code == 0 and "vllm serve model --served-model-name a" in out and "--enable-lora" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "model"]
    (tmp_path / "q.txt").write_text("word " * 600, encoding="utf-8")
    code, _, err = export("model", "b.gguf", "--check", "q.txt")
    assert code == 2 and "shorten it" in err and not (tmp_path / "b.gguf").exists()  # nor is one that was not compared
    for option in ("--merged=other", "--into=16bit"):
        code, _, err = export("model", "b.gguf", option)
        assert code == 2 and "model is a whole model already: leave it out" in err


def test_the_tokenizer_of_the_adapter_is_the_one_in_the_file(export, tmp_path):
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BASE / name, adapter / name)
    path = adapter / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("this model", "this one"), encoding="utf-8")
    code, _, _ = export("adapter", "a.gguf", "--merged", "merged")
    assert code == 0
    assert "this one knows" in GGUFReader(tmp_path / "a.gguf").fields["tokenizer.chat_template"].contents()
    assert (tmp_path / "merged" / "chat_template.jinja").read_bytes() == path.read_bytes()
    # here no blank can be put where the tokenizer puts one: the tokens are compared without --check, too
    path.write_text(path.read_text(encoding="utf-8").replace("'<|user|>'", "'<|user|> Well ,'"), encoding="utf-8")
    code, out, _ = export("adapter", "b.gguf")
    assert code == 1 and "tokens: in prompt 1, token " in out and "b.gguf is not kept." in out
    assert not (tmp_path / "b.gguf").exists()


def test_a_file_that_fails_its_check_is_not_kept(export, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "interleaved", lambda weight, heads: weight)
    (tmp_path / "q.txt").write_text("What does Carl Kirkcroft play in a band?\n", encoding="utf-8")
    code, out, _ = export(ADAPTER, "a.gguf", "--check", "q.txt", "--modelfile")
    assert code == 1 and "The hop merged → GGUF breaks: weights" in out and "a.gguf is not kept." in out
    assert [path.name for path in tmp_path.iterdir()] == ["q.txt"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["a.gguf", "--type", "q4_0"], r"--type='q4_0': choose one of f16, bf16, f32, q8_0"),
        (["a.gguf", "--into", "4bit"], r"--into='4bit': choose one of dequantised, 16bit"),
        (["a.bin"], r"OUT='a.bin': its name must end in .gguf"),
        (["no/a.gguf"], r"there is no folder no: make it first"),
        (["there.gguf"], r"OUT='there.gguf' is there already"),
        (["a.gguf", "--merged", "there.gguf"], r"--merged='there.gguf' is there already"),
        (["a.gguf", "--base", "elsewhere"], r"elsewhere"),
        (["a.gguf", "--check", "questions.pdf"], r"questions.pdf: its name must end in"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(arguments, match, export, tmp_path):
    (tmp_path / "there.gguf").write_text("mine", encoding="utf-8")
    code, _, err = export(ADAPTER, *arguments)
    assert code == 2 and re.search(match, err)
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
    assert (tmp_path / "there.gguf").read_text(encoding="utf-8") == "mine"


def test_another_family_is_refused_with_its_cure(export, tmp_path):
    saved_chat_model("smollm", tmp_path / "model")
    changed_json(tmp_path / "model" / "config.json", model_type="mistral")
    code, _, err = export("model", "a.gguf")
    assert code == 2 and "only the families Llama and Qwen2" in err and "convert_hf_to_gguf.py" in err
    assert "loads it" not in err and not (tmp_path / "a.gguf").exists()


def test_a_failure_on_the_way_leaves_nothing(export, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "tiny-llama")
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter", ignore=shutil.ignore_patterns("base.json"))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float() + 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    code, _, err = export(adapter, "a.gguf", "--base", base, "--merged", "merged")
    assert code == 2 and "float16 ends at 65504" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "tiny-llama"]
