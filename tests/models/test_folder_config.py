"""What came is what was asked for, or the folder is refused by name, before anything in it runs."""

import ast
import io
import json
import re
import shutil
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_helpers.models import loading
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.saving import save_model
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.paths import data_path
from tests.support.short_runs import CPU, TOKENIZER

BASE, ROOT = data_path("tiny-llama"), Path(__file__).resolve().parents[2]


def changed(folder, file="config.json", **entries):
    """A copy of the shipped model with other entries in one of its JSON files."""
    if not folder.exists():
        shutil.copytree(BASE, folder)
    config = json.loads((folder / file).read_text(encoding="utf-8")) | entries
    (folder / file).write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def formats(model):
    return {
        (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested)
        if isinstance(layer, bnb.nn.Linear4bit)
        else None
        for _, layer in linear_layers(model)
    }


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory):
    """A folder for each 4-bit format, saved by the course."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in ("nf4", "fp4"):
        save_model(load_model(quantization=kind, double_quant=kind == "nf4", hardware=CPU), TOKENIZER, folder / kind)
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "fp4", None])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_config_that_says_null_is_one_of_an_unquantised_model(quantization, double_quant, tmp_path):
    name = changed(tmp_path / "null", quantization_config=None)
    model = load_model(name, quantization=quantization, double_quant=double_quant, hardware=CPU)
    assert formats(model) == {(quantization, double_quant) if quantization else None}


@pytest.mark.parametrize(
    ("saved", "method"),
    [
        ({"quant_method": "no_such_method", "bits": 4}, "'no_such_method'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "gptq", "load_in_4bit": True}, "'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes'"),
        ({}, "None"),
        ("nf4", "'nf4'"),
    ],
)
@pytest.mark.parametrize("part", ["whole", "text"])
def test_another_quantisation_is_refused_before_the_weights_are_read(part, saved, method, tmp_path, monkeypatch):
    entry = {"quantization_config": saved}
    name = changed(tmp_path / "other", **(entry if part == "whole" else {"text_config": entry}))
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    for quantization in ("nf4", None):
        with pytest.raises(ValueError, match=rf"^name='.*other': .*quant_method={method}.*pass the 16-bit model"):
            load_model(name, quantization=quantization, hardware=CPU)


@pytest.mark.parametrize(("saved", "double_quant"), [("nf4", True), ("fp4", False)])
def test_a_model_saved_in_4_bits_stays_as_it_was_saved_and_no_other_format_can_be_asked_for(
    saved, double_quant, in_4_bits
):
    name, other = str(in_4_bits / saved), {"nf4": "fp4", "fp4": "nf4"}[saved]
    for quantization in (saved, None):
        assert formats(load_model(name, quantization=quantization, hardware=CPU)) == {(saved, double_quant)}
    with pytest.raises(
        ValueError, match=f"^quantization='{other}': .* was saved in 4 bits as {saved}: pass quantization='{saved}'"
    ):
        load_model(name, quantization=other, hardware=CPU)


def test_a_layer_that_did_not_come_as_asked_is_named(monkeypatch):
    plain = AutoModelForCausalLM.from_pretrained(BASE, trust_remote_code=False)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: plain)
    with pytest.raises(
        ValueError,
        match=r"^quantization='nf4': asks 'tiny-llama' for layers in nf4, with double quantisation, but "
        r"model\.layers\.0\.self_attn\.q_proj came as Linear in torch.bfloat16 \(layers like it: 28\): pass quantization=None",
    ):
        load_model(hardware=CPU)


@pytest.mark.parametrize("asked", [("fp4", True), ("nf4", False)])
def test_a_4_bit_layer_of_another_format_is_named(asked, monkeypatch):
    model = load_model(hardware=CPU)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    with pytest.raises(ValueError, match="q_proj came as nf4, with double quantisation"):
        load_model(quantization=asked[0], double_quant=asked[1], hardware=CPU)


def test_layers_that_transformers_skips_by_name_may_stay_but_not_all(in_4_bits, tmp_path):
    saved = json.loads((in_4_bits / "nf4" / "config.json").read_text())["quantization_config"]
    some = load_model(quantization="nf4", hardware=CPU)
    some.hf_quantizer.modules_to_not_convert.append("down_proj")
    for layer in some.model.layers:
        layer.mlp.down_proj = torch.nn.Linear(512, 256, bias=False)
    loading._check_4_bits(some, "some", "nf4", True)
    name = changed(tmp_path / "none", quantization_config=saved | {"llm_int8_skip_modules": ["model", "lm_head"]})
    with pytest.raises(
        ValueError, match=r"^quantization='nf4': of .*none, only 0\.0 % .* \(named in llm_int8_skip_modules\)"
    ):
        load_model(name, hardware=CPU)
    none = load_model(quantization=None, hardware=CPU)
    none.hf_quantizer = some.hf_quantizer
    none.hf_quantizer.modules_to_not_convert.append("model")
    with pytest.raises(
        ValueError, match=r"^quantization='nf4': asks 'none' for layers in nf4, .* every layer came as unq"
    ):
        loading._check_4_bits(none, "none", "nf4", True)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_double_quant_is_true_or_false(value):
    with pytest.raises(ValueError, match=f"^double_quant={value!r}: must be True or False"):
        load_model(double_quant=value, hardware=CPU)


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_own_code(tmp_path, monkeypatch):
    """A folder that brings its own code, a user who answers "y" to every question, and the file that the code makes."""
    marker = tmp_path / "ran"
    auto_map = {
        "AutoConfig": "mine.Config",
        "AutoModelForCausalLM": "mine.Model",
        "AutoTokenizer": ["mine.Tokenizer", None],
    }
    name = changed(tmp_path / "own", model_type="mine", architectures=["Model"], auto_map=auto_map)
    changed(tmp_path / "own", "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=auto_map)
    (tmp_path / "own" / "mine.py").write_text(OWN_CODE.format(marker=str(marker)))
    (tmp_path / "own" / "custom_generate").mkdir()
    shutil.copy(tmp_path / "own" / "mine.py", tmp_path / "own" / "custom_generate" / "generate.py")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return name, marker


@pytest.mark.parametrize("load", [lambda name: load_model(name, hardware=CPU), load_tokenizer])
def test_code_of_a_folder_never_runs_even_if_the_user_says_yes(load, with_own_code, capfd):
    name, marker = with_own_code
    with pytest.raises(
        ValueError, match=r"^name='.*own': asks for Python code of its own .* never run here: pass a model"
    ):
        load(name)
    assert not marker.exists()
    assert "[y/N]" not in capfd.readouterr().out


def test_a_built_in_architecture_is_loaded_without_the_code_that_lies_beside_it(with_own_code):
    name, marker = with_own_code
    changed(Path(name), model_type="llama")
    assert type(load_model(name, hardware=CPU)).__module__.startswith("transformers.models.llama")
    assert not marker.exists()


def test_the_folder_of_an_adapter_is_not_a_model(tmp_path):
    name = changed(tmp_path / "both")
    shutil.copytree(data_path("adapters", "sentences"), tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"^name='.*both': is the folder of an adapter: load its base"):
        load_model(name, hardware=CPU)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_damaged_config_is_named(content, tmp_path):
    name = changed(tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^name='.*damaged': its config.json is .*: fetch or copy it again"):
        load_model(name, hardware=CPU)
    (tmp_path / "damaged" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^name='.*damaged' has no config.json: pass the folder of a model"):
        load_model(name, hardware=CPU)


def test_every_call_that_could_run_the_code_of_a_folder_forbids_it():
    called = []
    for path in [*ROOT.glob("qlora_helpers/**/*.py"), *ROOT.glob("data/scripts/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(
                r"\b[Aa]uto\w*\.from_(pretrained|config)$", ast.unparse(node.func)
            ):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                called.append(path.name)
                assert options.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
    assert {"loading.py", "meta.py", "t4_gear.py"} <= set(called)
