"""`doctor --model`: the table, the exit code and the reason, from a name, a folder or a config alone."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_helpers.__main__ import main
from qlora_helpers.models.in_4_bits import in_4_bits
from qlora_helpers.units import MIB
from tests.models.tiny_families import CONFIGS, saved


def doctor(model, capsys):
    code = main(["doctor", "--model", str(model)])
    said = capsys.readouterr()
    assert max(map(len, said.out.splitlines()), default=0) <= 100
    return code, " ".join(said.out.split()), said.err


def written(folder, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["gpt_oss"] | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["tiny-llama", "Qwen/Qwen2.5-7B", "llama-3.1-8b"])
def test_a_known_dense_model_passes(name, capsys):
    code, said, _ = doctor(name, capsys)
    assert code == 0
    assert said.startswith(f"{name}: 100.0 % of the bytes of its decoder's matrices are in 4 bits")
    assert said.endswith("✓ loaded in 4 bits, 100 % of the bytes of its decoder's matrices are in 4 bits")
    assert "assumed" not in said and "its files" not in said


@pytest.mark.parametrize("of_file", [False, True])
def test_a_mixture_fails_with_the_reason_from_its_config_alone(of_file, tmp_path, capsys):
    folder = written(tmp_path / "mixture")
    code, said, _ = doctor(folder / "config.json" if of_file else folder, capsys)
    assert code == 1 and "✗ quantization='nf4': of " in said
    assert "experts, 384.0 KiB (one parameter of 3 dimensions, no nn.Linear)" in said
    assert said.endswith("quantization=None, which loads it without quantisation")


def test_another_quantisation_is_described_and_both_reasons_are_given(tmp_path, capsys):
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    code, said, _ = doctor(written(tmp_path / "mxfp4", quantization_config=entry), capsys)
    assert code == 1 and "· the table is that of the 16-bit model that it was made from" in said
    assert (
        "✗ load_model does not take it as it is (saved in MXFP4, 4 bits a weight; not quantised: lm_head; LoRA can"
        in said
    )
    assert "✗ quantization='nf4': of " in said


def test_what_a_config_leaves_out_is_said(tmp_path, capsys):
    config = {key: value for key, value in CONFIGS["gpt_oss"].items() if key != "vocab_size"}
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _, said, _ = doctor(folder, capsys)
    assert "· assumed, since its config leaves them out: vocab_size=201088, tie_word_embeddings=False." in said


def test_of_a_folder_saved_in_4_bits_the_files_are_measured(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(
        saved("llama", tmp_path / "plain"),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    )
    model.save_pretrained(tmp_path / "quantised")
    code, said, _ = doctor(tmp_path / "quantised", capsys)
    found = in_4_bits(model)
    state = 14 * 110  # besides, a file has a few numbers in JSON for each weight
    assert code == 0 and "· saved in bitsandbytes 4 bits; LoRA can be trained on it" in said
    sizes = [float(size) for size in (said.split("its files: ")[1].split()[0], said.split("in 4 bits, ")[1].split()[0])]
    assert sizes[0] == pytest.approx(found.bytes_in_4_bits / MIB, abs=state / MIB + 0.05)
    assert sizes[1] == pytest.approx((found.total_bytes - found.bytes_in_4_bits) / MIB, abs=0.05)


@pytest.mark.parametrize(
    ("name", "words"),
    [("no-such-model", "model is 'no-such-model', which is not known"), ("no/config.json", "no config.json")],
)
def test_what_is_no_model_is_an_error(name, words, capsys):
    code, said, error = doctor(name, capsys)
    assert code == 2 and not said and words in error


def test_a_damaged_file_is_an_error(tmp_path, capsys):
    (tmp_path / "some.json").write_text("{", encoding="utf-8")
    code, _, error = doctor(tmp_path / "some.json", capsys)
    assert code == 2 and "give the config.json of a model" in error


def test_without_torch_it_says_so(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert doctor("tiny-llama", capsys)[:2] == (
        1,
        "✗ doctor --model needs torch, which is not installed: run doctor without --model for the cure",
    )
