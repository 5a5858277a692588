"""The fastest run that fits into a budget of memory."""

from dataclasses import replace

import pytest

from qlora_helpers.memory import AnyShape, budget, find_gpu, find_shape, predict
from qlora_helpers.memory.budget import LEAST_MARGIN, MARGIN, _splits, plan_for
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.units import GIB

EIGHT = find_shape("llama-3.1-8b")
CARD = find_gpu("h200")
RUN = replace(GPU_RUN, batch_size=4, max_length=2048, dropout=0.0, compute_dtype="bfloat16", memory_budget="auto")


def plan(gib, settings=RUN, shape=EIGHT):
    return plan_for(shape, settings, CARD, int(gib * GIB))


@pytest.mark.parametrize("gib", [9.8, 14.3, 24, 48, 139])
def test_what_is_chosen_fits_with_the_margin_and_keeps_the_chats_of_a_step(gib):
    found = plan(gib)
    chosen = found.chosen
    assert chosen.settings.batch_size * chosen.settings.accumulation == 4
    assert chosen.prediction.device_bytes <= found.budget - max(MARGIN * found.budget, LEAST_MARGIN)
    assert chosen.settings.memory_budget is None
    for other in found.others:
        if other.prediction.device_bytes <= found.budget - found.margin:
            assert other.cost >= chosen.cost
    again = predict(EIGHT, chosen.settings, CARD)
    assert again.device_bytes == chosen.prediction.device_bytes


def test_more_memory_is_never_slower():
    costs = [plan(gib).chosen.cost for gib in (9.5, 10, 12, 14.3, 20, 24, 48, 80, 139)]
    assert costs == sorted(costs, reverse=True)


def test_the_whole_card_checkpoints_nothing_and_little_memory_offloads():
    assert not plan(139).chosen.settings.gradient_checkpointing
    assert plan(14.3).chosen.settings.checkpointed_layers is not None
    least = plan(9.8).chosen.settings
    assert least.activation_offloading and least.gradient_checkpointing


def test_no_layer_less_could_be_checkpointed():
    found = plan(24)
    chosen = found.chosen.settings
    one_less = predict(EIGHT, replace(chosen, checkpointed_layers=chosen.checkpointed_layers - 1), CARD)
    assert one_less.device_bytes > found.budget - found.margin


def test_a_step_is_split_only_where_that_is_needed():
    many = replace(RUN, batch_size=1, accumulation=32)
    assert plan(139, many).chosen.settings.batch_size > 4
    little = plan(9.2, many).chosen.settings
    assert little.batch_size * little.accumulation >= 32 and little.batch_size <= 4


