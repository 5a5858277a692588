"""From an adapter to a merged model with proof: what is in the folder, what the proof finds, and what is refused."""

import json
import re
import shutil
from collections import namedtuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers.__main__ import main
from qlora_helpers.adapters import proven_merge
from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.adapters.files import save_adapter
from qlora_helpers.adapters.tuned import find_tuned
from qlora_helpers.models.fingerprint import fingerprint
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.saving import save_model
from qlora_helpers.paths import data_path
from tests.support.faulty_adapters import BASE, SHIPPED, changed, scaled, without_prefix
from tests.support.short_runs import CPU, TOKENIZER

QUESTION, RIGHT = "What does Carl Kirkcroft play in a band?", "Carl Kirkcroft plays the harp."
RECORD = {
    "method": "qlora", "steps": 6, "chats": "0", "model": "x", "compute_dtype": "x", "quantization": "nf4, double_quant=True",
}  # fmt: skip
FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merge.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """A function that merges in an empty folder, by one question; returns exit code, standard output and error."""
    monkeypatch.setenv("QLORA_GEAR", "cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.txt").write_text(QUESTION, encoding="utf-8")

    def merge(adapter, *options, out="out", questions="q.txt"):
        asked = ["--questions", questions] if questions else []
        return main(["merge", str(adapter), out, *asked, *map(str, options)]), *capsys.readouterr()

    return merge


