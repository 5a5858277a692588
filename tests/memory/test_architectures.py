"""Every architecture of transformers that has a causal language model gets an answer, or the libraries' reason."""

import re

import pytest

from qlora_helpers.memory import find_shape, predict
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.fake import prediction
from qlora_helpers.memory.fake.prediction import run_on_fake_tensors
from qlora_helpers.memory.gpus import find_gpu
from qlora_helpers.memory.prediction import on_gpu
from qlora_helpers.settings import Settings
from tests.memory import architectures
from tests.memory.architectures import CANNOT, CANNOT_IN_4_BITS, model_types, settings_of, small_config

GPU = find_gpu("h200")
# dense, experts, latent attention, state space, both mixed, windows, shared keys, an encoder's layers, positions as a bias
IN_MAKE_TEST = (
    "bart", "bert", "bloom", "deepseek_v3", "falcon", "gemma4_text", "gpt_oss", "mamba2", "olmo2", "qwen3_next",
)  # fmt: skip
NAMES = [
    pytest.param(name, marks=() if name in IN_MAKE_TEST else pytest.mark.everything)
    for name in model_types()
    if name not in CANNOT
]


def settings(shape, **changes):
    usual = {"batch_size": 2, "max_length": architectures.TOKENS, "rank": 4}
    return on_gpu(Settings(**usual | settings_of(shape) | changes), GPU)


def peak(run):
    return run.moments[run.peak]


def assert_same_as_with_all_layers(run, whole):
    assert run.weights == whole.weights
    assert run.trained == whole.trained
    assert peak(run) == pytest.approx(peak(whole), rel=0.01)
    # what comes and goes, in the allocator's blocks: these can be up to 1 MiB too large, which counts in a small model
    assert peak(run) - run.loaded == pytest.approx(peak(whole) - whole.loaded, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gets_an_answer_that_adds_up(name):
    shape = AnyShape.from_config(small_config(name), name)
    lora = settings(shape, method="lora")
    plain = settings(shape, method="lora", gradient_checkpointing=False)
    if name not in IN_MAKE_TEST:  # all of what is below takes half an hour for all of them
        run = run_on_fake_tensors(shape, plain, GPU)
        assert peak(run) > run.loaded + run.trained.adapters > 0
        assert run.reserved >= peak(run)
        return
    with_checkpointing, without = (run_on_fake_tensors(shape, each, GPU) for each in (lora, plain))
    # what the layers keep for the backward pass is there when the loss is made
    assert without.moments["loss"] >= with_checkpointing.moments["loss"]
    pairs = [(lora, with_checkpointing), (plain, without)]
    if name in CANNOT_IN_4_BITS:
        with pytest.raises(ValueError, match=re.escape(CANNOT_IN_4_BITS[name])):
            run_on_fake_tensors(shape, settings(shape), GPU)
    else:
        pairs[0] = settings(shape), run_on_fake_tensors(shape, settings(shape), GPU)
        assert four_bit_layers(shape) == shape.four_bit_layers
    assert elements(shape, lora) == all_elements(shape)
    for each, run in pairs:
        assert peak(run) > run.loaded + run.trained.adapters > 0
        assert run.reserved >= peak(run)
        assert_few_layers_ran(name, run)
        assert_same_as_with_all_layers(run, run_on_fake_tensors(shape, each, GPU, whole=True))


def assert_few_layers_ran(name, run):
    assert run.ran <= run.layers
    if run.ran == run.layers:  # an architecture whose layers are all of different kinds has no more than these
        assert run.why_all or 0 < run.layers <= 4, f"{name}: all {run.layers} layers ran, without a reason"
    else:
        assert not run.why_all


def standing(shape, each):
    """Each tensor that is there throughout, as often as the whole model has it."""
    traced = prediction._traced(shape, prediction._of_memory(each), GPU.compute_capability, False)
    return [entry for _, entry in traced.in_order()]


def four_bit_layers(shape):
    return sum(entry.kind == "4-bit weights" for entry in standing(shape, settings(shape)))


def elements(shape, lora):
    return sum(entry.elements for entry in standing(shape, lora) if entry.kind == "16-bit weights")


def all_elements(shape):
    """Of the model without values: parameters, and buffers."""
    buffers = (buffer for module in shape._model.modules() for buffer in module.buffers(recurse=False))
    return shape.parameters + sum(buffer.numel() for buffer in buffers)


@pytest.mark.everything
@pytest.mark.parametrize("name", sorted(CANNOT))
def test_those_that_cannot_run_say_why(name, record_property):
    """`make test-all` lists them at its end."""
    with pytest.raises((ValueError, ImportError)) as refused:
        shape = AnyShape.from_config(small_config(name), name)
        run_on_fake_tensors(shape, settings(shape), GPU)
    assert CANNOT[name] in str(refused.value)
    record_property("cannot", f"{name}: {refused.value}")


def test_fewer_than_a_tenth_cannot_run():
    assert set(CANNOT) <= set(model_types())
    assert set(CANNOT_IN_4_BITS) <= set(model_types()) - set(CANNOT)
    assert len(CANNOT) + len(CANNOT_IN_4_BITS) < len(model_types()) / 10
    assert len(IN_MAKE_TEST) == 10


# ---- Configs that make no sense


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "gpt5"}, "model_type='gpt5': the installed transformers"),
        ({"hidden_size": 64}, "model_type=None: the installed transformers"),
        # GPT-2 refuses its heads itself
        ({"model_type": "gpt2", "n_embd": 100, "n_head": 3}, "cannot build it"),
        # the other layers of this family take any number of them
        (
            {"model_type": "olmo2", "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads=3: must divide num_attention_heads=4",
        ),
        ({"model_type": "olmo2", "hidden_size": "large"}, "'hidden_size'"),
        ({"model_type": "musicgen"}, "musicgen"),  # its language model has a config of its own
        ({"model_type": "vit"}, "ViTConfig"),  # no language model
    ],
)
def test_a_config_that_makes_no_sense_is_refused_with_the_reason(config, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        predict(find_shape(config), Settings(max_length=64))


def test_peft_says_why_it_cannot_adapt_a_layer():
    shape = find_shape(small_config("mamba2"))
    with pytest.raises(ValueError, match=r"Module 'out_proj' is incompatible with Mamba-based models"):
        predict(shape, Settings(method="lora", max_length=64))


def test_a_model_that_needs_all_its_layers_says_why():
    """XLM keeps what a layer has in several lists."""
    shape = AnyShape.from_config(small_config("xlm"), "xlm")
    run = run_on_fake_tensors(shape, settings(shape), GPU)
    assert run.ran == run.layers
    assert run.why_all
