"""Where a step's time goes: how operations are grouped, and a profile of a short run."""

from dataclasses import replace

import pytest
import torch

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


def test_a_profile_of_a_run(tmp_path):
    trainer = trainer_of(tmp_path)
    profile = profile_step(trainer, warm_up=3, profiled=2)
    assert trainer.state.global_step == 5
    assert profile["groups"].keys() == {*GROUPS, REST}
    assert sum(group["share"] for group in profile["groups"].values()) == pytest.approx(1)
    layers = 4 * 7  # each linear layer is decoded forward and backward, but where nothing before it needs a gradient
    assert 1.5 * layers < profile["groups"]["decoding 4-bit weights"]["calls"] / 2 <= 2 * layers
    assert 0 < profile["parts"]["optimizer"]["share"] < profile["parts"]["4-bit layers, without adapters"]["share"] < 1
    assert profile["groups"]["matrix products"]["seconds"] < profile["step_seconds"] < 10


def test_a_profile_that_cannot_be_made_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, settings=replace(SHORT, steps=4))
    with pytest.raises(
        ValueError, match=r"trainer: 4 steps are too few; 5 are needed: 3 to warm up and 2 in the profile"
    ):
        profile_step(trainer, warm_up=3, profiled=2)
    with pytest.raises(ValueError, match="warm_up=1"):
        profile_step(trainer, warm_up=1, profiled=2)
    trainer.model = torch.nn.Linear(1, 1, device="meta")
    with pytest.raises(ValueError, match=r"trainer: its model is on meta, and only a CPU's time is counted"):
        profile_step(trainer, warm_up=2, profiled=1)
