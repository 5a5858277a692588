"""What a run trains and what its optimizer keeps, against arithmetic by hand."""

from dataclasses import replace

import pytest

from qlora_helpers.memory import GPU_RUN, ModelShape
from qlora_helpers.memory.trained import (
    PAGE_POOL,
    SMALLEST_8BIT,
    SMALLEST_PAGED,
    Trained,
    TrainedTensor,
    trained_tensors,
    what_is_trained,
)
from qlora_helpers.units import MIB

# two layers with seven matrices of 512 x 512, and one table of 1,000 x 512
SHAPE = ModelShape.from_config(
    {
        "model_type": "qwen2", "vocab_size": 1_000, "hidden_size": 512, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }
)  # fmt: skip
LORA = replace(GPU_RUN, compute_dtype="bfloat16", adapter_dtype="float32", target_modules=["q_proj"], rank=8)
FULL = replace(GPU_RUN, compute_dtype="bfloat16", method="full")
ADAPTERS = 2 * 2 * 8 * 512  # two layers, two matrices of 8 x 512 each


def test_an_adapter_has_two_matrices_in_each_layer():
    assert trained_tensors(SHAPE, LORA) == [TrainedTensor(4_096, 2), TrainedTensor(4_096, 2)]
    found = what_is_trained(SHAPE, replace(LORA, optimizer="adamw_torch_fused"))
    assert found == Trained(ADAPTERS, 4, 4 * ADAPTERS, 8 * ADAPTERS, 0, 0, 1.0)
    assert found.gradients == 4 * ADAPTERS
    narrow = what_is_trained(SHAPE, replace(LORA, adapter_dtype="bfloat16", optimizer="adamw_torch_fused"))
    assert (narrow.width, narrow.adapters, narrow.states) == (2, 2 * ADAPTERS, 4 * ADAPTERS)


def test_full_fine_tuning_trains_the_table_once_and_the_rest_in_rows():
    matrices, table, biases = 14 * 512 * 512, 1_000 * 512, 2 * 3 * 512
    norms = 5 * 512  # two a layer, and the last
    assert SHAPE.parameters == matrices + table + biases + norms
    assert trained_tensors(SHAPE, FULL) == [
        *[TrainedTensor(512 * 512, 2)] * 7,
        TrainedTensor(table, 1, is_embedding=True),
        TrainedTensor(512, 11),
        TrainedTensor(0, 1),
    ]
    untied = replace(SHAPE, tie_word_embeddings=False)
    assert trained_tensors(untied, FULL)[7:9] == [TrainedTensor(table, 1, is_embedding=True), TrainedTensor(table, 1)]
    found = what_is_trained(SHAPE, replace(FULL, optimizer="adamw_torch_fused"))
    assert (found.parameters, found.width, found.adapters) == (SHAPE.parameters, 2, 0)
    assert found.states == 2 * 2 * (matrices + table) + 11 * 2 * 1_024  # a norm has 1,024 bytes
    assert found.share_of_small == pytest.approx(1 - table * (table * 2 >= MIB) / SHAPE.parameters)


def test_torch_s_adamw_takes_a_copy_of_the_parameters_during_its_step():
    assert what_is_trained(SHAPE, replace(LORA, optimizer="adamw_torch")).temporaries == 4 * ADAPTERS
    assert what_is_trained(SHAPE, replace(LORA, optimizer="adamw_torch_fused")).temporaries == 0


def states(elements: int, optimizer: str, **settings) -> tuple[int, int]:
    """Bytes of the states of one adapter matrix of each side with that many elements: in tensors, in pages."""
    shape = replace(SHAPE, hidden_size=elements // 8, num_hidden_layers=1, head_dim=elements // 16)
    found = what_is_trained(shape, replace(LORA, optimizer=optimizer, **settings))
    assert found.parameters == 2 * elements
    return found.states // 2, found.paged // 2


def test_8_bit_states_have_a_byte_per_element_and_two_scales_per_block():
    assert SMALLEST_8BIT == 4_096
    assert states(SMALLEST_8BIT, "adamw_8bit") == (2 * 4_096 + 2 * 512, 0)  # 16 blocks: 64 bytes, in a piece of 512
    assert states(4_080, "adamw_8bit") == (2 * 16_384, 0)  # 4 bytes each, in pieces of 512
    assert states(262_144, "adamw_8bit") == (2 * 262_144 + 2 * 4_096, 0)
    assert states(SMALLEST_8BIT, "adamw_bnb_8bit", adapter_dtype="bfloat16") == (2 * 4_096 + 2 * 512, 0)


def test_large_states_are_paged_and_their_scales_are_not():
    assert SMALLEST_PAGED == 100_000
    assert states(100_000, "paged_adamw_32bit") == (0, 2 * 400_000)
    assert states(99_984, "paged_adamw_32bit") == (2 * 400_384, 0)
    assert states(100_096, "paged_adamw_8bit") == (2 * 2_048, 2 * 100_096)  # 391 blocks
    assert states(8_192, "paged_adamw_32bit", adapter_dtype="bfloat16") == (
        2 * 32_768,
        0,
    )  # 32 bits, whatever the adapter
    assert states(262_144, "adamw_torch_fused") == (2 * 4 * 262_144, 0)


def test_the_states_of_embeddings_stay_in_32_bits():
    eight = what_is_trained(SHAPE, replace(FULL, optimizer="adamw_8bit"))
    matrices, table = 14 * (2 * 512 * 512 + 2 * 4_096), 2 * 4 * 1_000 * 512
    assert eight.states == matrices + table + 11 * 2 * 4 * 512  # the norms are too small for 8 bits


def test_pages_come_in_pools():
    pages = [Trained(1, 4, 0, 0, paged, 0, 0.0).resident_pages for paged in (0, 1, PAGE_POOL, PAGE_POOL + 1)]
    assert pages == [0, 128 * MIB, 128 * MIB, 256 * MIB]
