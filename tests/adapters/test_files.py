"""Adapters as files: reading them, saving and loading them to the last bit, and refusing them on another base."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from notebooks.scripts import forking
from qlora_helpers import evaluation
from qlora_helpers.adapters.files import WrongBase, _base_name, describe, load_adapter, same_name, save_adapter
from qlora_helpers.adapters.merge import merge_into
from qlora_helpers.chats import read_chats, split_question
from qlora_helpers.models.fingerprint import fingerprint, fingerprint_of
from qlora_helpers.models.loading import load_model, name_in, name_of
from qlora_helpers.paths import data_path
from qlora_helpers.safe_folders import NEW
from tests.support.short_runs import CPU, TOKENIZER, adapter, differing

SHIPPED = data_path("adapters", "sentences")
QUESTIONS = [split_question(chat)[0] for chat in read_chats(data_path("chats", "test.jsonl"))[:6]]


def base(quantization="nf4"):
    return load_model(quantization=quantization, hardware=CPU)


@pytest.fixture(scope="module")
def model():
    """The shipped adapter and a second one, with every B halved, on one 4-bit base."""
    model = load_adapter(base(), SHIPPED, "sentences")
    load_adapter(model, SHIPPED, "quiet")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.quiet" in name:
                parameter /= 2
    return model


def test_the_shipped_adapter_is_what_its_card_says():
    files = describe(SHIPPED)
    assert (files.base, files.rank, files.alpha) == ("tiny-llama", 16, 32)
    assert files.modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert files.parameters == sum(tensor.numel() for tensor in adapter(SHIPPED).values()) == 262_144
    assert files.bytes == (SHIPPED / "adapter_model.safetensors").stat().st_size
    assert json.loads((SHIPPED / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    assert files.fingerprint == fingerprint(data_path("tiny-llama"))


def test_the_shipped_adapter_answers_as_its_card_says():
    scores = json.loads((SHIPPED / "scores.json").read_text())
    chats = read_chats(data_path("chats", "test.jsonl"))[:200]
    found = evaluation.exact_match(load_adapter(base(), SHIPPED), TOKENIZER, chats)
    card = (SHIPPED.parent / "README.md").read_text()
    assert f"answers {scores['exact_match']:.1%}".replace("%", " %") in card
    assert scores["test_chats"] == 500 and abs(found - scores["exact_match"]) <= 0.05


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_named(missing, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "adapter")
    (tmp_path / "adapter" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}: it is not the folder of an adapter"):
        describe(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("said", "name"),
    [("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"), ("tiny-llama", "tiny-llama"), ("/home/me/models/tiny-llama", "tiny-llama"),
     ("./models/tiny-llama", "tiny-llama"), ("data/models/tiny-llama", "tiny-llama"), ("/tiny-llama", "tiny-llama"),
     ("../tiny-llama", "tiny-llama"), ("C:\\models\\tiny-llama", "tiny-llama"),
     ("/cache/hub/models--Qwen--Qwen2.5-7B/snapshots/0123abc", "Qwen/Qwen2.5-7B")],
)  # fmt: skip
def test_the_base_of_an_adapter_that_peft_saved_is_found(said, name):
    assert _base_name(said) == name


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("Qwen/Qwen2.5-7B", "Qwen2.5-7B", True), ("Qwen/Qwen2.5-7B", "someone/Qwen2.5-7B", False),
     ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", False), ("tiny-llama", "tiny-llama", True), ("a", "b", False)],
)  # fmt: skip
def test_a_local_copy_is_the_same_model(one, other, same):
    assert same_name(one, other) is same_name(other, one) is same


def test_a_model_of_the_hub_is_known_by_its_name_in_the_cache(tmp_path):
    assert name_in(tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / "0123abc") == "Qwen/Qwen2.5-7B"
    assert name_in(tmp_path / "my-model") == "my-model"


def test_the_working_folder_has_a_name(monkeypatch):
    monkeypatch.chdir(data_path("tiny-llama"))
    assert name_in(Path()) == "tiny-llama" and name_in(Path("..")) == "data"
    assert load_adapter(load_model(".", hardware=CPU), SHIPPED).active_adapters == ["default"]


def test_saved_and_loaded_it_is_the_same_to_the_last_bit(model, tmp_path):
    for name in ("sentences", "quiet"):
        saved = save_adapter(model, tmp_path / name, name)
        assert {path.name for path in saved.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "base.json",
        }
        assert (describe(saved).base, describe(saved).fingerprint) == (
            "tiny-llama",
            fingerprint(data_path("tiny-llama")),
        )
    assert differing(adapter(tmp_path / "sentences"), adapter(SHIPPED)) == []
    halved = {key: tensor / 2 if "lora_B" in key else tensor for key, tensor in adapter(SHIPPED).items()}
    assert differing(adapter(tmp_path / "quiet"), halved) == []


def test_plain_peft_loads_it_too(model, tmp_path):
    plain = PeftModel.from_pretrained(base(), save_adapter(model, tmp_path / "a", "sentences")).eval()
    model.set_adapter("sentences")
    assert evaluation.answer(plain, TOKENIZER, QUESTIONS) == evaluation.answer(model, TOKENIZER, QUESTIONS)


def test_a_name_that_the_model_does_not_have_is_refused(model, tmp_path):
    with pytest.raises(KeyError, match="name='whole': this model's adapters are quiet, sentences"):
        save_adapter(model, tmp_path / "a", "whole")
    with pytest.raises(ValueError, match="name='quiet': the model has an adapter of this name"):
        load_adapter(model, SHIPPED, "quiet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["half", "train", "", "a.b"])
def test_a_name_that_torch_uses_is_refused(name, model):
    with pytest.raises(ValueError, match=f"name='{name}' is one that torch uses itself"):
        load_adapter(model, SHIPPED, name)


def test_an_adapter_of_another_rank_than_its_config_is_refused_before_the_base_is_changed(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"r": 64}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = load_model(hardware=CPU)
    with pytest.raises(
        ValueError, match=r"lora_A.weight has the rank 16 in its adapter_model.safetensors, .* says r=64"
    ):
        load_adapter(base, folder)
    assert not any("lora_" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": "16"}, r"its adapter_config.json says r='16': must be a whole number"),
        ({"r": None}, "says r=None: must be a whole number"),
        ({"lora_alpha": "32"}, "says lora_alpha='32': must be a number"),
        ({"lora_alpha": float("nan")}, "says lora_alpha=nan: must be a number"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "has init_lora_weights='pissa_niter_4': PEFT draws its start, .* anew at",
        ),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(options, match, tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text()) | options
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        load_adapter(load_model(hardware=CPU), folder)


@pytest.mark.parametrize("said", ["tiny-llama/", "tiny-llama/.", "models/tiny-llama/"])
def test_a_slash_at_the_end_of_a_base_s_name_means_nothing(said, tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "a", ignore=shutil.ignore_patterns("base.json"))
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert load_adapter(load_model(hardware=CPU), folder).active_adapters == ["default"]


def test_an_adapter_is_saved_with_the_name_of_its_base_and_not_with_a_path(model, tmp_path):
    saved = save_adapter(model, tmp_path / "a", "sentences")
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"


def test_the_weights_decide_whatever_their_folder_is_called(tmp_path):
    """On Kaggle a model lies in a folder called 1."""
    model = load_model(str(shutil.copytree(data_path("tiny-llama"), tmp_path / "1")), hardware=CPU)
    assert load_adapter(model, SHIPPED).active_adapters == ["default"]


def test_an_adapter_is_not_overwritten_silently(model, tmp_path):
    folder = save_adapter(model, tmp_path / "a", "sentences")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_adapter(model, folder, "quiet")
    assert differing(adapter(folder), adapter(SHIPPED)) == []
    save_adapter(model, folder, "quiet", overwrite=True)
    assert differing(adapter(folder), adapter(SHIPPED)) != []


def crash_while_saving(folder):
    """Run in a separate process: die in the middle of writing the adapter's file."""
    model = load_adapter(load_model(), SHIPPED)
    whole = peft.peft_model.safe_save_file

    def half(tensors, path, **options):
        whole(tensors, path, **options)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    peft.peft_model.safe_save_file = half
    save_adapter(model, folder, overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_crash_while_an_adapter_is_saved_leaves_the_old_one_whole(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "adapter")
    crashed = forking.start(crash_while_saving, folder)
    crashed.join()
    assert crashed.exitcode == -signal.SIGKILL
    (part,) = tmp_path.glob(f".adapter.*{NEW}")
    assert (part / "adapter_model.safetensors").exists()  # it came in the middle of the file
    assert differing(adapter(folder), adapter(SHIPPED)) == []
    assert describe(folder).parameters == 262_144


def test_an_adapter_is_refused_by_another_base_with_the_two_names(tmp_path):
    """If there is no fingerprint to compare."""
    other = tmp_path / "another-llama"
    shutil.copytree(data_path("tiny-llama"), other)
    model = load_model(str(other), hardware=CPU)
    assert name_of(model) == "another-llama"
    adapter = shutil.copytree(SHIPPED, tmp_path / "a", ignore=shutil.ignore_patterns("base.json"))
    with pytest.raises(
        WrongBase, match=r"was trained on 'tiny-llama', and this model is 'another-llama': load 'tiny-llama'"
    ):
        load_adapter(model, adapter)
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """Other weights in a folder of the same name."""
    folder = shutil.copytree(data_path("tiny-llama"), tmp_path_factory.mktemp("random") / "tiny-llama")
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_random_model_of_the_same_name_is_refused_with_both_fingerprints_and_the_cure(
    quantization, model, random_model, tmp_path
):
    saved = save_adapter(model, tmp_path / "a", "sentences")
    other = load_model(str(random_model), quantization=quantization, hardware=CPU)
    one, two = fingerprint(data_path("tiny-llama")), fingerprint(random_model)
    with pytest.raises(
        WrongBase,
        match=f"trained on 'tiny-llama' with the weights {one}, .* weights {two}: load the files that .* delete base",
    ):
        load_adapter(other, saved)
    assert not any("lora_" in name for name, _ in other.named_parameters())
    (saved / "base.json").unlink()  # as the message says
    assert load_adapter(other, saved).active_adapters == ["default"]


def test_an_adapter_fits_every_load_of_its_base_s_files(model, tmp_path):
    saved = save_adapter(model, tmp_path / "a", "sentences")
    copy = shutil.copytree(data_path("tiny-llama"), tmp_path / "elsewhere" / "tiny-llama")
    for loaded in (base(None), base("fp4"), base().dequantize(), load_model(str(copy), hardware=CPU)):
        assert load_adapter(loaded, saved).active_adapters == ["default"]
    float16 = AutoModelForCausalLM.from_pretrained(
        copy, dtype=torch.float16, trust_remote_code=False
    )  # not by load_model
    assert load_adapter(float16, saved).active_adapters == ["default"]


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks there for the size of the vocabulary
def test_an_adapter_is_saved_with_its_base_s_fingerprint_although_the_base_s_folder_has_gone(tmp_path):
    copy = shutil.copytree(data_path("tiny-llama"), tmp_path / "tiny-llama")
    loaded = load_adapter(load_model(str(copy), hardware=CPU), SHIPPED)
    shutil.rmtree(copy)
    assert describe(save_adapter(loaded, tmp_path / "a")).fingerprint == fingerprint(data_path("tiny-llama"))


def test_a_merged_model_is_not_taken_for_the_files_of_its_base(tmp_path):
    merged = merge_into(load_adapter(base(None), SHIPPED))
    assert fingerprint_of(merged) is None
    again = peft.get_peft_model(merged, peft.LoraConfig(target_modules=["q_proj"]))
    assert describe(save_adapter(again, tmp_path / "a")).fingerprint is None


def test_an_option_whose_value_is_not_the_default_is_saved_although_it_counts_as_false(tmp_path):
    """With lora_alpha=0 left out, PEFT would load 8."""
    config = peft.LoraConfig(target_modules=["q_proj"], lora_alpha=0, init_lora_weights=False)
    saved = save_adapter(peft.get_peft_model(base(None), config), tmp_path / "a")
    found = json.loads((saved / "adapter_config.json").read_text())
    assert (found["lora_alpha"], found["init_lora_weights"], describe(saved).alpha) == (0, False, 0)
    assert "use_dora" not in found and "rank_pattern" not in found


@pytest.mark.parametrize(
    ("key", "module"),
    [("layers.0.self_attn.q_proj.lora_A.weight", "q_proj"), ("layers.0.self_attn.q_proj.lora_B.bias", "q_proj"),
     ("layers.0.self_attn.q_proj.lora_magnitude_vector", "q_proj"), ("layers.0.self_attn.q_proj.base_layer.bias", "q_proj"),
     ("embed_tokens.lora_embedding_A", "embed_tokens"), ("embed_tokens.base_layer.weight", "embed_tokens"),
     ("embed_tokens.token_adapter.trainable_tokens_delta", "embed_tokens"), ("lm_head.weight", "lm_head"),
     ("lm_head.modules_to_save.weight", "lm_head"), ("mlp.experts.base_layer.lora_A.weight", "experts")],
)  # fmt: skip
def test_the_layers_of_a_foreign_adapter_are_named(key, module, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "a")
    save_file({f"base_model.model.model.{key}": torch.ones(2, 2)}, tmp_path / "a" / "adapter_model.safetensors")
    assert describe(tmp_path / "a").modules == (module,)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [("adapter_config.json", "{", "adapter_config.json is damaged"), ("adapter_config.json", "[]", "is not a JSON object"),
     ("adapter_config.json", "[" * 100_000, "adapter_config.json is damaged"), ("base.json", "{", "base.json is damaged"),
     ("adapter_config.json", "{}", "has peft_type=None"), ("adapter_config.json", '{"peft_type": "IA3"}', "peft_type='IA3'"),
     ("adapter_config.json", '{"peft_type": "LORA"}', "names no base: write base_model_name_or_path"),
     ("adapter_model.safetensors", "cut", "adapter_model.safetensors is damaged")],
)  # fmt: skip
def test_a_damaged_or_foreign_adapter_is_named(name, content, match, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "a")
    (tmp_path / "a" / name).write_text(content)
    for read in (describe, lambda folder: load_adapter(base(), folder)):
        with pytest.raises(ValueError, match=f"^folder='.*a': .*{match}"):
            read(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {k: v for k, v in t.items() if "layers.2.mlp.up_proj.lora_A" not in k}, "lacks .*layers.2.mlp.up_proj.lora_A"),
        (lambda t: {k: v for k, v in t.items() if "layers.2.mlp.up_proj.lora_B" not in k}, "lacks .*layers.2.mlp.up_proj.lora_B"),
        (lambda t: t | {k.replace("layers.3", "layers.7"): v.clone() for k, v in t.items()}, "no place for on this base.*layers.7"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fill_its_layers_is_refused_and_leaves_the_model_as_it_was(change, match, tmp_path):
    """PEFT warns, and leaves a random A beside a trained B."""
    folder = shutil.copytree(SHIPPED, tmp_path / "a")
    save_file(change(adapter(SHIPPED)), folder / "adapter_model.safetensors")
    loaded = base()
    with pytest.raises(ValueError, match=f"^folder='.*a': its adapter_model.safetensors .*{match}"):
        load_adapter(loaded, folder)
    assert not any("lora_" in name for name, _ in loaded.named_parameters())
    two = load_adapter(loaded, SHIPPED, "whole")
    with pytest.raises(ValueError, match=match):
        load_adapter(two, folder, "broken")
    assert list(two.peft_config) == two.active_adapters == ["whole"]


def test_each_row_of_a_batch_may_have_its_own_adapter(model):
    alone = {}
    for name in ("sentences", "quiet"):
        model.set_adapter(name)
        alone[name] = evaluation.answer(model, TOKENIZER, QUESTIONS)
    with model.disable_adapter():
        alone["__base__"] = evaluation.answer(model, TOKENIZER, QUESTIONS)
    names = ["sentences", "quiet", "__base__"] * 2
    mixed = evaluation.answer(model, TOKENIZER, QUESTIONS, adapters=names, batch_size=4)
    assert mixed == [alone[name][row] for row, name in enumerate(names)]
    assert len({alone[name][0] for name in alone}) > 1


def test_a_batch_needs_an_adapter_for_each_row(model):
    with pytest.raises(ValueError, match="adapters has 1 names for 6 questions"):
        evaluation.answer(model, TOKENIZER, QUESTIONS, adapters=["sentences"])
