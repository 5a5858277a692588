"""The cheapest changes that make a run fit: each fits, and none could be milder or left out."""

import math
from dataclasses import replace
from itertools import groupby

import pytest

from qlora_helpers.memory import (
    cures,
    find_gpu,
    find_shape,
    longest_sequence,
    predict,
)
from qlora_helpers.memory.ladder import _fused_optimizer
from qlora_helpers.settings import GPU_RUN
from qlora_helpers.units import GIB
from tests.memory.made_up import card

QWEN_7B, LLAMA_8B, LLAMA_70B, GPT_J = map(
    find_shape, ("Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "EleutherAI/gpt-j-6b")
)

WASTEFUL = replace(
    GPU_RUN,  # every cure applies
    compute_dtype="float32", double_quant=False, rank=64, batch_size=12, gradient_checkpointing=False,
    optimizer="adamw_torch", upcast_fp32=True, attention="eager",
)  # fmt: skip

RUNGS = [  # the fields that a cure changes, the cheapest cure first
    {"upcast_fp32"}, {"attention"}, {"optimizer"}, {"optimizer"}, {"compute_dtype"}, {"double_quant"},
    {"gradient_checkpointing"}, {"batch_size"}, {"rank"}, {"target_modules"}, {"method"}, {"max_length"},
]  # fmt: skip


def changed(run, other):
    """The fields that differ, without the accumulation that a smaller batch brings with it."""
    return {name for name, value in vars(run).items() if getattr(other, name) != value} - {"accumulation"}


def test_a_run_that_fits_needs_no_cure():
    needs = predict(QWEN_7B, WASTEFUL, "l4").device_bytes
    assert cures(QWEN_7B, WASTEFUL, card(needs)) == []
    assert cures(QWEN_7B, WASTEFUL, card(needs - 1)) != []


def single_rungs(run, found):
    """The rung of each cure; fails for a cure that is not exactly one rung."""
    places = []
    for change in found:
        names = changed(run, change.settings)
        after = places[-1] + 1 if places else 0
        assert names in RUNGS[after:], (names, "is not a single change, or is out of order")
        places.append(RUNGS.index(names, after))
    return places


def test_all_cures_are_offered_in_the_order_of_their_price():
    """On a card that is one byte too small, whatever saves anything is a cure on its own."""
    run = replace(WASTEFUL, compute_dtype="bfloat16")
    gpu = card(predict(QWEN_7B, run, "l4").device_bytes - 1)
    found = cures(QWEN_7B, run, gpu)
    single_rungs(run, found)
    # torch's fused optimizer saves something only if the optimizer step matters, so "optimizer" can come once or twice
    assert [names for names, _ in groupby(changed(run, change.settings) for change in found)] == [
        {"upcast_fp32"}, {"attention"}, {"optimizer"}, {"double_quant"}, {"gradient_checkpointing"}, {"batch_size"},
        {"rank"}, {"target_modules"}, {"max_length"},
    ]  # fmt: skip
    # the mildest form of each is enough here
    assert {change.settings.batch_size for change in found} == {12, 6}
    assert {change.settings.rank for change in found} == {64, 32}
    assert found[-1].settings.max_length == longest_sequence(QWEN_7B, run, gpu) < run.max_length


def test_an_optimizer_without_temporaries_goes_before_one_with_smaller_states():
    run = replace(GPU_RUN, method="full", optimizer="adamw_torch", max_length=256)
    needs = predict(QWEN_7B, run, "l4")
    assert needs.peak_phase == "optimizer step"
    found = cures(QWEN_7B, run, card(needs.device_bytes - 1))
    assert [change.settings.optimizer for change in found[:2]] == ["adamw_torch_fused", "adamw_8bit"]
    assert [change.settings.method for change in found[2:4]] == ["lora", "qlora"]
    paged = replace(run, optimizer="paged_adamw_32bit")
    found = cures(QWEN_7B, paged, card(predict(QWEN_7B, paged, "l4").device_bytes - 1))
    assert found[0].settings.optimizer == "paged_adamw_8bit", "what was paged stays paged"


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_single_cures_fit_and_are_as_mild_as_may_be(method):
    run = replace(WASTEFUL, method=method, upcast_fp32=method == "qlora", compute_dtype="bfloat16", batch_size=16)
    needs = predict(QWEN_7B, run, "l4").device_bytes
    several = 0
    for share in (0.3, 0.5, 0.7, 0.9, 0.99):
        gpu = card(int(share * needs))
        found = cures(QWEN_7B, run, gpu)
        assert found
        for change in found:
            assert change.prediction == predict(QWEN_7B, change.settings, gpu)
            assert change.prediction.fits
            assert change.what
            assert change.price
            for name in {"batch_size", "rank", "max_length"} & changed(run, change.settings):
                milder = replace(change.settings, **{name: 2 * getattr(change.settings, name)})
                assert not predict(QWEN_7B, milder, gpu).fits
        if len(found) > 1 and method != "full":
            single = [change for change in found if change.settings.method == method and len(change.steps) == 1]
            single_rungs(run, single)
            several += 1
    assert several or method == "full"


def test_every_single_change_that_is_enough_is_listed():
    gpu = card(int(0.6 * predict(QWEN_7B, replace(WASTEFUL, compute_dtype="bfloat16"), "l4").device_bytes))
    run = replace(WASTEFUL, compute_dtype="bfloat16")
    alone = {
        "gradient_checkpointing": True, "upcast_fp32": False, "attention": "sdpa", "optimizer": "adamw_8bit",
        "double_quant": True, "target_modules": ("q_proj", "v_proj"),
    }  # fmt: skip
    enough = {name for name, value in alone.items() if predict(QWEN_7B, replace(run, **{name: value}), gpu).fits}
    assert enough
    found = [change for change in cures(QWEN_7B, run, gpu) if len(change.steps) == 1]
    listed = {name for change in found for name in changed(run, change.settings)} - {"batch_size", "max_length", "rank"}
    assert listed == enough


def test_what_is_already_on_is_not_offered():
    gpu = card(predict(QWEN_7B, GPU_RUN, "l4").device_bytes - 1)
    offered = [changed(GPU_RUN, change.settings) for change in cures(QWEN_7B, GPU_RUN, gpu)]
    assert offered == [{"rank"}, {"target_modules"}, {"max_length"}]
    few = replace(GPU_RUN, rank=4, target_modules=["q_proj", "v_proj"], max_length=256)
    (last,) = cures(QWEN_7B, few, card(predict(QWEN_7B, few, "l4").device_bytes - 1))
    assert last.settings is None
    assert last.steps == ()


def test_a_combination_has_no_change_that_could_be_left_out_or_be_milder():
    run = replace(WASTEFUL, compute_dtype="bfloat16", attention="sdpa", max_length=8_192)
    seen = set()
    for gib in (6.5, 7.5, 9, 11, 13):
        gpu = card(int(gib * GIB))
        (change,) = cures(QWEN_7B, run, gpu)
        assert change.prediction == predict(QWEN_7B, change.settings, gpu)
        assert change.prediction.fits
        names = changed(run, change.settings)
        assert len(names) == len(change.steps) > 1
        assert change.what == "; ".join(what for what, _ in change.steps)
        assert change.price == "; ".join(price for _, price in change.steps)
        order = [names_of for names_of in RUNGS if names_of <= names]
        assert len(order) >= len(change.steps)
        for name in names:
            assert not predict(QWEN_7B, replace(change.settings, **{name: getattr(run, name)}), gpu).fits, name
        for name in {"batch_size", "rank", "max_length"} & names:
            now, before = getattr(change.settings, name), getattr(run, name)
            milder = next(size for size in range(now + 1, before + 1) if before % size == 0)
            assert not predict(QWEN_7B, replace(change.settings, **{name: milder}), gpu).fits
        seen.add(frozenset(names))
    assert len(seen) > 1, "cards of different sizes need different combinations"


def test_a_combination_prefers_cheap_changes():
    run = replace(WASTEFUL, compute_dtype="bfloat16", attention="sdpa", max_length=8_192)
    cheap = replace(run, upcast_fp32=False, optimizer="adamw_8bit", double_quant=True, gradient_checkpointing=True)
    (change,) = cures(
        QWEN_7B, run, card(predict(QWEN_7B, replace(cheap, batch_size=1, accumulation=12), "l4").device_bytes)
    )
    assert not changed(run, change.settings) & {"rank", "target_modules", "max_length"}
    assert changed(run, change.settings) >= {"gradient_checkpointing", "batch_size"}


def test_a_combination_of_cheaper_changes_is_offered_before_the_single_ones():
    run = replace(GPU_RUN, max_length=4_096, batch_size=4, gradient_checkpointing=False, upcast_fp32=True)
    first, *single = cures(LLAMA_8B, run, "4090")
    assert [changed(run, change.settings) for change in single] == [{"max_length"}]
    assert len(first.steps) > 1
    assert "max_length" not in changed(run, first.settings)
    assert first.prediction.fits
    # with one cheap change that is enough, there is nothing to combine
    assert all(len(change.steps) == 1 for change in cures(LLAMA_8B, replace(run, batch_size=1), card(30 * GIB)))


def test_full_fine_tuning_falls_back_to_qlora_with_the_adapters_that_the_settings_name():
    run = replace(GPU_RUN, method="full", rank=8)
    (change,) = cures(LLAMA_8B, run, "t4")
    assert change.settings == replace(GPU_RUN, rank=8)
    assert "QLoRA instead of full fine-tuning" in change.what
    # if QLoRA alone is not enough, its adapters can be made smaller, too
    gpu = card(predict(LLAMA_8B, replace(GPU_RUN, rank=8, max_length=256), "l4").device_bytes - 1)
    (change,) = cures(LLAMA_8B, run, gpu)
    assert change.prediction.fits
    assert change.settings.method == "qlora"
    adapters = LLAMA_8B.lora_parameters(change.settings.rank, change.settings.target_modules)
    assert adapters < LLAMA_8B.lora_parameters(8)


def test_where_nothing_helps_the_one_entry_says_how_much_is_missing():
    (only,) = cures(LLAMA_70B, WASTEFUL, "t4")
    assert only.settings is None
    assert "smaller model" in only.what
    strongest = replace(
        GPU_RUN,
        compute_dtype="float16",
        rank=4,
        target_modules=["q_proj", "v_proj"],
        max_length=256,
        optimizer="adamw_8bit",
    )
    missing = -predict(LLAMA_70B, strongest, "t4").spare_bytes
    assert missing > 0
    assert only.prediction.spare_bytes == -missing
    assert f"{missing / GIB:.2f} GiB" in only.price
    assert "gradient checkpointing" in [what for what, _ in only.steps]


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("EleutherAI/gpt-neox-20b", ("query_key_value",)),
        ("EleutherAI/gpt-j-6b", ("q_proj", "v_proj")),
        ("microsoft/Phi-3-mini-4k-instruct", ("qkv_proj",)),
        ("google/gemma-2-9b", ("q_proj", "v_proj")),
        ("Qwen/Qwen3-8B", ("q_proj", "v_proj")),
        ("mistralai/Mistral-7B-v0.1", ("q_proj", "v_proj")),
    ],
)
def test_fewer_adapters_are_named_as_the_family_names_its_layers(name, adapted):
    shape = find_shape(name)
    found = cures(shape, GPU_RUN, card(predict(shape, GPU_RUN, "l4").device_bytes - 1))
    assert adapted in [change.settings.target_modules for change in found]