@pytest.mark.parametrize("chats", [1, 2, 7, 16, 97, 100, 1000])
def test_the_splits_of_a_step_hold_all_its_chats_in_the_fewest_passes(chats):
    splits = _splits(chats)
    assert splits[0] == (1, chats) and splits[-1] == (chats, 1)
    assert [rows for _, rows in splits] == sorted({-(-chats // passes) for passes in range(1, chats + 1)}, reverse=True)
    for passes, rows in splits:
        assert rows * passes >= chats > rows * (passes - 1)
    assert len(_splits(10**9)) < 70_000


def test_a_plan_for_many_chats_asks_for_few_predictions(monkeypatch):
    asked = []
    monkeypatch.setattr(budget, "predict", lambda *given: asked.append(given) or predict(*given))
    plan(9.5, replace(RUN, batch_size=1, accumulation=1000))
    many = len(asked)
    with pytest.raises(ValueError, match="is too little"):
        plan(6, replace(RUN, batch_size=1, accumulation=1000))
    assert many < 40 and len(asked) - many < 6


def test_too_little_is_refused_with_the_least_that_would_do():
    with pytest.raises(
        ValueError, match=r"memory_budget=6442450944: 6.00 GiB, 256.0 MiB of it left free, is too little"
    ):
        plan(6)
    with pytest.raises(ValueError, match=r"the least that the run can do with is 1 x 2048 tokens at once, all layers"):
        plan(6)


def test_what_is_printed_says_what_was_chosen_and_what_else_there_was():
    said = str(plan(24))
    assert said.startswith("Memory budget 24.00 GiB, 983.0 MiB of it left free. Chosen: 4 x 2048 tokens at once, ")
    assert "does not fit" in said and "slower" in said and "faster" in said


def test_any_family_that_the_libraries_can_build_has_a_plan():
    shape = AnyShape.from_config(
        {
            "model_type": "gemma3_text", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 512, "sliding_window": 64,
        }
    )  # fmt: skip
    settings = Settings(batch_size=8, max_length=256, compute_dtype="bfloat16", gradient_checkpointing=True)
    free = plan_for(shape, settings, CARD, 4 * GIB).chosen.prediction.device_bytes
    found = plan_for(shape, settings, CARD, int(0.995 * free) + LEAST_MARGIN)
    assert 0 < (found.chosen.settings.checkpointed_layers or 6) <= 6


# ---- What the settings of speed change in a prediction


def test_offloaded_checkpoints_take_the_same_however_many_layers_there_are():
    run = replace(RUN, batch_size=1, max_length=16_384, memory_budget=None)
    kept = predict(EIGHT, run, CARD)
    moved = predict(EIGHT, replace(run, activation_offloading=True), CARD)
    checkpoints = 32 * 16_384 * 4096 * 2
    assert kept.parts["checkpointed activations"] == checkpoints
    assert 0.85 * checkpoints < kept.peak_allocated_bytes - moved.peak_allocated_bytes < checkpoints
    assert moved.road == "libraries"


def test_offloading_on_an_h200_with_a_t4_s_kernels():
    """8B, float16, 16,384 tokens: 10.0 GiB offloaded and 13.6 GiB not, measured."""
    run = replace(RUN, batch_size=1, max_length=16_384, compute_dtype="float16", memory_budget=None)
    t4 = replace(CARD, compute_capability=(7, 5))
    assert predict(EIGHT, run, t4).peak_allocated_bytes / GIB == pytest.approx(13.6, abs=0.1)
    moved = predict(EIGHT, replace(run, activation_offloading=True), t4)
    assert moved.peak_allocated_bytes / GIB == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize(
    ("option", "part"),
    [("packing", "packing"), ("compile_layers", "compiled layers"), ("liger_layers", "liger's layers")],
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_parts_add_up_with_each_option(option, part, checkpointing):
    run = replace(RUN, memory_budget=None, gradient_checkpointing=checkpointing)
    plain, found = predict(EIGHT, run, CARD), predict(EIGHT, replace(run, **{option: True}), CARD)
    inside = {name: size for name, size in found.parts.items() if name not in ("optimizer (paged)", "CUDA context")}
    assert sum(inside.values()) == found.peak_allocated_bytes == max(found.phases.values())
    assert found.peak_allocated_bytes - plain.peak_allocated_bytes == found.parts[part] != 0


def test_segments_that_grow_leave_little_unused():
    run = replace(RUN, memory_budget=None)
    plain, found = predict(EIGHT, run, CARD), predict(EIGHT, replace(run, expandable_segments=True), CARD)
    assert found.peak_allocated_bytes == plain.peak_allocated_bytes
    assert found.peak_allocated_bytes < found.peak_reserved_bytes < plain.peak_reserved_bytes


def test_a_model_whose_config_counts_no_layers_has_a_plan(monkeypatch):
    shape = AnyShape.from_config({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512})
    monkeypatch.setattr(AnyShape, "num_hidden_layers", 0)
    settings = Settings(batch_size=4, max_length=128, compute_dtype="bfloat16", gradient_checkpointing=True)
    assert not plan_for(shape, settings, CARD, 8 * GIB).chosen.settings.gradient_checkpointing


def test_the_budget_of_several_gpus_is_that_of_each():
    """The chats of a step are shared out, and each GPU is planned for as if it were alone, beside DDP's buckets and NCCL."""
    two = plan(24, replace(RUN, num_gpus=2, batch_size=8)).chosen
    assert two.settings.batch_size % 2 == 0 and two.settings.batch_size * two.settings.accumulation == 8
    assert two.settings.num_gpus == 2 and two.prediction.parts["NCCL"] > 0
    alone = plan(24).chosen
    assert two.settings.batch_per_gpu == alone.settings.batch_size
    assert two.settings.checkpointed_layers >= alone.settings.checkpointed_layers  # there is a little less room


def test_a_budget_is_refused_with_sharding():
    with pytest.raises(ValueError, match=r"^memory_budget='auto': leave it out of a run with sharding"):
        plan(24, replace(RUN, sharding="fsdp"))