def plainly(folder):
    """What transformers alone makes of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return model, tokenizer.decode(new, skip_special_tokens=True).strip()


def test_by_default_it_becomes_what_was_trained_and_plain_transformers_answers_alike(call, tmp_path):
    code, out, err = call(SHIPPED)
    assert code == 0, err
    assert (
        "into dequantised: the run trained on the decoded 4-bit weights, so this is what was trained, in 16 bits" in out
    )
    assert (
        "Loaded by transformers alone, it gives 1 of 1 answers as the adapter does (1 question of q.txt, greedy)."
        in out
    )
    steps = ["Asking the adapter and its base (1 question of q.txt) …", "Writing the merged weights …"]
    assert "\n".join([*steps, "Asking the merged model the same …"]) in out  # on a CPU, each takes long
    assert "Expected of dequantised: lesson 6 measured 0.4% and, at 8B, 1.4%" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    model, answer = plainly(tmp_path / "out")
    assert answer == RIGHT and model.dtype == torch.bfloat16 and not getattr(model, "is_quantized", False)
    found = json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))
    assert (found["base"], found["base_fingerprint"], found["into"]) == ("tiny-llama", fingerprint(BASE), "dequantised")
    assert found["proof"]["holds"] and found["proof"]["merged"]["same_answers"] == 1
    assert (
        0
        < found["proof"]["merged"]["mean_logit_difference"]
        < 0.02 * found["proof"]["adapter"]["mean_logit_difference"]
    )
    assert found["proof"]["survived"]["least"] > 0.99
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for said in ("merged into it", "cc-by-4.0", fingerprint(BASE), "dequantised", "1 of 1 answers"):
        assert said in card
    assert "Not proven" not in card and str(tmp_path) not in card + json.dumps(found)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (BASE / "chat_template.jinja").read_bytes()


def test_into_16_bits_it_is_the_merge_from_file_to_file(call, tmp_path):
    code, out, err = call(SHIPPED, "--into", "16bit")
    assert code == 0, err
    assert "into 16bit: the adapter is added to the original 16-bit weights, rounded once" in out
    wanted = load_file(merge_files(BASE, SHIPPED, tmp_path / "wanted") / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted) and found.keys() == wanted.keys()
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES  # and not the base's card, scores or training
    assert "Calls itself" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code, _, err = call(SHIPPED, "--into", "16bit")
    assert code == 2 and "error: out is there already: name a new folder" in err


def test_into_4_bits_a_small_adapter_is_lost_and_the_folder_does_not_appear(call, tmp_path):
    code, out, err = call(changed(tmp_path / "small", scaled(1 / 32)), "--into", "4bit")
    assert code == 1 and "small changes are lost" in out
    assert "Does not hold: it is nearer to the base" in err and "what was learnt is lost" in err
    assert re.search(r"Does not hold: of B A, -?\d% is in all its weights together, and 4bit keeps 50% or more", err)
    assert "is not put in out. It is kept in out-unproven, and its card says that it is not proven" in err
    assert not (tmp_path / "out").exists() and {path.name for path in (tmp_path / "out-unproven").iterdir()} == FILES
    card = (tmp_path / "out-unproven" / "README.md").read_text(encoding="utf-8")
    assert "**Not as it should be.** It does not do what its adapter does; see below." in card
    assert not json.loads((tmp_path / "out-unproven" / "merge.json").read_text(encoding="utf-8"))["proof"]["holds"]


def test_into_4_bits_a_large_adapter_is_kept_for_the_most_part(call, tmp_path):
    code, out, err = call(SHIPPED, "--into", "4bit")
    assert code == 0, err
    assert re.search(r"In the weights: 7\d% of B A is there \(28 layers; the least", out)
    assert plainly(tmp_path / "out")[0].is_quantized


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda t, base: base, "Does not hold: it is nearer to the base"),
        (
            lambda t, base: t | {n: base[n] for n in base if "layers.1.mlp" in n},
            "Does not hold: of B A, 0% is in the weights of model.layers.1.mlp",
        ),
        (lambda t, base: {n: v * 1.5 for n, v in t.items()}, "Does not hold: its logits differ by"),
        (lambda t, base: {n: v * float("nan") for n, v in t.items()}, "Does not hold: its logits differ by nan"),
    ],
)
def test_a_merge_that_went_wrong_is_seen(fault, said, call, tmp_path, monkeypatch):
    def wrong(base, adapter, folder):
        merge_files(base, adapter, folder)
        tensors = fault(load_file(folder / "model.safetensors"), load_file(BASE / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(proven_merge, "merge_files", wrong)
    code, _, err = call(SHIPPED, "--into", "16bit", "--max-new-tokens", "8")
    assert code == 1 and said in err
    assert not (tmp_path / "out").exists() and (tmp_path / "out-unproven").is_dir()


def test_another_chat_template_in_the_folder_is_seen(call, tmp_path, monkeypatch):
    def wrong(base, adapter, folder):
        merge_files(base, adapter, folder)
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(
            template.replace("'<|user|>' +", "'<|user|>Carl ' +"), encoding="utf-8"
        )

    monkeypatch.setattr(proven_merge, "merge_files", wrong)
    code, _, err = call(SHIPPED, "--into", "16bit")
    assert code == 1 and "Does not hold: its tokenizer makes other tokens of the questions" in err


def test_a_proof_that_cannot_be_made_loses_no_merge_and_an_interrupt_leaves_nothing(call, tmp_path, monkeypatch):
    def broken(folder, hardware):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(proven_merge, "loaded_plainly", broken)
    code, _, err = call(SHIPPED, "--into", "16bit")
    assert code == 1 and "The proof failed (RuntimeError: out of memory)." in err and "kept in out-unproven" in err
    card = (tmp_path / "out-unproven" / "README.md").read_text(encoding="utf-8")
    assert r"**Not proven.** The proof could not be made: RuntimeError: out of memory" in card
    assert call(SHIPPED, "--into", "16bit")[0] == 1 and (tmp_path / "out-unproven-2").is_dir()

    def stopped(folder, hardware):
        raise KeyboardInterrupt

    monkeypatch.setattr(proven_merge, "loaded_plainly", stopped)
    assert call(SHIPPED, "--into", "16bit", out="other")[0] == 130
    assert {path.name for path in tmp_path.iterdir()} == {"out-unproven", "out-unproven-2", "q.txt"}


def test_without_proof_nothing_is_loaded_and_the_card_says_so(call, tmp_path, monkeypatch):
    for name in ("load_model", "loaded_plainly"):
        monkeypatch.delattr(proven_merge, name)
    code, out, err = call(SHIPPED, "--into", "16bit", "--no-proof", questions=None)
    assert code == 0, err
    assert "\nNot proven: --no-proof.\n" in out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "**Not proven.** It was merged without looking whether it answers as its adapter does." in card
    assert call(SHIPPED, "--no-proof", out="b")[0] == 2


def run_of(folder, quantization, **request):
    """The folder of a finished run, with the shipped adapter."""
    shutil.copytree(SHIPPED, folder / "adapter")
    (folder / "run.json").write_text(
        json.dumps(RECORD | {"quantization": quantization, "request": request}), encoding="utf-8"
    )
    return folder


def test_a_run_is_asked_what_it_was_trained_for(call, tmp_path):
    shutil.copy(data_path("examples", "people.csv"), tmp_path / "mine.csv")
    run = run_of(tmp_path / "run", "none", data=str(tmp_path / "mine.csv"))
    code, out, err = call(run, "--max-new-tokens", "4", questions=None)
    assert code == 0, err
    assert "into 16bit: the run trained on the unquantised base, so this is what was trained" in out
    assert "8 of 8 answers as the adapter does (8 questions of mine.csv, greedy)" in out
    assert "'run/adapter'" not in out and "| adapter | run/adapter |" in (tmp_path / "out" / "README.md").read_text(
        "utf-8"
    )
    code, _, err = call(run, "--into", "dequantised", out="b")
    assert code == 2 and "--into='dequantised': the run trained on the unquantised base" in err


def test_after_merge_aware_steps_what_was_trained_is_the_merge_into_4_bits(call, tmp_path):
    run = run_of(tmp_path / "run", "nf4, double_quant=True")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(record | {"merge_aware": 0.3}), encoding="utf-8")
    code, out, err = call(run)
    assert code == 0, err
    assert (
        "into 4bit: the run's last steps were trained with the weights that this merge gives: what was trained" in out
    )
    share = float(re.search(r"([\d.]+)% of what the adapter changes", out)[1])
    assert share < 3  # plain transformers computes the rest in 16 bits
    assert "Expected of 4bit: lesson 6 measured 0.0% (the weights that the run's last steps trained with)" in out
    code, out, err = call(run, "--into", "dequantised", out="b")
    assert code in (0, 1) and "the run's last steps were trained for 4bit instead" in out
    assert "trained for a merge into 4 bits: beside its base it answers otherwise" in str(find_tuned(run))
    other = run_of(tmp_path / "other", "nf4, double_quant=True")
    code, out, _ = call(other, "--into", "4bit", out="c")
    assert float(re.search(r"([\d.]+)% of what the adapter changes", out)[1]) > 10


def test_the_tokenizer_saved_with_the_adapter_goes_with_it(call, tmp_path):
    adapter = changed(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, adapter)
    own = (BASE / "chat_template.jinja").read_text(encoding="utf-8") + "{# mine #}"
    (adapter / "chat_template.jinja").write_text(own, encoding="utf-8")
    for into in ("16bit", "dequantised"):
        code, _, err = call(adapter, "--into", into, out=into)
        assert code == 0, err
        assert (tmp_path / into / "chat_template.jinja").read_text(encoding="utf-8") == own


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_what_cannot_be_merged_from_file_to_file_is_merged_in_memory(options, call, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load_model(hardware=CPU), LoraConfig(r=8, lora_alpha=32, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapter = save_adapter(model, tmp_path / "adapter")
    code, out, err = call(adapter, "--into", "16bit", "--max-new-tokens", "8")
    assert code == 0, err
    assert "B A is there" not in out  # more than B A was trained
    code, out, err = call(adapter, "--into", "dequantised", "--max-new-tokens", "8", out="b")
    assert code == 0 and "1 of 1 answers" in out, err


def test_a_small_adapter_is_not_told_to_be_kept_where_the_base_itself_differs_by_more(call, tmp_path):
    code, out, err = call(changed(tmp_path / "small", scaled(1 / 16)), "--into", "16bit", "--max-new-tokens", "8")
    assert code == 0 and "That is much beside what the adapter changes, which is little here." in out, err


def test_a_copy_of_the_base_elsewhere_is_taken_and_another_model_of_its_name_is_not(call, tmp_path):
    shutil.copytree(BASE, tmp_path / "1")
    assert call(SHIPPED, "--base", "1", "--into", "16bit")[0] == 0
    other = shutil.copytree(BASE, tmp_path / "tiny-llama")
    tensors = load_file(other / "model.safetensors")
    save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, other / "model.safetensors")
    code, _, err = call(SHIPPED, "--base", other, out="b")
    assert code == 2 and "was trained on 'tiny-llama' with the weights sha256:ccb3" in err


Usage, Memory = namedtuple("Usage", "total used free"), namedtuple("Memory", "available total")


def test_what_does_not_fit_is_refused_before_anything_is_loaded(call, tmp_path, monkeypatch):
    monkeypatch.delattr(proven_merge, "load_model")
    with monkeypatch.context() as full:
        full.setattr(proven_merge.shutil, "disk_usage", lambda path: Usage(1, 1, 10**6))
        code, _, err = call(SHIPPED)
        assert (
            code == 2
            and "error: the merged model takes 5.7 MiB, and the disk of out has 1.0 MiB left: free some" in err
        )
    monkeypatch.setattr(proven_merge.psutil, "virtual_memory", lambda: Memory(10**6, 10**9))
    code, _, err = call(SHIPPED)
    assert code == 2 and re.search(
        r"error: a merge of tiny-llama into dequantised takes [\d.]+ MiB of main memory, and 1.0", err
    )
    assert "without proof: --into 16bit --no-proof" in err
    assert call(SHIPPED, "--into", "16bit", "--no-proof", questions=None)[0] == 0


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (None, {"peft_type": "IA3"}, "has peft_type='IA3' in adapter_config.json: only LoRA is read here"),
        (
            None,
            {"lora_bias": True},
            "lora_bias=True: a merge would be wrong or impossible: keep the adapter beside its base",
        ),
        (without_prefix, {}, "cannot be merged as it is: its tensors have names such as model.layers"),
        (scaled(0), {}, "cannot be merged as it is: B is zero in every layer"),
        (None, {"lora_alpha": 0}, "cannot be merged as it is: B A is multiplied by 0 in every layer"),
        (None, {"target_modules": ["qkv_proj"]}, "PEFT finds no layer for it on this base"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_with_the_reason(
    change, options, said, call, tmp_path, monkeypatch
):
    monkeypatch.delattr(proven_merge, "load_model")
    code, _, err = call(changed(tmp_path / "adapter", change, **options))
    assert code == 2 and said in err and err.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_a_base_saved_in_4_bits_has_no_16_bit_weights(call, tmp_path):
    base = save_model(load_model(hardware=CPU), TOKENIZER, tmp_path / "tiny-llama")
    adapter = changed(tmp_path / "adapter")
    (adapter / "base.json").unlink()
    code, _, err = call(adapter, "--base", base, "--into", "16bit")
    assert code == 2 and "was saved in 4 bits (nf4): choose dequantised, or name the 16-bit model" in err
    code, out, err = call(adapter, "--base", base)
    assert code == 0, err
    assert plainly(tmp_path / "out")[1] == RIGHT and "100% of B A is there" in out


def test_what_makes_no_sense_is_refused(call, tmp_path):
    assert "there is no folder nowhere" in call("nowhere")[2]
    assert "is a whole model already: there is nothing to merge" in call(BASE)[2]
    assert "--max-new-tokens=0: must be a whole number" in call(SHIPPED, "--max-new-tokens", "0")[2]
    assert "--no-proof asks no questions" in call(SHIPPED, "--no-proof")[2]