@pytest.mark.parametrize("size", [2**40, 10**18 + 3, 2**62, 10**18, 2**63 - 1, math.lcm(*range(1, 41))])
def test_a_huge_batch_is_cured_quickly(asked, size):
    run = replace(GPU_RUN, batch_size=size)
    found = cures(QWEN_7B, run, "l4")
    assert changed(run, found[0].settings) == {"batch_size"}
    assert found[0].settings.batch_size * found[0].settings.accumulation == size
    assert 0 < len(asked) < 100
    asked.clear()
    combined = replace(WASTEFUL, batch_size=size, compute_dtype="bfloat16", max_length=8_192)
    (change,) = cures(QWEN_7B, combined, card(8 * GIB))  # several changes are needed
    assert len(change.steps) > 1 and change.prediction.fits
    assert 0 < len(asked) < 500


def test_no_accumulation_is_offered_that_no_setting_can_hold():
    (none,) = cures(QWEN_7B, replace(GPU_RUN, batch_size=2**40, accumulation=2**40), "l4")
    assert none.settings is None
    run = replace(GPU_RUN, batch_size=64, accumulation=2**58)
    gpu = card(predict(QWEN_7B, replace(run, batch_size=2), "l4").device_bytes - 1)
    assert all(change.settings.batch_size > 2 for change in cures(QWEN_7B, run, gpu))


