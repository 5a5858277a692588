"""From the folder of a run, an adapter or a model to a model that answers."""

import json
import shutil
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_helpers.adapters.files import WrongBase
from qlora_helpers.adapters.tuned import TunedFiles, find_tuned, load_tuned, locate
from qlora_helpers.evaluation import answer
from qlora_helpers.models.fingerprint import fingerprint
from qlora_helpers.models.hub import HubError
from qlora_helpers.paths import data_path
from tests.support.short_runs import CPU

ADAPTER, BASE = data_path("adapters", "sentences"), data_path("tiny-llama")
QUESTION = [{"role": "user", "content": "What does Carl Kirkcroft play in a band?"}]
RECORD = {
    "method": "qlora", "steps": 6, "chats": "0", "model": "x", "compute_dtype": "x", "quantization": "nf4, double_quant=True",
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run in runs/latest of the working folder, with this record, report and base in the adapter's config."""
    monkeypatch.chdir(tmp_path)

    def make(base="tiny-llama", report=None, **record):
        folder = tmp_path / "runs" / "latest"
        shutil.copytree(ADAPTER, folder / "adapter")
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "run.json").write_text(json.dumps(RECORD | record), encoding="utf-8")
        if report is not None:
            (folder / "report.json").write_text(json.dumps({"model": report}), encoding="utf-8")
        return folder

    return make


def layer_of(model):
    return model.get_submodule("model.layers.0.self_attn.q_proj")


def test_a_run_and_its_adapter_are_the_same_thing(run):
    folder = run()
    found = find_tuned()
    assert found.folder.resolve() == folder / "adapter" and str(found.folder) == "runs/latest/adapter"
    assert (found.base, found.quantization, found.double_quant, found.assumed) == ("tiny-llama", "nf4", True, False)
    assert str(found) == "the adapter in runs/latest/adapter on tiny-llama, in 4 bits (nf4)"
    assert find_tuned("runs/latest/adapter") == found
    shutil.copytree(folder / "adapter", folder / "checkpoint-6")
    assert find_tuned(folder / "checkpoint-6") == TunedFiles(folder / "checkpoint-6", "tiny-llama", "nf4")
    shutil.copytree(folder / "adapter", "elsewhere")
    alone = find_tuned("elsewhere")
    assert alone.assumed and str(alone).endswith("in 4 bits (nf4; a guess, since no file says how it was trained)")


@pytest.mark.parametrize(
    ("record", "kind", "double_quant"),
    [
        ({"quantization": "nf4, double_quant=False"}, "nf4", False),
        ({"quantization": "fp4, double_quant=True"}, "fp4", True),
        ({"quantization": "none", "method": "lora"}, None, True),
        ({"quantization": "nf4, double_quant=True", "method": "lora"}, "nf4", True),
    ],
)
def test_the_base_is_loaded_as_it_was_for_training(run, record, kind, double_quant):
    run(**record)
    found = find_tuned()
    assert (found.quantization, found.double_quant) == (kind, double_quant)
    model, _, _ = load_tuned(hardware=CPU)
    layer = layer_of(model.get_base_model()).base_layer
    if kind is None:
        assert not isinstance(layer, bnb.nn.Linear4bit) and str(found).endswith("on tiny-llama, unquantised")
    else:
        assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (kind, double_quant)


def test_it_answers_as_it_was_trained(run):
    run()
    model, tokenizer, found = load_tuned(hardware=CPU)
    assert isinstance(model, PeftModel) and not model.training and found == find_tuned()
    assert answer(model, tokenizer, [QUESTION]) == ["Carl Kirkcroft plays the harp."]


def test_a_base_in_a_folder_is_found_through_the_report(run, tmp_path):
    shutil.copytree(BASE, tmp_path / "elsewhere" / "mine")
    run(base="mine", report=str(tmp_path / "elsewhere" / "mine"))
    assert find_tuned().base == str(tmp_path / "elsewhere" / "mine")
    assert answer(*load_tuned(hardware=CPU)[:2], [QUESTION]) == ["Carl Kirkcroft plays the harp."]
    shutil.move(tmp_path / "elsewhere", tmp_path / "moved")
    gone = (
        "the adapter in runs/latest/adapter was trained on .*elsewhere/mine', which is not on this machine: say where"
    )
    with pytest.raises(ValueError, match=gone + r".*--model FOLDER"):
        load_tuned()
    assert find_tuned(model="moved/mine").base == "moved/mine"
    assert load_tuned(model="moved/mine", hardware=CPU)[2].base == "moved/mine"


