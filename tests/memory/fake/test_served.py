"""torch's allocator serving a run that is written down here."""

from dataclasses import replace

import numpy as np
import pytest
from transformers.core_model_loading import dot_natural_key

from qlora_helpers.memory.fake.ledger import ALIVE
from qlora_helpers.memory.fake.served import Traced, _order_of_loading, moments_of, serve
from qlora_helpers.memory.fake.trace import Standing
from qlora_helpers.memory.fake.whole import PART, Timeline
from qlora_helpers.memory.loaded import constant_sizes
from qlora_helpers.memory.tape import rounded
from qlora_helpers.units import MIB
from tests.memory.fake.models import RUN

TABLE = Standing(None, 32 * MIB, 2, "16-bit weights", 2, embedding=True, name="model.embed_tokens.weight")
PACKED = Standing(0, 16 * MIB, 1, "4-bit weights", 1, decoded=32 * MIB, name="model.layers.0.mlp.up_proj.weight")
CONSTANTS = sum(rounded(size) for size in constant_sizes(32 * MIB, RUN.double_quant))  # of the packed weight
ADAPTER = Standing(0, 4 * MIB, 4, "adapters", 4, trained=True)


def of_one_layer(*entries):
    """A pass: (bytes, the part in which it comes, the part in which it goes, or None)."""
    births = [part * PART + 2 * place for place, (_, part, _) in enumerate(entries)]
    deaths = [
        ALIVE if end is None else end * PART + 2 * len(entries) + 1 + place for place, (*_, end) in enumerate(entries)
    ]
    sizes = np.array([size for size, *_ in entries])
    return Timeline(1, sizes, np.full(len(entries), ""), np.array(births), np.array(deaths))


STEP = of_one_layer((64 * MIB, 1, 4), (32 * MIB, 2, 3), (16 * MIB, 4, None))  # activations, loss, gradient


def run(*standing, passes=(STEP,), evaluation=None, workspace=0, **settings):
    traced = Traced(standing, (0,), passes, evaluation, 1)
    return serve(traced, replace(RUN, **settings), workspace)


def test_the_model_is_what_is_handed_out_after_loading():
    assert run(TABLE, PACKED, ADAPTER).loaded == 64 * MIB + 16 * MIB + CONSTANTS
    assert run(TABLE, TABLE).loaded == 128 * MIB


def test_the_copy_that_is_quantised_shows_in_what_the_allocator_holds():
    """A weight comes in 16 bits. Its segment is given back, but for what another weight is in."""
    tiny = of_one_layer((512, 1, 4))
    held = run(TABLE, PACKED, passes=(tiny,)).reserved
    assert held >= 64 * MIB + 16 * MIB + 64 * MIB  # table, packed weight, and its 16-bit original while it is quantised
    assert run(TABLE, passes=(tiny,)).reserved < 64 * MIB + 4 * MIB


def test_each_weight_counts_as_often_as_the_model_has_it():
    traced = Traced((TABLE, PACKED), (0,) * 5, (STEP,), None, 1)
    assert serve(traced, RUN, 0).loaded == 64 * MIB + 5 * (16 * MIB + CONSTANTS)


def test_without_double_quantisation_the_scales_stay_in_float32():
    single = sum(rounded(size) for size in constant_sizes(32 * MIB, False))
    assert run(TABLE, PACKED, double_quant=False).loaded == 64 * MIB + 16 * MIB + single > run(TABLE, PACKED).loaded


def test_the_whole_model_is_in_the_order_of_its_modules():
    head, other = replace(TABLE, name="lm_head.weight"), replace(PACKED, layer=1)
    traced = Traced((TABLE, PACKED, ADAPTER, other, head), (0, 1, 0), (STEP,), None, 2)
    assert list(traced.in_order()) == [
        (None, TABLE), (0, PACKED), (0, ADAPTER), (1, other), (2, PACKED), (2, ADAPTER), (None, head),
    ]  # fmt: skip
    undecided = Traced((TABLE, head), (), (STEP,), None, 0)
    assert list(undecided.in_order()) == [(None, TABLE), (None, head)]


