"""The bytes of a step's moments, each term against arithmetic by hand. `test_layers.py` compares whole steps with the libraries'."""

from dataclasses import replace

import pytest

from qlora_helpers.memory import GPU_RUN, ModelShape, find_gpu, phases
from qlora_helpers.memory.layers import DecoderLayer, LayerSettings
from qlora_helpers.memory.step import (
    TILE_TOKENS,
    TILE_VOCABULARY,
    _costs,
    cost_of,
    mask_bytes,
    moments_of_a_step,
)
from qlora_helpers.memory.trained import what_is_trained

CONFIG = {
    "model_type": "llama", "vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 1_024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 65_536,
}  # fmt: skip
SHAPE = ModelShape.from_config(CONFIG)
RUN = replace(GPU_RUN, compute_dtype="bfloat16", batch_size=2, max_length=1_024, optimizer="adamw_torch_fused")
H, TOKENS = 512, 2 * 1_024


def how(run=RUN, shape=SHAPE) -> LayerSettings:
    return LayerSettings.of(shape, run, find_gpu("h200"))


def moments(run=RUN, shape=SHAPE) -> dict:
    return moments_of_a_step(shape, run, how(run, shape), what_is_trained(shape, run))


def head(run=RUN, shape=SHAPE):
    return _costs(shape, how(run, shape), True)[2]


@pytest.mark.parametrize(
    ("config", "length", "bytes_of_a_pair"),
    [
        ({"model_type": "mistral"}, 4_095, 0),
        ({"model_type": "mistral"}, 4_096, 1),  # it fills the window
        ({"model_type": "gptj"}, 128, 2),  # eager: as wide as the products
        ({"model_type": "gemma2"}, 128, 4),  # eager, with a window and without
    ],
    ids=str,
)
def test_a_mask_has_an_element_for_each_pair_of_tokens(config, length, bytes_of_a_pair):
    shape, run = ModelShape.from_config(config), replace(RUN, batch_size=3, max_length=length)
    assert mask_bytes(shape, how(run, shape)) == bytes_of_a_pair * 3 * length**2


def test_the_moments_come_in_the_order_of_the_phases():
    """Those of the written-out layers: the peak is in the forward pass or in a layer between only if layers differ."""
    known = [name for name in phases.MOMENTS if name not in ("forward", "middle layer backward", "evaluation")]
    assert list(moments()) == [name for name in known if name != "embeddings backward"]
    assert list(moments(replace(RUN, method="full"))) == known


def test_checkpoints_are_what_one_layer_hands_to_the_next():
    found, x = moments(), TOKENS * H * 2
    assert found["loss"].activations == found["last layer backward"].activations == 4 * x
    assert found["first layer backward"].activations == x and found["optimizer step"].activations == 0
    assert found["loss"].gradients == found["loss backward"].gradients == 0
    upcast = moments(replace(RUN, upcast_fp32=True))
    assert upcast["loss"].activations == 8 * x


def test_autocast_copies_of_float32_adapters_are_there_in_the_forward_pass_alone():
    adapters = what_is_trained(SHAPE, RUN).parameters
    assert [moment.copies for moment in moments().values()] == [2 * adapters, 0, 0, 0, 0]
    assert moments(replace(RUN, adapter_dtype="bfloat16"))["loss"].copies == 0


def test_without_checkpointing_every_layer_keeps_the_same_but_the_first():
    run = replace(RUN, gradient_checkpointing=False)
    by_layers = [moments(run, replace(SHAPE, num_hidden_layers=layers)) for layers in (1, 2, 3)]
    kept = [found["loss"].activations for found in by_layers]
    assert kept[2] - kept[1] == kept[1] - kept[0] > kept[0] > 0
    assert by_layers[2]["last layer backward"].activations == kept[1]
    assert by_layers[2]["first layer backward"].activations == 0
    first, layer, _ = _costs(SHAPE, how(run), False)
    assert first.kept == kept[0] and layer.kept == kept[1] - kept[0]
    full = replace(run, method="full")
    first, layer, _ = _costs(SHAPE, how(full), False)
    assert first == layer  # the embeddings' output needs a gradient