MISTRAL = replace(find_shape("mistralai/Mistral-7B-v0.1"), num_hidden_layers=2)


def test_shorter_sequences_are_sought_below_those_of_the_run():
    """From the window on a float32 run fits that does not within it: the longest sequence of all is no cure."""
    run = replace(GPU_RUN, compute_dtype="float32", max_length=4_095)
    gpu = card(predict(MISTRAL, replace(run, max_length=3_072), "l4").device_bytes)
    assert longest_sequence(MISTRAL, run, gpu) >= 4_096
    (shorter,) = [change for change in cures(MISTRAL, run, gpu) if changed(run, change.settings) == {"max_length"}]
    assert shorter.settings.max_length == 3_072


def test_the_kernel_that_is_named_is_the_one_that_runs():
    run = replace(GPU_RUN, attention="eager", max_length=8_192)

    def words(**change):
        gpu = card(predict(MISTRAL, replace(run, **change), "l4").device_bytes - 1)
        found = cures(MISTRAL, replace(run, **change), gpu)
        return next(change.what for change in found if change.settings.attention == "sdpa")

    assert words(max_length=4_095) == "attention by sdpa, in FlashAttention"
    assert (
        words() == words(max_length=4_096) == words(compute_dtype="float32") == "attention by sdpa"
    )  # there is a mask