def test_weights_are_loaded_in_the_order_in_which_transformers_takes_them():
    names = ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight", "model.layers.{}.mlp.w2.weight"]
    names += ["model.layers.{}.mlp.w10.weight", "model.layers.{}.input_layernorm.weight"]
    weights = [
        (place if "{}" in name else None, replace(TABLE, name=name.format(3)))  # 3 stands for all layers
        for name in names
        for place in (range(12) if "{}" in name else [None])
    ]
    ours = [
        entry.name.replace("layers.3.", f"layers.{place}.")
        for place, entry in sorted(weights, key=lambda weight: _order_of_loading(*weight))
    ]
    assert ours == sorted(ours, key=dot_natural_key)
    assert ours[:2] == ["lm_head.weight", "model.embed_tokens.weight"] and ours[-1] == "model.norm.weight"
    buffer = None, replace(TABLE, name="")
    assert max([*weights, buffer], key=lambda weight: _order_of_loading(*weight)) == buffer


def test_a_head_that_comes_first_leaves_no_segment_of_its_own():
    """Weights that come later need 16 bits for a while, so the last of them need segments beside the one for all."""
    tiny = of_one_layer((512, 1, 4))

    def held(head):
        big = Standing(None, 300 * MIB, 2, "16-bit weights", 2, name=head)
        return serve(Traced((PACKED, big), (0,) * 20, (tiny,), None, 1), RUN, 0).reserved

    assert held("lm_head.weight") < held("z_head.weight") - 400 * MIB


def test_weights_made_float32_are_loaded_narrow():
    wide = replace(TABLE, width=4)
    served, narrow = run(wide, PACKED), run(TABLE, PACKED)
    assert served.loaded == narrow.loaded
    assert served.moments["forward"] - narrow.moments["forward"] == 64 * MIB


def test_the_second_step_has_the_optimizer_states_beside_it():
    with_states = run(TABLE, ADAPTER).moments
    standing = 64 * MIB + 16 * MIB + 2 * 16 * MIB  # table, adapter, two states in float32
    assert with_states == {
        "forward": standing + 64 * MIB,
        "loss": standing + 96 * MIB,
        "loss backward": standing + 96 * MIB,
        "last layer backward": standing + 64 * MIB + 16 * MIB,
        "embeddings backward": standing + 16 * MIB,
        "optimizer step": standing + 16 * MIB,
    }


@pytest.mark.parametrize(
    ("optimizer", "states", "temporaries"),
    [
        ("adamw_torch_fused", 32 * MIB, 0),
        ("adamw_torch", 32 * MIB, 16 * MIB),  # a square root of each
        ("paged_adamw_32bit", 0, 0),  # in managed memory
        ("adamw_8bit", 2 * 4 * MIB + 2 * 4 * 4 * MIB // 256, 0),
    ],
)
def test_what_an_optimizer_leaves_and_takes(optimizer, states, temporaries):
    moments = run(TABLE, ADAPTER, optimizer=optimizer).moments
    assert moments["forward"] == 64 * MIB + 16 * MIB + states + 64 * MIB
    assert moments["optimizer step"] == 64 * MIB + 16 * MIB + states + 16 * MIB + temporaries


def test_with_accumulation_the_gradients_of_the_first_pass_stay():
    later = of_one_layer((64 * MIB, 1, 4), (32 * MIB, 2, 3))
    alone, two = run(TABLE, ADAPTER).moments, run(TABLE, ADAPTER, passes=(STEP, later)).moments
    assert two["loss"] - alone["loss"] == 16 * MIB
    assert two["optimizer step"] == alone["optimizer step"]


def test_an_evaluation_comes_after_the_steps():
    evaluation = of_one_layer((200 * MIB, 1, 2))
    served, without = run(TABLE, ADAPTER, evaluation=evaluation), run(TABLE, ADAPTER)
    standing = 64 * MIB + 16 * MIB + 2 * 16 * MIB
    assert served.moments == without.moments | {"evaluation": standing + 200 * MIB}
    assert served.reserved > without.reserved


def test_the_workspace_is_there_from_the_first_pass_on():
    served, without = run(TABLE, workspace=64 * MIB), run(TABLE)
    assert served.moments["loss"] - without.moments["loss"] == 64 * MIB
    assert served.loaded == without.loaded


def test_the_moments_of_a_pass_and_when():
    found = moments_of(STEP)
    assert {name: most for name, (most, _) in found.items()} == {
        "forward": 64 * MIB, "loss": 96 * MIB, "loss backward": 64 * MIB, "last layer backward": 80 * MIB,
    }  # fmt: skip
    assert STEP.alive_at(found["loss"][1]).tolist() == [0, 1]
