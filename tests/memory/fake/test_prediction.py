"""Predictions of runs that the libraries themselves ran without values."""

from dataclasses import replace
from itertools import pairwise

import pytest

from qlora_helpers.memory import AnyShape, ModelShape, cures, find_gpu, largest_batch, longest_sequence, predict, search
from qlora_helpers.memory.fake.prediction import parameters_per_rank, run_on_fake_tensors
from qlora_helpers.memory.phases import MOMENTS
from qlora_helpers.models.meta import meta_model
from tests.memory.fake.models import DEEPSEEK, GEMMA3, GPU, LLAMA, QWEN3_MOE, RUN
from tests.memory.made_up import card

SHAPE = AnyShape.from_config(GEMMA3)
PLAIN = replace(RUN, gradient_checkpointing=False)
RUNS = {
    "qlora": RUN,
    "no checkpointing": PLAIN,
    "accumulation": replace(RUN, accumulation=4),
    "evaluation": replace(RUN, eval_batch_size=16),
    "whole logits": replace(RUN, logits="whole"),
    "full": replace(RUN, method="full", optimizer="adamw_torch", max_length=8),
    "upcast": replace(RUN, upcast_fp32=True),
    "paged": replace(RUN, optimizer="paged_adamw_8bit"),
}
OUTSIDE = ("optimizer (paged)", "CUDA context")


@pytest.mark.parametrize("how", RUNS)
def test_the_parts_add_up_to_the_peak(how):
    found = predict(SHAPE, RUNS[how])
    assert sum(size for name, size in found.parts.items() if name not in OUTSIDE) == found.peak_allocated_bytes
    assert all(size >= 0 for size in found.parts.values())
    assert found.parts["ends of blocks"] < 0.01 * found.peak_allocated_bytes
    assert found.phases[found.peak_phase] == max(found.phases.values()) == found.peak_allocated_bytes
    assert found.loaded_bytes < found.peak_allocated_bytes <= found.peak_reserved_bytes < found.device_bytes
    expected = [*MOMENTS] if how == "evaluation" else [name for name in MOMENTS if name != "evaluation"]
    assert list(found.phases) == expected and min(found.phases.values()) > found.loaded_bytes
    assert found.road == "libraries"


def test_the_peak_of_a_tiny_full_run_is_where_its_optimizer_works():
    found = predict(SHAPE, RUNS["full"])
    assert found.peak_phase == "optimizer step"
    width = 2
    assert found.parts["gradients"] == pytest.approx(width * SHAPE.parameters, rel=0.01)
    assert found.parts["optimizer (GPU)"] == pytest.approx(3 * width * SHAPE.parameters, rel=0.05)  # and temporaries


def test_an_evaluation_has_its_own_batch_and_keeps_no_activations():
    small, large = (predict(SHAPE, replace(PLAIN, eval_batch_size=size)) for size in (2, 4))
    assert small.phases["evaluation"] < small.phases["loss backward"]  # of the same batch
    assert large.phases["evaluation"] > small.phases["evaluation"]
    rest = {name: size for name, size in small.phases.items() if name != "evaluation"}
    assert rest == predict(SHAPE, PLAIN).phases
    assert predict(SHAPE, RUNS["evaluation"]).peak_phase == "evaluation"


def test_whole_logits_take_ten_to_fourteen_bytes_for_each_token_and_entry_of_the_vocabulary():
    """In 16 bits, then float32, and their gradients."""
    config = LLAMA | {"vocab_size": 50_000}
    run = replace(RUN, batch_size=4, max_length=512)
    shape = AnyShape.from_config(config)
    tiled, whole = (predict(shape, replace(run, logits=logits)) for logits in ("tiled", "whole"))
    tile = tiled.parts["logits tile"]
    assert tile > 0 == whole.parts["logits tile"]
    added = whole.peak_allocated_bytes - tiled.peak_allocated_bytes + tile
    assert 10 <= added / (4 * 512 * 50_000) <= 14