def test_a_change_that_makes_it_worse_is_left_out_of_the_combination():
    """A model of one layer has nothing to gain from checkpointing, which would keep the layer's input besides."""
    shape = replace(find_shape("EleutherAI/pythia-410m"), num_hidden_layers=1, vocab_size=500_000)
    run = replace(GPU_RUN, rank=8, max_length=64, gradient_checkpointing=False, upcast_fp32=True, double_quant=False)
    lowest = replace(run, upcast_fp32=False, double_quant=True, rank=4, target_modules=("query_key_value",))
    gpu = card(predict(shape, lowest, "l4").device_bytes)
    assert not predict(shape, replace(lowest, gradient_checkpointing=True), gpu).fits
    (change,) = cures(shape, run, gpu)
    assert change.settings == lowest
    (too_small,) = cures(shape, run, card(gpu.usable_bytes - 1))
    assert too_small.settings is None and too_small.prediction.spare_bytes == -1


def test_16_bits_are_those_that_the_card_is_fast_in():
    run = replace(GPU_RUN, compute_dtype="float32")
    for name, dtype in (("t4", "float16"), ("l4", "bfloat16")):
        gpu = card(predict(QWEN_7B, run, name).device_bytes - 1, like=name)
        assert cures(QWEN_7B, run, gpu)[0].settings == replace(run, compute_dtype=dtype)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit"])
def test_torch_s_fused_optimizer_is_offered_in_place_of_its_slow_one_alone(optimizer):
    offered = list(_fused_optimizer(QWEN_7B, replace(GPU_RUN, optimizer=optimizer), find_gpu("l4")))
    assert [changed.optimizer for _, _, changed in offered] == ["adamw_torch_fused"] * (optimizer == "adamw_torch")


def test_on_several_gpus_each_keeps_at_least_one_sequence():
    run = replace(GPU_RUN, num_gpus=2, batch_size=24, gradient_checkpointing=False)
    found = cures(QWEN_7B, run, "t4")
    assert found
    for change in found:
        assert change.prediction.fits and change.settings.batch_size % 2 == 0
        assert change.settings.batch_size * change.settings.accumulation == 24


def test_with_sharding_no_cure_is_an_optimizer_that_takes_no_shards():
    run = replace(GPU_RUN, num_gpus=2, batch_size=2, sharding="fsdp", rank=256)
    needs = predict(LLAMA_8B, run, "l4").device_bytes
    found = cures(LLAMA_8B, run, card(needs - 1))
    assert found and all("8bit" not in change.what for change in found)
