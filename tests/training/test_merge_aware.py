"""Merge-aware steps compute with the weights that a merge gives, bit for bit; only the rounding has no gradient of its own."""

import shutil
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_helpers import evaluation
from qlora_helpers.adapters.drift import logits
from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.adapters.merge import merge, merge_into
from qlora_helpers.chats import read_chats
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import FP4, NF4, dequantize, quantize
from qlora_helpers.training.merge_aware import Linear4bit, MergeAware, first_aware_step, merged_weight
from tests.support.merged_models import SHIPPED, merged_models
from tests.support.short_runs import CPU, SHORT, TOKENIZER, adapter, differing, run

HALF = replace(SHORT, dropout=0.0, merge_aware=0.5)  # the last 3 of 6 steps
TEST = read_chats(data_path("chats", "test.jsonl"))[:40]


def adapted(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def short_name(name):
    return name.removeprefix("base_model.model.")


# The weights


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_the_weight_is_that_of_a_merge_and_of_the_quantiser_written_out_here(kind, double_quant):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load_model(quantization=kind, double_quant=double_quant, hardware=CPU), config)
    found = {short_name(name): merged_weight(layer) for name, layer in adapted(model).items()}
    name, layer = next(iter(adapted(model).items()))
    decoded = dequantize_4bit(layer.get_base_layer())
    by_hand = decoded + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 3.0
    ours = dequantize(quantize(by_hand, {"nf4": NF4, "fp4": FP4}[kind], 64, double_quant=double_quant))
    assert torch.equal(found[short_name(name)], ours)
    merged = merge_into(model)
    assert len(found) == 28
    for name, weight in found.items():
        assert torch.equal(weight, dequantize_4bit(merged.get_submodule(name))), name