def test_each_layer_that_is_checkpointed_saves_some_memory():
    found = [predict(SHAPE, replace(RUN, checkpointed_layers=layers)).phases for layers in range(10)]
    first = [phases["last layer backward"] for phases in found]
    peaks = [max(phases.values()) for phases in found]
    # the last layer's activations are there in its backward pass anyway, recomputed or kept
    assert all(before > after for before, after in pairwise(first[:-1])), first
    assert all(before >= after for before, after in pairwise(peaks)), peaks
    assert peaks[0] > 1.02 * peaks[-1]
    assert found[0] == pytest.approx(predict(SHAPE, PLAIN).phases, rel=0.002)
    assert found[9] == predict(SHAPE, RUN).phases == predict(SHAPE, replace(RUN, checkpointed_layers=99)).phases


def test_adapters_on_fewer_layers_are_fewer_and_lighter():
    every, some = predict(SHAPE, RUN), predict(SHAPE, replace(RUN, target_modules=("q_proj", "v_proj")))
    assert (
        some.trainable_parameters == 4 * 9 * ((64 + 64) + (64 + 32)) == SHAPE.lora_parameters(4, ["q_proj", "v_proj"])
    )
    assert some.parts["adapters"] == 4 * some.trainable_parameters
    assert some.peak_allocated_bytes < every.peak_allocated_bytes
    for targets in (("nothing",), ("q_proj", "nothing")):  # PEFT passes over a name as long as another one matches
        with pytest.raises(ValueError, match=r"no layer is called 'nothing'\. The decoder's are q_proj, "):
            predict(SHAPE, replace(RUN, target_modules=targets))


def test_the_adapters_of_an_upcast_run_keep_their_own_dtype():
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        found = predict(SHAPE, replace(RUN, upcast_fp32=True, adapter_dtype=dtype))
        assert found.parts["adapters"] == width * found.trainable_parameters
        narrow = predict(SHAPE, replace(RUN, adapter_dtype=dtype))
        assert found.loaded_bytes == narrow.loaded_bytes
        assert found.parts["16-bit weights"] > 1.9 * narrow.parts["16-bit weights"]


def test_modules_on_the_skip_list_are_in_16_bits():
    skipping = AnyShape.from_config(GEMMA3, skip=["lm_head", "down_proj"])
    all_quantised, some = predict(SHAPE, RUN), predict(skipping, RUN)
    down = 9 * 128 * 64
    assert all_quantised.parts["4-bit weights"] - some.parts["4-bit weights"] == down // 2
    assert some.parts["16-bit weights"] - all_quantised.parts["16-bit weights"] == 2 * down
    assert SHAPE.four_bit_layers == 9 * 7 and skipping.four_bit_layers == 9 * 6


@pytest.mark.parametrize("config", [LLAMA, GEMMA3, QWEN3_MOE, DEEPSEEK])
def test_few_layers_are_run_and_all_weights_counted(config):
    """A run that trains everything counts every parameter."""
    shape = AnyShape.from_config(config)
    run = run_on_fake_tensors(shape, replace(RUN, method="full"), GPU)
    assert run.ran < run.layers == config["num_hidden_layers"]
    assert run.trained.parameters == shape.parameters == meta_model(config).num_parameters()


def test_the_written_out_layers_and_the_libraries_agree():
    """Two roads to one figure: the known family's own layers, and the engine for any model."""
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 1_536, "head_dim": 64, "num_attention_heads": 8}
    run = replace(RUN, max_length=512)
    for settings in (run, replace(run, gradient_checkpointing=False), replace(run, method="full")):
        by_hand, by_run = (
            predict(ModelShape.from_config(config), settings),
            predict(AnyShape.from_config(config), settings),
        )
        in_tensors = by_run.peak_allocated_bytes - by_run.parts["ends of blocks"]  # not known by hand
        assert in_tensors == pytest.approx(by_hand.peak_allocated_bytes, rel=0.005)
        assert by_run.trainable_parameters == by_hand.trainable_parameters


