"""The bytes of a loaded model, against arithmetic by hand."""

from dataclasses import replace

import pytest

from qlora_helpers.memory import GPU_RUN, ModelShape
from qlora_helpers.memory.loaded import loaded_bytes, weights_by_part

# one layer with seven matrices of 256 x 256, tables of 1,000 x 256
SHAPE = ModelShape.from_config(
    {
        "model_type": "llama", "vocab_size": 1_000, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }
)  # fmt: skip
LINEARS, REST = 7 * 256 * 256, 2 * 1_000 * 256 + 3 * 256
RUN = replace(GPU_RUN, compute_dtype="bfloat16", upcast_fp32=False, block_size=64)


def test_4_bits_are_half_a_byte_each_and_a_byte_per_block():
    parts = weights_by_part(SHAPE, replace(RUN, method="qlora", double_quant=True))
    # per matrix: 1,024 blocks of 64; four second-level scales, two codebooks and an offset, in pieces of 512 bytes
    assert parts == {
        "4-bit weights": LINEARS // 2,
        "quantisation constants": 7 * (1_024 + 512 + 1_024 + 512 + 512),
        "16-bit weights": 2 * REST + SHAPE.buffer_bytes,
    }


def test_without_double_quantisation_a_block_has_a_float():
    parts = weights_by_part(SHAPE, replace(RUN, method="qlora", double_quant=False))
    assert parts["quantisation constants"] == 7 * (4 * 1_024 + 512)
    larger = weights_by_part(SHAPE, replace(RUN, method="qlora", double_quant=False, block_size=128))
    assert larger["quantisation constants"] == 7 * (4 * 512 + 512)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_without_quantisation_every_weight_has_the_compute_dtype(method):
    parts = weights_by_part(SHAPE, replace(RUN, method=method))
    assert parts == {
        "4-bit weights": 0,
        "quantisation constants": 0,
        "16-bit weights": 2 * (LINEARS + REST) + SHAPE.buffer_bytes,
    }


def test_upcasting_makes_all_but_the_4_bits_float32_and_not_before_training():
    run = replace(RUN, method="qlora", upcast_fp32=True)
    assert weights_by_part(SHAPE, run)["16-bit weights"] == 4 * REST + SHAPE.buffer_bytes
    assert loaded_bytes(SHAPE, run) == sum(weights_by_part(SHAPE, replace(run, upcast_fp32=False)).values())
    assert loaded_bytes(SHAPE, run, "full") == loaded_bytes(SHAPE, replace(run, method="full"))
    full = replace(RUN, method="full", upcast_fp32=True)
    assert weights_by_part(SHAPE, full) == weights_by_part(SHAPE, replace(full, upcast_fp32=False))
