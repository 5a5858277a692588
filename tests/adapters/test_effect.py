"""Whether an adapter took effect: each cause of none is made, is seen in the logits, and is named."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_helpers.adapters.effect import causes_in, effect_in, effect_of
from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.adapters.merge import merge
from qlora_helpers.adapters.survival import survival
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.saving import save_model
from tests.support.faulty_adapters import BASE, SHIPPED, changed, scaled, without_prefix
from tests.support.short_runs import CPU, TOKENIZER

QUESTIONS = ("What does Carl Kirkcroft play in a band?", "What is the job of Michael Glenwell?")
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.txt"
    path.write_text("\n".join(QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture
def of(asked, tmp_path):
    """The effect of a changed adapter, by the questions above."""

    def effect(change=None, merged=None, base="tiny-llama", **options):
        folder = changed(tmp_path / "adapter", change, **options)
        return effect_of(folder, merged=merged, questions=asked, base=base, max_new_tokens=16, hardware=CPU)

    return effect


def said_by(effect, name):
    assert [cause.name for cause in effect.causes] == [name], effect
    return effect.causes[0].said


def test_the_shipped_adapter_takes_effect(of):
    found = of()
    assert found.took_effect and found.causes == () and found.merged is None
    assert (found.adapter.prompts, found.adapter.same_answers, found.questions) == (2, 0, "2 questions of q.txt")
    assert found.adapter.shift > 0.1 and str(found).endswith("The adapter takes effect.")


def test_tensors_of_a_wrong_prefix_are_not_loaded_and_that_is_said(of):
    found = of(without_prefix)
    assert not found.took_effect and found.adapter.largest_logit_difference == 0
    said = said_by(found, "names")
    name = "model.layers.0.mlp.down_proj.lora_A.weight"
    assert said.startswith(
        f"its tensors have names such as {name}, and PEFT looks for base_model.model.{name}: it loads none"
    )
    assert "Nothing has changed: it has no effect.\nWhy: its tensors have names" in str(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: v for n, v in t.items() if "layers.3" not in n}, "14 of 56 tensors are missing, such as .*layers.3.mlp"),
        (lambda t: t | {f"{Q_PROJ}.lora_C.weight": torch.ones(2, 2)}, "1 are unknown, such as .*lora_C.weight, and are passed"),
        (lambda t: {n.replace("layers.3", "layers.9"): v for n, v in t.items()}, "are missing, .*; 14 are unknown, such as .*layers.9"),
    ],
)  # fmt: skip
def test_tensors_that_are_dropped_or_unknown_are_counted(change, said, tmp_path):
    (cause,) = causes_in(changed(tmp_path / "adapter", change), BASE)
    assert cause.name == "tensors"
    assert re.search(said, cause.said), cause.said


def test_an_adapter_with_a_part_missing_is_compared_as_peft_loads_it(of):
    found = of(lambda t: {n: v for n, v in t.items() if "layers.3" not in n})
    assert found.took_effect and said_by(found, "tensors").startswith("in ")


def test_a_b_that_is_zero_is_found_in_all_layers_or_in_some(of, tmp_path):
    found = of(scaled(0))
    assert not found.took_effect and found.adapter.largest_logit_difference == 0
    assert said_by(found, "zero").startswith("B is zero in every layer, so B A adds nothing there: it was saved before")
    (cause,) = causes_in(changed(tmp_path / "some", scaled(0, only="layers.1.")), BASE)
    assert cause.partly and cause.said.startswith("B is zero in 7 of 28 layers")


def test_a_scale_of_zero_is_found(of, tmp_path):
    found = of(lora_alpha=0)
    assert not found.took_effect and found.adapter.largest_logit_difference == 0
    assert said_by(found, "scale").startswith("B A is multiplied by 0 in every layer (lora_alpha=0, alpha_pattern={})")
    (cause,) = causes_in(changed(tmp_path / "some", alpha_pattern={"q_proj": 0}), BASE)
    assert cause.partly and "in 4 of 28 layers" in cause.said


def test_an_adapter_for_another_base_is_not_asked(of, tmp_path):
    other = shutil.copytree(BASE, tmp_path / "tiny-llama")
    tensors = load_file(other / "model.safetensors")
    save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, other / "model.safetensors")
    found = of(base=str(other))
    assert not found.took_effect and found.adapter is None
    assert "was trained on 'tiny-llama' with the weights sha256:ccb3" in said_by(found, "base")
    assert str(found).startswith("The adapter was not asked")


def test_a_copy_of_the_base_under_another_name_is_its_base(of, tmp_path):
    shutil.copytree(BASE, tmp_path / "1")
    assert of(base=str(tmp_path / "1")).took_effect


def test_layers_that_the_base_does_not_have_are_named(tmp_path):
    (cause,) = causes_in(changed(tmp_path / "adapter", target_modules=["qkv_proj"]), BASE)
    assert (
        cause.name == "tensors" and "PEFT finds no layer for it on this base" in cause.said and "qkv_proj" in cause.said
    )


def test_values_that_are_no_numbers_are_named(tmp_path):
    (cause,) = causes_in(changed(tmp_path / "adapter", scaled(float("nan"), only="layers.2.")), BASE)
    assert cause.name == "not finite" and cause.said.startswith("7 of its 56 tensors hold values that are no finite")


def test_an_adapter_that_is_disabled_or_not_chosen_is_told_by_the_model():
    model = load_adapter(load_model(hardware=CPU), SHIPPED)
    assert effect_in(model, TOKENIZER, CHATS[:1], max_new_tokens=8).took_effect
    model.base_model.disable_adapter_layers()
    found = effect_in(model, TOKENIZER, CHATS[:1], max_new_tokens=8)
    assert not found.took_effect and said_by(found, "disabled").startswith("the adapters are disabled: call ")
    model.base_model.enable_adapter_layers()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    found = effect_in(model, TOKENIZER, CHATS[:1], max_new_tokens=8)
    assert not found.took_effect and said_by(found, "zero").startswith(
        "B is zero in every layer: it is not trained yet"
    )
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM without adapters: load one with load_adapter"):
        effect_in(load_model(hardware=CPU), TOKENIZER, CHATS)


def test_a_merged_folder_that_is_its_base_is_told(of):
    found = of(merged=BASE)
    assert not found.took_effect and found.adapter.shift > 0.1
    assert found.survived.share == pytest.approx(0, abs=0.05) and found.survived.layers == 28
    assert said_by(found, "merge").startswith("the merge has dropped what was learnt (")
    assert "The merged model is its base again, or nearer to it than to the adapter.\nWhy: the merge" in str(found)


def test_a_small_adapter_is_rounded_away_in_4_bits_and_not_in_16(of, tmp_path):
    small = changed(tmp_path / "small", scaled(1 / 32))
    shares = {}
    for into in ("4bit", "dequantised"):
        dtype = None if into == "4bit" else torch.bfloat16
        folder = save_model(merge(small, into, hardware=CPU), TOKENIZER, tmp_path / into, dtype=dtype)
        shares[into] = survival(BASE, small, folder, dtype=torch.float32)
    assert shares["4bit"].share < 0.1 and shares["4bit"].into == "4bit"
    assert shares["dequantised"].least > 0.9 and shares["dequantised"].into == "4bit"
    found = of(scaled(1 / 32), merged=tmp_path / "4bit")
    assert not found.took_effect and "Into 4 bits, a small change is rounded away" in said_by(found, "merge")
