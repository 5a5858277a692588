"""Where a step's time goes: how operations are grouped, and a profile of a short run."""

from dataclasses import replace

import pytest

from qlora_helpers.training.step_profile import GROUPS, REST, group_of, lower_quartile, profile_step, with_shares
from tests.support.short_runs import SHORT, trainer_of


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm_", "matrix products"),  # not "add"
        ("aten::mul", "element by element"),
        ("aten::masked_fill_", "copies and fills"),
        ("aten::sum", "sums and largest values"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("bitsandbytes::dequantize_blockwise", "decoding 4-bit weights"),
        ("bitsandbytes::gemm_4bit", None),  # it only calls others
        ("MatMul4Bit", None),
        ("Optimizer.step#AdamW.step", None),
    ],
)
def test_operations_are_grouped(operation, group):
    assert group_of(operation) == group


def test_a_lower_quartile_is_one_of_the_values():
    assert lower_quartile([9.0]) == 9 and lower_quartile([4, 3, 2, 1, 100, 100, 100, 100]) == 3


def test_the_shares_of_a_step_are_a_whole_even_if_the_profile_took_longer_than_the_step():
    found = {"groups": {"attention": {"seconds": 2.0}}, "parts": {"optimizer": {"seconds": 1.0}}}
    shares = with_shares(found, 8.0)
    assert shares["groups"][REST] == {"seconds": 6.0, "share": 0.75} and shares["parts"]["optimizer"]["share"] == 0.125
    assert with_shares(found, 1.0)["groups"][REST]["share"] == 0
