"""The table of what formats cost a real model: what it says of itself, and that its figures belong together."""

import json
import math
from functools import partial

import pytest
import torch

from data.scripts.measure import real_formats
from qlora_helpers.paths import data_path
from qlora_helpers.statistics import ratio

TABLE = json.loads(data_path("measured", "real_formats.json").read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in TABLE["rows"]}
ALL = real_formats.FORMATS | real_formats.WHY
ROUNDED = {name: one for name, one in ALL.items() if isinstance(one, real_formats.Format)}


def test_the_table_has_the_rows_of_its_script_and_says_how_it_was_made():
    assert list(ROWS) == real_formats.ROWS
    assert TABLE["command"] == "python -m data.scripts.measure.real_formats" and TABLE["processor"]
    assert TABLE["threads"] == 1 and {"torch", "transformers"} <= set(TABLE["versions"])
    assert "Q4_1" in TABLE["source"]["weights"] and len(TABLE["source"]["sha256"]) == 64
    assert all(row["seconds"] >= row["processor_seconds"] * 0.9 > 0 for row in TABLE["rows"])


def test_the_text_is_large_enough_and_its_tokens_are_counted():
    assert TABLE["tokens"] == TABLE["pieces"] * (real_formats.PIECE - 1) >= 3_500
    assert 0 < TABLE["loss"] < math.log(49_152)


@pytest.mark.parametrize("name", ROWS)
def test_a_cost_is_the_mean_of_its_pieces_and_its_error_is_theirs(name):
    costs = ROWS[name]["costs"]
    found = ratio(costs, [1] * len(costs))
    assert len(costs) == TABLE["pieces"]
    assert ROWS[name]["cost"] == pytest.approx([found.mean, found.standard_error], abs=2e-5)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_weight_error_is_about_that_of_normal_weights(name):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    error = ((ROUNDED[name](weight) - weight).norm() / weight.norm()).item()
    assert ROWS[name]["weight_error"] == pytest.approx(error, rel=0.12)


def test_pieces_are_of_one_length_and_follow_one_another():
    class Letters:
        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

    rows = real_formats.pieces(Letters())
    assert [len(row["input_ids"]) for row in rows] == [real_formats.PIECE] * real_formats.PIECES
    first = json.loads(data_path(*real_formats.TEXT).read_text(encoding="utf-8").splitlines()[0])["messages"]
    assert "".join(map(chr, rows[0]["input_ids"])).startswith("\n".join(one["content"] for one in first)[:250])


@pytest.fixture(scope="module")
def tiny():
    """The shipped model, and pieces of some of its words."""
    with pytest.MonkeyPatch.context() as patch:
        rows = [{"input_ids": list(range(20 + n, 60 + n)), "assistant_masks": [1] * 40} for n in range(6)]
        patch.setattr(real_formats, "pieces", lambda tokenizer: rows)
        yield real_formats.Reference("tiny-llama")


def test_the_inputs_that_are_added_up_are_those_of_each_layer(tiny):
    seen = {}
    layers = [name for name in tiny.layers if ".0." in name or ".1." in name]

    def watch(name, _, inputs, output):
        seen[name] = inputs[0], output

    hooks = [tiny.layers[name].register_forward_hook(partial(watch, name)) for name in layers]
    tiny._losses(tiny.pieces[: real_formats.WATCHED])
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) == 14
    for name, (inputs, output) in seen.items():
        flat = inputs.flatten(0, -2)
        torch.testing.assert_close(tiny.inputs[name], flat.T @ flat, rtol=1e-4, atol=1e-3)
        assert tiny.outputs[name] == pytest.approx(output.pow(2).sum().item(), rel=1e-3)


def test_a_row_costs_nothing_where_nothing_is_rounded_and_leaves_the_model_as_it_was(tiny, monkeypatch):
    before = {name: layer.weight.clone() for name, layer in tiny.layers.items()}
    rounded = real_formats.measure("INT3, 8 levels", tiny)
    assert rounded["cost"][0] > 0.01 and all(error > 0.1 for error in rounded["output_errors"].values())
    monkeypatch.setitem(real_formats.FORMATS, "as they are", lambda weight: weight.clone())
    found = real_formats.measure("as they are", tiny)
    assert found["costs"] == [0] * 6 and found["weight_error"] == 0
    assert set(found["output_errors"].values()) == set(found["loudest_errors"].values()) == {0}
    assert all(torch.equal(layer.weight, before[name]) for name, layer in tiny.layers.items())


def test_an_output_error_is_that_of_the_outputs(tiny):
    now = real_formats.decoded("NF4", tiny.weights)
    layer = next(name for name in tiny.layers if name.endswith("down_proj"))
    only = {name: now[name] if name == layer else weight for name, weight in tiny.weights.items()}
    seen = []
    hook = tiny.layers[layer].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].flatten(0, -2)))
    tiny._losses(tiny.pieces[: real_formats.WATCHED])
    hook.remove()
    error, weight = now[layer] - tiny.weights[layer], tiny.weights[layer]
    wanted = ((seen[0] @ error.T).norm() / (seen[0] @ weight.T).norm()).item()
    loud = seen[0].pow(2).sum(0).argmax()
    found, layers = real_formats.errors(tiny, only), sum(name.endswith("down_proj") for name in tiny.layers)
    assert found["output_errors"]["down_proj"] * layers == pytest.approx(wanted, rel=1e-2)
    wanted = (error[:, loud].norm() / weight[:, loud].norm()).item()
    assert found["loudest_errors"]["down_proj"] * layers == pytest.approx(wanted, rel=1e-2)
    assert found["output_errors"]["q_proj"] == 0


def test_a_format_may_be_for_one_kind_of_layer(tiny):
    mixed = real_formats.decoded("16 levels, a zero in v_proj", tiny.weights)
    without, with_zero = (
        real_formats.decoded(name, tiny.weights)
        for name in ("INT4, 16 levels without a zero", "16 levels, and a zero between them")
    )
    for layer, weight in mixed.items():
        assert torch.equal(weight, (with_zero if layer.endswith("v_proj") else without)[layer])
        assert not torch.equal(with_zero[layer], without[layer])


def test_what_the_lesson_says_of_the_formats():
    cost = {name: row["cost"][0] for name, row in ROWS.items()}
    with_zero, without = "INT4, 15 levels with a zero", "INT4, 16 levels without a zero"
    assert cost["NF4"] < cost["FP4"] < cost[without] and cost["NF4"] < cost[with_zero] < cost[without]
    assert ROWS[without]["weight_error"] < ROWS[with_zero]["weight_error"]  # and all the same the loss is higher
    assert abs(cost["NF4, double quantisation"] - cost["NF4"]) < 0.03
    for kind, error in ROWS[without]["output_errors"].items():
        assert (error > ROWS[with_zero]["output_errors"][kind]) == (kind == "v_proj")
    assert cost["16 levels, a zero in v_proj"] < cost[with_zero]
