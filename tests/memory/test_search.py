"""The largest batch and the longest sequence: what is said to fit does, and one more does not."""

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
    (GPT_J, replace(GPU_RUN, max_length=1_024), "3060"),
    (find_shape("HuggingFaceTB/SmolLM2-360M"), replace(GPU_RUN, method="full", optimizer="adamw_torch"), "t4"),
]


@pytest.mark.parametrize(("shape", "run", "gpu"), CASES)
def test_the_largest_batch_fits_and_one_more_does_not(shape, run, gpu, asked):
    batch = largest_batch(shape, run, gpu)
    assert 0 < len(asked) < 40
    assert batch > 0
    assert predict(shape, replace(run, batch_size=batch), gpu).fits
    assert not predict(shape, replace(run, batch_size=batch + 1), gpu).fits


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