def test_a_first_layer_whose_input_needs_no_gradient_does_not_keep_it():
    run = replace(RUN, gradient_checkpointing=False, target_modules=["down_proj"])
    first, layer, _ = _costs(SHAPE, how(run), False)
    again = cost_of(SHAPE, how(run), DecoderLayer.__call__, keep_input=True, first=True)
    assert first.kept < layer.kept and again.kept >= first.kept


def test_a_checkpoint_that_a_layer_saves_again_counts_once():
    run = replace(
        RUN, upcast_fp32=True, dropout=0.0
    )  # the first norm saves its float32 input, which is the checkpoint itself
    alone = cost_of(SHAPE, how(run), DecoderLayer.__call__, keep_input=False)
    x, found = TOKENS * H * 4, moments(run)["last layer backward"].at_work.total
    assert found == max(alone.forward.total + x, alone.backward.total - x) < alone.backward.total


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_gradients_above_a_layer_are_there_when_the_backward_pass_reaches_it(method):
    run = replace(RUN, method=method)
    trained = what_is_trained(SHAPE, run)
    table = 40_000 * H * 2 if method == "full" else 0
    of_layers = SHAPE.linear_parameters * 2 if method == "full" else trained.gradients
    found = moments(run)
    assert found["last layer backward"].gradients == table
    assert found["first layer backward"].gradients == table + of_layers * 3 // 4
    assert found["optimizer step"].gradients == trained.gradients
    kept = moments(replace(run, accumulation=2))
    assert {moment.gradients for moment in kept.values()} == {trained.gradients}


def test_tied_embeddings_get_a_gradient_besides_that_of_the_head():
    full, table, x = replace(RUN, method="full"), 40_000 * H * 2, TOKENS * H * 2
    assert moments(full)["embeddings backward"].at_work.total == x
    assert moments(full, replace(SHAPE, tie_word_embeddings=True))["embeddings backward"].at_work.total == x + table


# ---- The output head, by TRL's chunked_logprob


@pytest.mark.parametrize(("length", "scored"), [(1, 512), (2, 512), (3, 1_024), (9, 4_096)])
def test_the_last_token_of_a_sequence_is_not_scored(length, scored):
    run = replace(RUN, batch_size=512, max_length=length)
    norm = cost_of(SHAPE, how(run), lambda layer, x: layer.rms_norm(x, H), keep_input=False)
    assert head(run).kept - norm.kept == scored * (H * 2 + 2 * 4)  # 16 bits of each token, two numbers


def test_the_head_works_on_tiles():
    run = replace(RUN, batch_size=1, max_length=16_385)
    assert head(run).forward.tile == TILE_TOKENS * TILE_VOCABULARY * 2
    assert head(replace(run, max_length=1_025)).forward.tile == 1_024 * TILE_VOCABULARY * 2


def test_each_further_token_adds_its_float32_gradient_and_what_it_is_rounded_to():
    run = replace(RUN, batch_size=1, max_length=16_385)
    more = replace(run, max_length=16_385 + 1_024)
    norm, wider = (cost_of(SHAPE, how(r), lambda layer, x: layer.rms_norm(x, H), keep_input=False) for r in (run, more))
    grown = head(more).backward.total - head(run).backward.total
    assert grown == wider.kept - norm.kept + 1_024 * (2 * H + 8 + 4 * H + 2 * H)  # saved, and the two gradients


def test_a_trained_head_has_a_float32_gradient_and_its_16_bit_copy():
    full = replace(RUN, method="full")
    larger = replace(SHAPE, vocab_size=50_000)
    for run, grown in ((full, 10_000 * H * (4 + 2)), (RUN, 0)):
        assert head(run, larger).backward.total - head(run).backward.total == grown
        assert head(run, larger).forward == head(run).forward
