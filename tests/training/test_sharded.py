"""A sharded model: what is refused; and that it learns what a whole one learns, on CPU processes, where FSDP works over gloo.

accelerate shards on GPUs alone. `tests.support.launched.shard_on_a_cpu` lets it shard CPU processes, with the configurations
of data/accelerate: what a GPU adds, such as streams and page-locked memory, is not tried here but in tests/gpu.
"""

import json
import re
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch

from qlora_helpers.launch import Launch
from qlora_helpers.models.loading import check_storage, load_model
from qlora_helpers.settings import Settings
from qlora_helpers.training.sharded import (
    HeadOnTheGPU,
    ScalesOnTheGPU,
    _gather_until_its_gradient,
    check_sharding,
    prepare_sharding,
)
from tests.support.launched import STEPS, a_run, found, work
from tests.support.short_runs import CPU, adapter, differing
from tests.test_launch import environment_of
from tests.training.test_together import assert_alike

LAUNCH = Launch(2, 0, 0, "fsdp", False, 2)


@pytest.fixture(scope="module")
def floating():
    """The shipped model with its 4-bit codes in float32."""
    return load_model(hardware=CPU, quant_storage="float32")


def test_the_codes_are_the_same_in_any_storage(floating):
    usual = load_model(hardware=CPU)
    for (name, one), (_, other) in zip(usual.named_modules(), floating.named_modules(), strict=True):
        if isinstance(one, bnb.nn.Linear4bit):
            assert one.weight.dtype == torch.uint8 and other.weight.dtype == torch.float32, name
            assert torch.equal(one.weight.view(-1), other.weight.view(-1).view(torch.uint8)), name
            assert torch.equal(one.weight.quant_state.absmax, other.weight.quant_state.absmax), name


def test_integers_cannot_be_split(floating):
    check_storage(floating)
    with pytest.raises(
        ValueError, match=r"quant_storage='uint8': .*q_proj keeps its 4-bit codes so, and FSDP splits no integers"
    ):
        check_storage(load_model(hardware=CPU))


def test_a_storage_that_bitsandbytes_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match="quant_storage='int8': choose one of uint8, float16, bfloat16, float32, or None"
    ):
        load_model(hardware=CPU, quant_storage="int8")


REFUSED = [
    (
        {"method": "full"},
        "method='full': full fine-tuning is not sharded here: adapters alone are gathered and saved. Use 'qlora' or",
    ),
    (
        {"optimizer": "paged_adamw_8bit"},
        "optimizer='paged_adamw_8bit': with sharding='fsdp' choose one of adamw_torch_fused, adamw_torch",
    ),
    ({"compile_layers": True}, "compile_layers=True: it was not tried with sharding='fsdp'"),
    ({"liger_layers": True}, "liger_layers=True: it was not tried with sharding='fsdp'"),
    ({"activation_offloading": True, "gradient_checkpointing": True}, "activation_offloading=True: it was not tried"),
]


@pytest.mark.parametrize(("named", "said"), REFUSED)
def test_what_is_not_sharded_is_refused(named, said, floating):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_sharding(floating, Settings(num_gpus=2, sharding="fsdp", **named), LAUNCH)


def test_what_is_sharded_is_not_refused(floating):
    for optimizer in (None, "adamw_torch", "adamw_torch_fused"):
        check_sharding(floating, Settings(num_gpus=2, sharding="fsdp", optimizer=optimizer), LAUNCH)
    check_sharding(load_model(hardware=CPU), Settings(num_gpus=2, method="full", optimizer="adamw_8bit"), Launch(2))


def test_fsdp_1_is_refused(floating):
    with pytest.raises(ValueError, match="FSDP_VERSION=1: a run is sharded with FSDP 2"):
        check_sharding(floating, Settings(num_gpus=2, sharding="fsdp"), Launch(2, 0, 0, "fsdp", False, 1))


def test_a_trainer_that_accelerate_does_not_shard_is_refused():
    with pytest.raises(ValueError, match="sharding='fsdp': accelerate has not begun it for this run"):
        prepare_sharding(SimpleNamespace(is_fsdp_enabled=False), torch.bfloat16)


def test_the_scales_go_where_the_weights_are_decoded():
    """On a GPU: here the device is the one that has no values."""
    model = load_model(hardware=CPU, quant_storage="float32")
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    ScalesOnTheGPU().on_train_begin(SimpleNamespace(device=torch.device("meta")), None, None, model=model)
    for layer in layers:
        assert layer.quant_state.absmax.device.type == layer.quant_state.state2.absmax.device.type == "meta"
        assert layer.weight.device.type == "cpu"


