"""The largest batch and the longest sequence: what is said to fit does, and one more does not."""

import math
from dataclasses import replace

import pytest

from qlora_helpers.memory import (
    find_gpu,
    find_shape,
    largest_batch,
    longest_sequence,
    predict,
    suggest,
    what_fits,
)
from qlora_helpers.memory.search import divisors
from qlora_helpers.settings import GPU_RUN
from qlora_helpers.units import GIB
from tests.memory.made_up import card

QWEN_7B, LLAMA_8B, LLAMA_70B, GPT_J = map(
    find_shape, ("Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "EleutherAI/gpt-j-6b")
)


CASES = [
    (QWEN_7B, GPU_RUN, "t4"),
    (QWEN_7B, replace(GPU_RUN, max_length=512), "h200"),
    (LLAMA_8B, replace(GPU_RUN, gradient_checkpointing=False, max_length=1_024), "l4"),
    (LLAMA_8B, replace(GPU_RUN, attention="math", batch_size=2), "t4"),
    (GPT_J, replace(GPU_RUN, max_length=1_024), "3060-12"),
    (find_shape("HuggingFaceTB/SmolLM2-360M"), replace(GPU_RUN, method="full", optimizer="adamw_torch"), "t4"),
    (QWEN_7B, replace(GPU_RUN, num_gpus=2, batch_size=2), "t4"),
    (LLAMA_70B, replace(GPU_RUN, num_gpus=4, batch_size=4, sharding="fsdp", max_length=512), "3090"),
]


@pytest.mark.parametrize(("shape", "run", "gpu"), CASES)
def test_the_largest_batch_fits_and_one_more_on_each_gpu_does_not(shape, run, gpu, asked):
    batch = largest_batch(shape, run, gpu)
    assert 0 < len(asked) < 40
    assert batch > 0 and batch % run.num_gpus == 0
    assert predict(shape, replace(run, batch_size=batch), gpu).fits
    assert not predict(shape, replace(run, batch_size=batch + run.num_gpus), gpu).fits


@pytest.mark.parametrize(("shape", "run", "gpu"), CASES)
def test_the_longest_sequence_fits_and_128_tokens_more_do_not(shape, run, gpu, asked):
    tokens = longest_sequence(shape, run, gpu)
    assert 0 < len(asked) < 20
    assert tokens > 0
    assert tokens % 128 == 0
    assert predict(shape, replace(run, max_length=tokens), gpu).fits
    limit = shape.max_position_embeddings
    assert tokens + 128 > limit or not predict(shape, replace(run, max_length=tokens + 128), gpu).fits


def test_batch_and_sequence_grow_with_the_card_to_the_byte():
    needs = predict(QWEN_7B, replace(GPU_RUN, batch_size=3), "l4").device_bytes
    assert largest_batch(QWEN_7B, GPU_RUN, card(needs)) == 3
    assert largest_batch(QWEN_7B, GPU_RUN, card(needs - 1)) == 2
    needs = predict(QWEN_7B, replace(GPU_RUN, max_length=1_280), "l4").device_bytes
    assert longest_sequence(QWEN_7B, GPU_RUN, card(needs)) == 1_280
    assert longest_sequence(QWEN_7B, GPU_RUN, card(needs - 1)) == 1_152


WINDOWED = replace(find_shape("mistralai/Mistral-7B-v0.1"), num_hidden_layers=2, max_position_embeddings=3_000)


@pytest.mark.parametrize("window", [300, 1_000, 1_024, 2_999])
@pytest.mark.parametrize("attention", ["sdpa", "math", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_longest_sequence_is_that_of_a_search_through_all_of_them(window, attention, dtype):
    """With float32 and shared heads sdpa needs less from the window on, where the mask rules out torch's math kernel."""
    shape = replace(WINDOWED, sliding_window=window)
    run = replace(GPU_RUN, compute_dtype=dtype, attention=attention)
    for like in ("t4", "l4"):
        needs = {
            tokens: predict(shape, replace(run, max_length=tokens), like).device_bytes
            for tokens in range(128, 3_001, 128)
        }
        before = [tokens for tokens in needs if tokens < window]
        assert sorted(needs.values()) == list(needs.values()) or (like, dtype, attention) == ("l4", "float32", "sdpa")
        for enough_for in (128, before[-1], before[len(before) // 2], 2_944):
            for usable in (needs[enough_for], needs[enough_for] - 1):
                fitting = [tokens for tokens, size in needs.items() if size <= usable]
                assert longest_sequence(shape, run, card(usable, like)) == max(fitting, default=0)
                up_to = max((tokens for tokens in fitting if tokens <= 1_500), default=0)
                assert longest_sequence(shape, run, card(usable, like), at_most=1_500) == up_to


def test_memory_grows_with_the_batch_whatever_the_kernel():
    for shape in (WINDOWED, GPT_J):
        for attention in ("sdpa", "math", "eager"):
            for accumulation in (1, 4):
                run = replace(GPU_RUN, attention=attention, accumulation=accumulation, max_length=512)
                for dtype in ("float32", "float16"):
                    sizes = [
                        predict(shape, replace(run, compute_dtype=dtype, batch_size=batch), "l4").device_bytes
                        for batch in (1, 2, 3, 4, 7, 16, 100, 10**6)
                    ]
                    assert sizes == sorted(sizes)


def test_nothing_fits_on_too_small_a_card():
    assert largest_batch(LLAMA_70B, GPU_RUN, "t4") == 0
    assert longest_sequence(LLAMA_70B, GPU_RUN, "t4") == 0


def test_the_longest_sequence_ends_where_the_model_does():
    assert longest_sequence(replace(QWEN_7B, max_position_embeddings=1_000), GPU_RUN, "h200") == 896
    assert longest_sequence(replace(QWEN_7B, max_position_embeddings=100), GPU_RUN, "h200") == 0
    small = find_shape("HuggingFaceTB/SmolLM2-135M")
    assert longest_sequence(replace(small, max_position_embeddings=None), GPU_RUN, "b200") == 131_072
    assert longest_sequence(small, GPU_RUN, "b200") == 8_192


def test_a_sequence_that_is_too_long_for_the_model_is_refused():
    with pytest.raises(ValueError, match="max_position_embeddings"):
        largest_batch(GPT_J, replace(GPU_RUN, max_length=4_096), "h200")


@pytest.mark.parametrize("effective", [1, 7, 12, 16, 64])
def test_the_suggested_batch_divides_the_effective_one_and_no_larger_one_does_and_fits(effective):
    suggestion = suggest(QWEN_7B, "t4", GPU_RUN, effective)
    assert suggestion.batch_size * suggestion.accumulation == effective
    assert suggestion.prediction == predict(
        QWEN_7B, replace(GPU_RUN, batch_size=suggestion.batch_size, accumulation=suggestion.accumulation), "t4"
    )
    assert suggestion.prediction.fits
    for larger in range(suggestion.batch_size + 1, effective + 1):
        if effective % larger == 0:
            accumulated = replace(GPU_RUN, batch_size=larger, accumulation=effective // larger)
            assert not predict(QWEN_7B, accumulated, "t4").fits


# a prime, powers, the largest of 64 bits, and one with more than 10,000 divisors
HUGE = [10**18 + 3, 2**62, 10**18, 2**63 - 1, math.lcm(*range(1, 41))]


@pytest.mark.parametrize("effective", HUGE)
def test_a_huge_effective_batch_is_answered_after_few_predictions(effective, asked):
    suggestion = suggest(QWEN_7B, "t4", GPU_RUN, effective)
    assert 0 < len(asked) < 50
    assert suggestion.batch_size * suggestion.accumulation == effective
    assert suggestion.prediction.fits
    (next_larger, *_) = [size for size in range(suggestion.batch_size + 1, 2**20) if effective % size == 0] or [None]
    if next_larger:
        accumulated = replace(GPU_RUN, batch_size=next_larger, accumulation=effective // next_larger)
        assert not predict(QWEN_7B, accumulated, "t4").fits


def test_a_card_beyond_all_sense_ends_the_search(asked):
    assert largest_batch(QWEN_7B, GPU_RUN, card(10**90)) == 2**63 - 1
    longest = longest_sequence(replace(QWEN_7B, max_position_embeddings=2**63 - 1), GPU_RUN, card(10**90))
    assert longest == 2**63 - 128
    assert len(asked) < 500


def test_the_divisors_of_a_number():
    assert divisors(1) == (1,)
    assert divisors(36) == (36, 18, 12, 9, 6, 4, 3, 2, 1)
    assert divisors(10**18 + 3) == (10**18 + 3, 1)
    assert len(divisors(math.lcm(*range(1, 41)))) > 10_000


def test_suggest_has_defaults():
    assert suggest(QWEN_7B, "h200") == suggest(QWEN_7B, find_gpu("h200"), GPU_RUN, 16)


def test_suggest_says_what_is_wrong():
    missing = -predict(LLAMA_70B, replace(GPU_RUN, accumulation=16), "t4").spare_bytes / GIB
    with pytest.raises(ValueError, match=rf"Tesla T4.*batch of 1.*{missing:.2f} GiB"):
        suggest(LLAMA_70B, "t4", replace(GPU_RUN, batch_size=4))
    for wrong in (0, -1, 2.0, True, "16"):
        with pytest.raises(ValueError, match="effective_batch"):
            suggest(QWEN_7B, "t4", effective_batch=wrong)


def test_the_table_has_a_row_per_model_and_a_cell_per_gpu():
    run = replace(GPU_RUN, max_length=4_096)
    rows = what_fits(["Qwen/Qwen2.5-7B", GPT_J, LLAMA_70B], iter(["t4", find_gpu("h200")]), run)
    assert [shape.name for shape, _ in rows] == ["Qwen/Qwen2.5-7B", GPT_J.name, LLAMA_70B.name]
    assert rows[0][1] == (predict(QWEN_7B, run, "t4"), predict(QWEN_7B, run, "h200"))
    assert rows[1][1] == (None, None)  # GPT-J ends at 2,048
    assert [cell.fits for cell in rows[2][1]] == [False, True]
    with pytest.raises(ValueError, match="no such"):
        what_fits(["no such"], ["t4"])


def test_an_effective_batch_is_shared_among_the_gpus():
    run = replace(GPU_RUN, num_gpus=4, batch_size=4)
    found = suggest(QWEN_7B, "t4", run, effective_batch=16)
    assert found.batch_size % 4 == 0 and found.batch_size * found.accumulation == 16
    assert found.prediction.settings.num_gpus == 4 and found.prediction.fits
    with pytest.raises(ValueError, match=r"^effective_batch=6: must be a multiple of num_gpus=4"):
        suggest(QWEN_7B, "t4", run, effective_batch=6)