def dequantize_4bit(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("most_bytes", [0, 2**30], ids=["made anew", "kept"])
def test_within_the_block_a_model_answers_as_its_merge_and_after_it_as_before(most_bytes):
    model = load_adapter(load_model(hardware=CPU), SHIPPED).eval()
    before, merged = logits(model, TOKENIZER, TEST), logits(merged_models()["4bit"], TOKENIZER, TEST)
    with MergeAware(1).in_layers_of(model, most_bytes) as layers:
        assert layers == 28
        assert torch.equal(logits(model, TOKENIZER, TEST), merged)
    assert torch.equal(logits(model, TOKENIZER, TEST), before)
    assert not torch.equal(before, merged)


def test_a_model_without_adapted_4_bit_layers_is_refused():
    with (
        pytest.raises(ValueError, match=r"^model=LlamaForCausalLM: it has no 4-bit layer with an adapter"),
        MergeAware(1).in_layers_of(load_model(hardware=CPU)),
    ):
        pass


# The gradients


@pytest.mark.parametrize("most_bytes", [0, 2**30], ids=["made anew", "kept"])
def test_gradients_are_those_of_the_straight_through_estimator(most_bytes):
    """Held against autograd's own, of W4 + s·B·A + (W' - W4 - s·B·A) without a gradient for what is in brackets."""
    torch.manual_seed(0)
    model = load_adapter(load_model(hardware=CPU), SHIPPED).train()
    layer = adapted(model)["base_model.model.model.layers.1.mlp.up_proj"]
    A, B = (matrix["default"].weight.requires_grad_() for matrix in (layer.lora_A, layer.lora_B))
    x, outer = torch.randn(2, 5, A.shape[1], requires_grad=True), torch.randn(2, 5, B.shape[0])
    run_at_work = MergeAware(1)
    with run_at_work.in_layers_of(model, most_bytes):
        run_at_work.now = True
        output = layer(x)
        found = torch.autograd.grad((output * outer).sum(), (x, A, B))
    unrounded = dequantize_4bit(layer.get_base_layer()) + B @ A * layer.scaling["default"]
    rounded = unrounded + (merged_weight(layer) - unrounded).detach()
    wanted = torch.nn.functional.linear(x, rounded)
    torch.testing.assert_close(output, wanted)
    for ours, theirs in zip(found, torch.autograd.grad((wanted * outer).sum(), (x, A, B)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert theirs.abs().max() > 0.1


# A run


@pytest.mark.parametrize(
    ("share", "steps", "first"),
    [(1, 6, 1), (0.5, 6, 4), (0.3, 10, 8), (0.3, 200, 141), (0.1, 30, 28), (0.01, 6, 6), (0.5, 5, 3), (1e-12, 5, 6)],
)
def test_the_last_share_of_the_steps_is_merge_aware(share, steps, first):
    assert first_aware_step(share, steps) == first


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return run(tmp_path_factory.mktemp("half") / "run", HALF, validation_chats=TEST)


def test_a_run_is_a_plain_one_up_to_its_first_merge_aware_step(half, tmp_path, capsys):
    plain = run(tmp_path / "run", replace(HALF, merge_aware=None))
    assert "merge it so" not in capsys.readouterr().out
    one, other = ([loss for _, loss in found.step_losses] for found in (half, plain))
    assert one[:3] == other[:3]
    assert all(a != b for a, b in zip(one[3:], other[3:], strict=True))


def test_a_merge_of_what_was_trained_is_what_was_trained(half):
    merged = merge(half.saved_path, "4bit", hardware=CPU)
    with MergeAware(1).in_layers_of(half.model):
        trained = logits(half.model, TOKENIZER, TEST)
        answers = evaluation.answer(half.model, TOKENIZER, [chat[:1] for chat in TEST[:5]])
    assert torch.equal(logits(merged, TOKENIZER, TEST), trained)
    assert evaluation.answer(merged, TOKENIZER, [chat[:1] for chat in TEST[:5]]) == answers
    assert not torch.equal(logits(half.model, TOKENIZER, TEST), trained)


def test_validation_is_of_the_merged_model(half):
    loss = dict(half.validation_history)[half.best_step]
    assert evaluation.loss(merge(half.saved_path, "4bit", hardware=CPU), TOKENIZER, TEST) == pytest.approx(
        loss, rel=1e-5
    )
    assert evaluation.loss(half.model, TOKENIZER, TEST) != pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "checkpointed_layers": 2},
        {"batch_size": 2, "accumulation": 2},
        {"packing": True, "max_length": 128},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_run_learns_the_same_with_other_ways_to_compute_a_step(options, tmp_path, capsys):
    """Rounding turns the last bit of an adapter into a step between two codes now and then, so losses are alike, not equal."""
    settings = replace(HALF, merge_aware=1.0, save_steps=None)
    one = run(tmp_path / "one", settings)
    assert "From step 1 on it was trained with the weights that a merge into 4 bits gives" in capsys.readouterr().out
    other = run(tmp_path / "other", replace(settings, **options))
    assert [loss for _, loss in other.step_losses] == pytest.approx([loss for _, loss in one.step_losses], rel=0.02)


def test_a_resumed_run_ends_as_an_uninterrupted_one_to_the_last_bit(tmp_path):
    """Resumed before its first merge-aware step, which is the fourth, and within them."""
    settings = replace(HALF, save_steps=1, keep_checkpoints=6)
    wanted = adapter(run(tmp_path / "whole", settings).saved_path)
    for step in (2, 5):
        kept, begun = tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"from {step}"
        shutil.copytree(kept, begun / kept.name)
        shutil.copy(tmp_path / "whole" / "run.json", begun)
        assert len(differing(adapter(kept), wanted)) == len(wanted)
        assert differing(adapter(run(begun, settings, resume=True).saved_path), wanted) == []


def test_a_run_cannot_be_resumed_with_another_share(half, tmp_path):
    shutil.copy(half.saved_path.parent / "run.json", tmp_path)
    shutil.copytree(half.saved_path.parent / "checkpoint-5", tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match=r"begun differently: .*merge_aware"):
        run(tmp_path, replace(HALF, merge_aware=1.0), resume=True, validation_chats=TEST)
