"""On several GPUs: each run that is named fits, the next smaller one does not, and a step learns as much as before where it can."""

from dataclasses import replace

import pytest

from qlora_helpers.memory import AnyShape, cheapest_sets, find_shape, known_gpus, predict, several_gpus
from qlora_helpers.memory.gpus import nominal_gib
from qlora_helpers.memory.several import OLDEST, on_gpus
from qlora_helpers.settings import GPU_RUN, Settings
from tests.memory.made_up import card

LARGE, SMALL = find_shape("Llama-3.1-70B"), find_shape("Llama-3.1-8B")


@pytest.mark.parametrize(
    ("batch", "accumulation", "number", "expected"),
    [
        (1, 1, 2, (2, 1)),  # one more, since two GPUs cannot share one
        (1, 16, 4, (4, 4)),
        (4, 4, 2, (8, 2)),  # each GPU has as many as the one had
        (16, 1, 2, (16, 1)),
        (3, 1, 2, (4, 1)),
        (4, 3, 8, (16, 1)),
        (6, 2, 2, (12, 1)),
        (5, 2, 2, (10, 1)),
    ],
)
def test_a_step_has_as_many_sequences_or_the_fewest_more(batch, accumulation, number, expected):
    run = Settings(batch_size=batch, accumulation=accumulation, optimizer="adamw_8bit", memory_budget="auto")
    found = on_gpus(run, number)
    assert (found.batch_size, found.accumulation) == expected
    assert found.batch_per_gpu <= batch and found.num_gpus == number and found.sharding == "fsdp"
    sequences = found.batch_size * found.accumulation
    assert 0 <= sequences - batch * accumulation < number * max(accumulation, found.accumulation)
    assert (sequences == batch * accumulation) == (batch * accumulation % number == 0)
    assert found.optimizer is None and found.memory_budget is None


def test_several_gpus_can_become_one():
    assert on_gpus(Settings(batch_size=4, num_gpus=2), 1, sharding=None) == Settings(batch_size=2, accumulation=2)


def test_the_next_step_for_a_run_that_does_not_fit_is_more_gpus_or_main_memory():
    found = several_gpus(LARGE, GPU_RUN, "3090")
    assert [(c.settings.num_gpus, c.settings.cpu_offload) for c in found] == [(1, True), (2, True), (4, False)]
    for change in found:
        assert change.prediction.fits and change.prediction == predict(LARGE, change.settings, "3090")
        assert f"{change.prediction.host_bytes_of_run / 2**30:.0f} GiB of main memory" in change.price
    assert not predict(LARGE, on_gpus(GPU_RUN, 2), "3090").fits
    assert found[1].price.startswith("1 more GPU; time: 72 GiB go from main memory in each pass")
    assert "3 more GPUs; time: 54 GiB go from GPU to GPU" in found[2].price
    assert "a step learns from 4 sequences instead of 1" in found[2].price
    assert "learns from" not in several_gpus(LARGE, replace(GPU_RUN, accumulation=16), "3090")[2].price


def test_offload_that_saves_no_gpu_is_not_named():
    needs = predict(SMALL, on_gpus(GPU_RUN, 2), card(10**12)).device_bytes
    found = several_gpus(SMALL, GPU_RUN, card(needs))
    assert [(c.settings.num_gpus, c.settings.cpu_offload) for c in found] == [(1, True), (2, False)]
    found = several_gpus(SMALL, GPU_RUN, card(needs - 1))
    assert [(c.settings.num_gpus, c.settings.cpu_offload) for c in found] == [(1, True), (2, True), (4, False)]


def test_no_step_is_named_where_none_is_needed_or_known():
    assert several_gpus(SMALL, GPU_RUN, "t4") == []  # it fits
    assert several_gpus(LARGE, replace(GPU_RUN, logits="whole"), "3090") == []
    olmo = AnyShape.from_config({"model_type": "olmo2"}, "made-up")
    assert several_gpus(olmo, replace(GPU_RUN, max_length=256), "1GiB") == []


def test_no_number_below_that_of_the_run_is_named():
    run = on_gpus(GPU_RUN, 2)
    found = several_gpus(LARGE, run, "3090")
    assert [(c.settings.num_gpus, c.settings.cpu_offload) for c in found] == [(2, True), (4, False)]
    assert "more GPU" not in found[0].price


def test_the_cheapest_sets_are_the_smallest_cards_with_which_the_run_fits():
    found, sizes, known = cheapest_sets(LARGE, GPU_RUN), nominal_gib(), known_gpus()
    assert [one.total_gib for one in found] == sorted(one.total_gib for one in found)
    assert {str(one) for one in found} >= {"1 x 48 GB", "4 x 24 GB with FSDP", "2 x 16 GB with FSDP and offload"}
    assert sum(one.settings.num_gpus == 1 for one in found) == 2  # as it is, and with offload
    for one in found:
        current = {key for key, gpu in known.items() if gpu.compute_capability >= OLDEST and "AMD" not in gpu.name}
        if one.settings.num_gpus > 1:
            current = {key for key in current if "Laptop" not in known[key].name}
        fitting = {key for key in current if predict(LARGE, one.settings, key).fits}
        assert {sizes[key] for key in one.gpus} == {one.nominal_gib} and one.prediction.fits
        assert set(one.gpus) == {key for key in fitting if sizes[key] == one.nominal_gib}
        assert min(sizes[key] for key in fitting) == one.nominal_gib
        assert one.prediction.spare_bytes == min(predict(LARGE, one.settings, key).spare_bytes for key in one.gpus)


def test_a_small_model_is_not_sent_to_more_cards_in_two_ways_of_one_size():
    for one in (found := cheapest_sets(SMALL, replace(GPU_RUN, max_length=512))):
        same = [
            other
            for other in found
            if (other.total_gib, other.settings.num_gpus) == (one.total_gib, one.settings.num_gpus)
        ]
        assert len(same) == 1, one


def test_what_is_not_predicted_with_sharding_is_asked_of_copies():
    found = cheapest_sets(SMALL, replace(GPU_RUN, upcast_fp32=True, max_length=256))
    assert found and all(one.settings.sharding is None for one in found)
    assert {one.settings.num_gpus for one in found} == {1, 2, 4, 8}


def test_a_model_that_fits_nowhere_has_no_set():
    assert cheapest_sets(LARGE, replace(GPU_RUN, max_length=131_072, gradient_checkpointing=False)) == []
