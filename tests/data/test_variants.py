"""The starting points of LoRA's variants are what their papers define, and each can be measured."""

import json

import pytest
import torch
from peft import get_peft_model

from data.scripts.measure import held_out, variants
from data.scripts.measure.runs_at_rates import Job, best_rate
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.weights import linear_layers
from tests.support.short_runs import CPU

RANK, SCALING = 16, 2.0


@pytest.fixture(scope="module")
def originals():
    model = load_model(quantization=None, hardware=CPU)
    return {name: layer.weight.detach() for name, layer in linear_layers(model)}


def error(weight, start):
    return ((weight - start).norm() / weight.norm()).item()


def starts(weight):
    """The error of 4 bits alone, and of each start, with the base rounded."""
    found = {"4 bits": error(weight, variants.rounded(weight))}
    for kind, (residual, A, B) in {
        "PiSSA": variants.pissa(weight, RANK, SCALING),
        "LoftQ 1": variants.loftq(weight, RANK, SCALING, 1),
        "LoftQ 5": variants.loftq(weight, RANK, SCALING, 5),
    }.items():
        assert A.shape == (RANK, weight.shape[1]) and B.shape == (weight.shape[0], RANK)
        found[kind] = error(weight, variants.rounded(residual) + SCALING * B @ A)
    return found


def test_base_and_adapter_together_are_nearer_to_the_weight_than_4_bits_alone(originals):
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.3.mlp.down_proj"):
        found = starts(originals[name])
        assert found["LoftQ 5"] < found["LoftQ 1"] < found["4 bits"] < 0.12
        assert found["PiSSA"] < found["4 bits"]


def test_pissa_starts_from_the_largest_principal_components(originals):
    weight = originals["model.layers.1.self_attn.q_proj"]
    residual, A, B = variants.pissa(weight, RANK, SCALING)
    torch.testing.assert_close(residual + SCALING * B @ A, weight)
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(SCALING * B @ A)[:RANK], singular[:RANK], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.linalg.matrix_norm(residual, 2), singular[RANK], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-4)


def test_loftq_with_one_iteration_keeps_the_base_and_adds_what_rounding_has_lost(originals):
    weight = originals["model.layers.1.self_attn.q_proj"]
    residual, A, B = variants.loftq(weight, RANK, SCALING, 1)
    assert residual is weight
    U, S, V = torch.linalg.svd(weight - variants.rounded(weight))
    wanted = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    torch.testing.assert_close(SCALING * B @ A, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LoftQ, 1 iteration", "LoftQ, 5 iterations", "PiSSA"])
def test_the_model_starts_from_its_definition(kind, originals):
    job = Job(kind, 1e-3, 0)
    model = get_peft_model(load_model(hardware=CPU), variants.lora_config(kind, variants.settings_of(job)))
    of_4_bits = variants.error_at_the_start(model, originals)  # B is 0
    variants.start_from(model, kind, originals)
    assert variants.error_at_the_start(model, originals) < of_4_bits
    name, layer = "model.layers.2.mlp.gate_proj", model.get_base_model().get_submodule("model.layers.2.mlp.gate_proj")
    iterations = variants.LOFTQ.get(kind)
    weight = originals[name]
    residual, A, B = (
        variants.loftq(weight, RANK, SCALING, iterations) if iterations else variants.pissa(weight, RANK, SCALING)
    )
    base = layer.get_base_layer()
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(base(x), x @ variants.rounded(residual).T, rtol=1e-4, atol=1e-4)
    assert base.weight.quant_state.nested and base.weight.quant_state.quant_type == "nf4"
    torch.testing.assert_close(layer(x), x @ (variants.rounded(residual) + SCALING * B @ A).T, rtol=1e-3, atol=1e-3)


def test_eva_starts_from_the_directions_in_which_the_inputs_vary_most():
    job = Job("EVA", 1e-3, 0)
    model = get_peft_model(load_model(hardware=CPU), variants.lora_config("EVA", variants.settings_of(job)))
    torch.manual_seed(0)
    labels = torch.randint(5, 100, (2, 3, 20))
    labels[:, :, :8] = -100
    batches = [{"input_ids": part.abs(), "attention_mask": torch.ones_like(part), "labels": part} for part in labels]
    layer = model.get_base_model().get_submodule("model.layers.1.mlp.up_proj")
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 8:].flatten(0, 1)))
    variants.eva(model, batches)
    hook.remove()
    inputs = torch.cat(seen)
    _, _, wanted = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    A = layer.lora_A["default"].weight.detach()
    torch.testing.assert_close((A[:4] @ wanted[:4].T).abs(), torch.eye(4), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(A @ A.T, torch.eye(RANK), rtol=1e-4, atol=1e-4)
    assert not layer.lora_B["default"].weight.any() and not layer._forward_pre_hooks


def test_every_variant_is_tried_at_several_rates_with_several_seeds():
    assert {job.kind for job in variants.JOBS} == {*variants.OF_PEFT, *variants.LOFTQ, variants.PISSA, variants.EVA}
    for kind, rates in variants.RATES.items():
        assert len(rates) >= 3 and list(rates) == sorted(rates), kind
        assert len([job for job in variants.JOBS if job.kind == kind]) == len(rates) * variants.SEEDS


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.everything) for kind in variants.RATES])
def test_the_script_measures_each_variant(kind, monkeypatch):
    short, sets = held_out.training_validation_test, []

    def few(*args):
        sets.append([chats[:size] for chats, size in zip(short(*args), (64, 8, 4), strict=True)])
        return sets[-1]

    monkeypatch.setattr(held_out, "training_validation_test", few)
    monkeypatch.setattr(variants, "BUDGET", {"steps": 2, "batch_size": 4, "warmup_steps": 0})
    scored = []
    monkeypatch.setattr(held_out, "score", lambda model, tokenizer, chats: scored.append(chats) or len(chats))
    found = variants.measure(Job(kind, 1e-3, 0))
    assert found["outcome"] == "ran" and (found["validation"], found["test"]) == (8, 4)
    assert scored == sets[0][1:]
    assert (found["recall_before"] > 0.96) == (kind != "OLoRA"), found  # it rounds the rounded weights again
    assert (found["trained_parameters"] == 262_144) == (kind != "DoRA")  # it trains the lengths of the rows, too
    assert 0 < found["error_at_the_start"] < 0.2


def test_the_best_rate_of_a_variant_is_neither_the_lowest_nor_the_highest_that_was_tried():
    runs = json.loads(variants.TABLE.read_text(encoding="utf-8"))["runs"]
    assert {run["kind"] for run in runs} == set(variants.RATES)
    for kind, rates in variants.RATES.items():
        assert {run["learning_rate"] for run in runs if run["kind"] == kind} == set(rates), kind
        best = best_rate(runs, kind, held_out.exact_match)
        assert rates[0] < best < rates[-1], (kind, best)
        seeds = {run["seed"] for run in runs if run["kind"] == kind and run["learning_rate"] == best}
        assert seeds == set(range(variants.SEEDS)), kind