@pytest.mark.everything
def test_a_sharded_run_learns_what_a_whole_one_learns_and_is_resumed(tmp_path):
    sharded = environment_of("fsdp")
    code, out, err = work(
        2, tmp_path, "two", 'checkpointed:{"gradient_checkpointing": true}', "packed:" + json.dumps({"packing": True}),
        environment=sharded,
    )  # fmt: skip
    assert code == 0, err
    assert out.count("The validation loss was lowest at step") == 3
    whole = a_run(tmp_path / "whole", {})
    two = found(tmp_path, "two")
    assert two.pop("heads_that_trl_gathers") >= STEPS  # on the GPU
    assert two.pop("launch") == {
        "processes": 2,
        "rank": 0,
        "local_rank": 0,
        "sharding": "fsdp",
        "cpu_offload": False,
        "fsdp_version": 2,
    }
    assert_alike(whole, two)
    assert_alike(whole, found(tmp_path, "checkpointed"))
    assert_alike(whole, found(tmp_path, "packed"), losses=1e-3)
    for name in ("adapter_config.json", "base.json"):
        saved = [json.loads((tmp_path / run / "adapter" / name).read_text()) for run in ("two", "whole")]
        for config in saved:  # PEFT writes a set, in an order that differs from process to process
            config["target_modules"] = sorted(config.get("target_modules", []))
        assert saved[0] == saved[1]
    # killed after step 3, it is resumed bit for bit; and on one process within rounding
    code, _, _ = work(2, tmp_path, 'cut:{"dies": [1, 4]}', environment=sharded)
    assert code != 0 and (tmp_path / "cut" / "checkpoint-3" / "optimizer.bin").is_file()
    code, _, err = work(2, tmp_path, 'cut:{"resume": true}', environment=sharded)
    assert code == 0, err
    assert differing(adapter(tmp_path / "cut" / "adapter"), adapter(tmp_path / "two" / "adapter")) == []
    code, _, _ = work(2, tmp_path, 'less:{"dies": [-1, 4]}', environment=sharded)
    code, out, err = work(1, tmp_path, 'less:{"resume": true}', environment=sharded)
    assert code == 0, err
    assert "processes was 2 and is now 1" in out
    less = found(tmp_path, "less")
    assert_alike(whole | {"step_losses": whole["step_losses"][-len(less["step_losses"]) :]}, less)
    # an unsharded process is told how to go on
    with pytest.raises(
        ValueError, match=r"sharding=None: .*checkpoint-\d was written with sharding='fsdp': resume it with accelerate"
    ):
        work(2, tmp_path, 'plain:{"dies": [-1, 4]}', environment=sharded)
        a_run(tmp_path / "plain", {}, resume=True)


@pytest.mark.everything
def test_a_sharded_run_that_offloads_and_one_in_bfloat16(tmp_path):
    code, _, err = work(2, tmp_path, "offloaded", environment=environment_of("fsdp_offload"))
    assert code == 0, err
    whole = a_run(tmp_path / "whole", {})
    offloaded = found(tmp_path, "offloaded")
    assert offloaded["launch"]["cpu_offload"] is True
    assert offloaded["heads_that_trl_gathers"] == 0  # or they would lie in main memory, where the CPU makes the loss
    assert_alike(whole, offloaded)
    code, _, err = work(2, tmp_path, 'half:{"dtype": "bfloat16"}', environment=environment_of("fsdp"))
    assert code == 0, err
    for (_, a), (step, b) in zip(whole["step_losses"], found(tmp_path, "half")["step_losses"], strict=True):
        assert a == pytest.approx(b, rel=0.02), step  # bfloat16 has 8 bits of precision


class Head:
    """What FSDP makes of an output head, as far as `HeadOnTheGPU` uses it."""

    def __init__(self):
        self.seen = []

    def unshard(self):
        self.seen.append("gathered")

    def reshard(self):
        self.seen.append("freed")


def test_an_offloaded_head_is_whole_from_the_end_of_the_decoder_until_its_gradient_is_known():
    head, weight = Head(), torch.ones(3, requires_grad=True)
    output = SimpleNamespace(last_hidden_state=weight * 2)
    _gather_until_its_gradient(head, None, (), output)
    assert head.seen == ["gathered"]
    output.last_hidden_state.sum().backward()
    assert head.seen == ["gathered", "freed"]
    with torch.no_grad():  # an evaluation: it stays until the next step has its gradient
        _gather_until_its_gradient(head, None, (), SimpleNamespace(last_hidden_state=weight * 2))
    assert head.seen == ["gathered", "freed", "gathered"]


def test_a_head_that_is_not_sharded_is_left_alone():
    decoder = torch.nn.Linear(2, 2)
    base = SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(2, 2), base_model=decoder)
    HeadOnTheGPU().on_train_begin(None, None, None, model=SimpleNamespace(get_base_model=lambda: base))
    assert not decoder._forward_hooks