def test_what_the_written_out_layers_do_not_know_takes_the_other_road():
    shape = ModelShape.from_config(LLAMA)
    assert predict(shape, RUN).road == "layers"
    for new in ({"checkpointed_layers": 3}, {"logits": "whole"}, {"eval_batch_size": 2}):
        found = predict(shape, replace(RUN, **new))
        assert found.road == "libraries" and found.shape is shape


def test_older_cards_run_other_kernels():
    """A T4 has no FlashAttention: keys and values are repeated for its memory-efficient kernel."""
    half = replace(PLAIN, compute_dtype="float16", max_length=1_024)
    shape = AnyShape.from_config(LLAMA)
    old, new = (predict(shape, half, card) for card in ("t4", "h200"))
    repeated = 2 * 1_024 * 2 * (64 - 32) * 2  # of one layer: keys and values of two more heads, tokens, bytes
    assert old.parts["activations"] - new.parts["activations"] == pytest.approx(6 * repeated, rel=0.1)


def test_parameters_of_a_rank():
    assert parameters_per_rank(SHAPE, ("q_proj",)) == 9 * (64 + 64)
    assert SHAPE.lora_parameters(8, "all-linear") == 8 * parameters_per_rank(SHAPE, "all-linear")


def test_a_run_that_the_libraries_refuse_is_refused_with_their_reason():
    shape = AnyShape.from_config(QWEN3_MOE | {"num_experts_per_tok": 99}, "a/model")
    with pytest.raises(ValueError, match=r"a/model \(qwen3_moe\): the libraries cannot make such a run: "):
        predict(shape, replace(RUN, target_modules=("q_proj",)))


# ---- What asks for predictions


def test_a_search_asks_for_few_predictions(asked):
    shape = AnyShape.from_config(LLAMA)
    limit = predict(shape, replace(PLAIN, batch_size=5)).device_bytes + 1
    assert largest_batch(shape, PLAIN, card(limit, "h200")) == 5
    assert 2 < len(asked) < 12
    asked.clear()
    limit = predict(shape, replace(PLAIN, max_length=128)).device_bytes + 1
    assert longest_sequence(shape, PLAIN, card(limit, "h200"), at_most=256) == 128
    assert 1 < len(asked) < 8


def test_cures_of_a_run_that_does_not_fit(asked):
    run = replace(PLAIN, max_length=128)
    enough = predict(SHAPE, replace(run, gradient_checkpointing=True)).device_bytes
    found = cures(SHAPE, run, card(enough, "h200"))
    assert all(change.prediction.fits for change in found)
    assert any(change.settings.gradient_checkpointing and change.settings.batch_size == 2 for change in found)
    assert len(asked) < 60


def test_the_gpu_does_not_change_what_was_traced():
    """The same passes serve cards of one generation."""
    first, second = predict(SHAPE, RUN, "h100"), predict(SHAPE, RUN, "h200")
    assert first.peak_allocated_bytes == second.peak_allocated_bytes
    assert first.gpu == find_gpu("h100")


def test_a_tiny_model_has_a_largest_batch_in_few_trials(monkeypatch):
    """Its first batches take nothing more, since they fit into segments that are there."""
    asked = []
    monkeypatch.setattr(search, "predict", lambda shape, run, gpu: asked.append(run) or predict(shape, run, gpu))
    batch = largest_batch(SHAPE, RUN, "t4")
    assert 0 < len(asked) < 25
    assert predict(SHAPE, replace(RUN, batch_size=batch), "t4").fits
    assert not predict(SHAPE, replace(RUN, batch_size=batch + 1), "t4").fits


def test_more_tokens_than_can_be_run_are_refused_at_once():
    with pytest.raises(ValueError, match=r"batch_size=1000000000: x max_length=64 is 64,000,000,000 tokens at once"):
        predict(SHAPE, replace(RUN, batch_size=10**9))