def test_without_a_report_the_adapter_s_config_names_the_base(run, tmp_path):
    shutil.copytree(BASE, tmp_path / "mine")
    folder = run(base=str(tmp_path / "mine"))  # as plain PEFT writes it
    assert find_tuned().base == str(tmp_path / "mine")
    (folder / "report.json").write_text("{", encoding="utf-8")  # half written: as if it were not there
    assert find_tuned().base == str(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"was trained on '.*/mine', which is not on this machine"):
        find_tuned()


def test_a_base_from_the_hub_that_cannot_be_fetched_says_how_to_name_a_folder(run):
    run(base="/cache/models--owner--small/snapshots/0123")
    assert find_tuned().base == "owner/small"
    with pytest.raises(HubError, match=r"owner/small is not on this disk.*base of the adapter in .*--model FOLDER"):
        load_tuned(hardware=CPU)


def test_another_base_is_refused(run, tmp_path):
    run()
    shutil.copytree(BASE, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}), encoding="utf-8")
    weights = tmp_path / "other" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1000] ^= 1
    weights.write_bytes(bytes(changed))
    with pytest.raises(WrongBase, match="was trained on 'tiny-llama', and this model is 'other'"):
        load_tuned(model="other", hardware=CPU)


def test_the_tokenizer_that_was_saved_with_the_adapter_is_taken(run):
    folder = run() / "adapter"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder)
    (folder / "chat_template.jinja").write_text("{% generation %}mine{% endgeneration %}", encoding="utf-8")
    assert load_tuned(hardware=CPU)[1].apply_chat_template(QUESTION, tokenize=False) == "mine"


def test_a_whole_model_needs_no_base(run, tmp_path):
    folder = run(method="full", quantization="none")
    shutil.rmtree(folder / "adapter")
    shutil.copytree(BASE, folder / "model")
    model, tokenizer, found = load_tuned(hardware=CPU)
    assert str(found) == "the model in runs/latest/model" and (found.base, found.quantization) == (None, None)
    assert not isinstance(model, PeftModel) and not isinstance(layer_of(model), bnb.nn.Linear4bit)
    assert tokenizer.name_or_path.endswith("runs/latest/model") and not model.training
    with pytest.raises(ValueError, match="model='tiny-llama': runs/latest/model is a whole model, which needs no base"):
        find_tuned(model="tiny-llama")
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"runs/latest/model has no tokenizer.json: copy the tokenizer of its base"
    ):
        load_tuned(hardware=CPU)


def test_where_there_is_nothing_the_error_says_how_to_make_it(run, tmp_path):
    folder = run()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    makes = r"make a run with  python -m qlora_helpers run  or name"
    with pytest.raises(FileNotFoundError, match=f"there is no folder nowhere: {makes}"):
        locate("nowhere")
    with pytest.raises(FileNotFoundError, match=f"empty holds no adapter, no model and no run: {makes}"):
        locate("empty")
    with pytest.raises(NotADirectoryError, match="file is a file: name the folder of a run"):
        locate("file")
    (folder / "adapter").rename(folder / "checkpoint-4")
    with pytest.raises(
        FileNotFoundError, match=r"run in .* is not finished: continue it .* --resume --output [^ ]*latest$"
    ):
        locate(folder)
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"latest, or name its last checkpoint, .*checkpoint-4$"):
        locate(folder)


def test_looking_for_it_needs_no_torch():
    code = f"""
import sys
from qlora_helpers.adapters.tuned import locate
print(locate({str(ADAPTER)!r}), "torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ADAPTER), "False"]


def test_a_checkpoint_knows_its_base_by_the_record_of_its_run(run, tmp_path):
    """The trainer saves it without a fingerprint: the name of the base's folder must not decide."""
    folder = run(base=str(tmp_path / "gone" / "mine"))
    checkpoint = shutil.copytree(
        folder / "adapter", folder / "checkpoint-6", ignore=shutil.ignore_patterns("base.json")
    )
    shutil.copytree(BASE, tmp_path / "elsewhere")
    with pytest.raises(WrongBase, match="was trained on 'mine', and this model is 'elsewhere'"):
        load_tuned(checkpoint, "elsewhere", hardware=CPU)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(record | {"base": fingerprint(BASE)}), encoding="utf-8")
    assert answer(*load_tuned(checkpoint, "elsewhere", hardware=CPU)[:2], [QUESTION]) == [
        "Carl Kirkcroft plays the harp."
    ]
    other = shutil.copytree(BASE, tmp_path / "mine")
    tensors = load_file(other / "model.safetensors")
    save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, other / "model.safetensors")
    with pytest.raises(WrongBase, match="was trained on 'mine' with the weights sha256:ccb3"):
        load_tuned(checkpoint, "mine", hardware=CPU)
