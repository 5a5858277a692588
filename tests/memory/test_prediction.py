"""The memory predictor: how it compares with measured runs, and what it refuses."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from transformers.training_args import OptimizerNames

from data.scripts.measure import memory_errors
from data.scripts.measure.memory_errors import mean_and_worst
from qlora_helpers.memory import ModelShape, catalogue, predict
from qlora_helpers.memory.trained import OPTIMIZERS
from qlora_helpers.settings import GPU_RUN

LLAMA = ModelShape.from_config(json.loads(catalogue.TABLE.read_text())["models"]["meta-llama/Llama-3.1-8B"])

GROUPS = memory_errors.groups()

ROWS = [row for rows in GROUPS.values() for row in rows]


@pytest.mark.parametrize("group", GROUPS)
def test_predictions_lie_near_the_measured_runs(group):
    pairs = memory_errors.pairs_of(GROUPS[group])
    errors = {of: mean_and_worst(found) for of, found in memory_errors.errors(pairs).items() if found}
    assert len(GROUPS[group]) >= 20
    mean, worst = errors["loaded_bytes"]
    assert mean < 0.005 and worst < 0.04
    mean, worst = errors["peak_allocated_bytes"]
    assert mean < 0.01 and worst < 0.06
    assert errors["peak_reserved_bytes"][0] < 0.04 and errors["device_bytes"][0] < 0.04


def test_a_wrong_prediction_would_be_seen():
    wrong = [row | {"gradient_checkpointing": not row["gradient_checkpointing"]} for row in ROWS]
    assert mean_and_worst(memory_errors.errors(memory_errors.pairs_of(wrong))["peak_allocated_bytes"])[0] > 0.3


def test_the_parts_add_up_to_the_peak_and_the_card():
    for row in ROWS:
        found = memory_errors.predicted(row)
        outside = found.parts["optimizer (paged)"] + found.parts["CUDA context"]
        assert sum(found.parts.values()) - outside == found.peak_allocated_bytes
        assert min(found.parts.values()) >= 0
        assert found.phases[found.peak_phase] == max(found.phases.values()) == found.peak_allocated_bytes
        assert tuple(found.phases)[:1] + tuple(found.phases)[-1:] == ("loss", "optimizer step")
        assert found.loaded_bytes < found.peak_allocated_bytes <= found.peak_reserved_bytes < found.device_bytes


def test_each_knob_moves_memory_the_way_it_should():
    run = replace(GPU_RUN, batch_size=2, max_length=1_024)
    peak = predict(LLAMA, run).peak_allocated_bytes
    more = {
        "double_quant": False, "gradient_checkpointing": False, "upcast_fp32": True, "rank": 64, "batch_size": 4,
        "max_length": 2_048, "attention": "math", "method": "lora", "dropout": 0.05,
    }  # fmt: skip
    run = replace(run, dropout=0.0)
    less = predict(LLAMA, run).peak_allocated_bytes
    assert less < peak
    for name, value in more.items():
        assert predict(LLAMA, replace(run, **{name: value})).peak_allocated_bytes > less, name
    on_card = {name: predict(LLAMA, replace(run, optimizer=name)) for name in OPTIMIZERS}
    assert on_card["adamw_8bit"].peak_allocated_bytes < on_card["adamw_torch_fused"].peak_allocated_bytes
    assert (
        on_card["paged_adamw_32bit"].parts["optimizer (paged)"] > on_card["paged_adamw_8bit"].parts["optimizer (paged)"]
    )
    assert on_card["adamw_8bit"].parts["optimizer (paged)"] == 0


def test_paged_states_are_those_of_large_tensors_alone():
    found = predict(LLAMA, replace(GPU_RUN, rank=16, optimizer="paged_adamw_32bit"))
    large = 32 * 3 * 16 * 14_336  # gate and up out, down in; the others have 4,096 * 16 or fewer elements
    assert found.parts["optimizer (paged)"] == large * 8


@pytest.mark.parametrize("config", catalogue.predicted_models().values(), ids=list(catalogue.predicted_models()))
def test_full_fine_tuning_trains_every_parameter(config):
    shape = ModelShape.from_config(config)
    assert predict(shape, replace(GPU_RUN, method="full", max_length=512)).trainable_parameters == shape.parameters


def test_the_optimizers_are_names_of_transformers():
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


def test_a_t4_keeps_to_the_kernels_it_has():
    run = replace(GPU_RUN, compute_dtype="float16", max_length=4_096)
    here, there = (predict(LLAMA, run, gpu) for gpu in ("t4", "h200"))
    assert here.parts["workspace"] < there.parts["workspace"]
    assert predict(LLAMA, replace(run, attention="math"), "t4").peak_allocated_bytes > 1.5 * here.peak_allocated_bytes


def test_a_sequence_beyond_the_window_needs_a_mask():
    shape = ModelShape.from_config({"model_type": "mistral"})
    inside, outside = (predict(shape, replace(GPU_RUN, max_length=n)).peak_allocated_bytes for n in (4_096, 4_224))
    assert outside - inside > 4_224**2


@pytest.mark.parametrize("optimizer", ["adafactor", "AdamW"])
def test_an_optimizer_that_is_not_known_is_named(optimizer):
    with pytest.raises(ValueError, match=f"optimizer='{optimizer}': choose one of adamw_torch"):
        predict(LLAMA, replace(GPU_RUN, optimizer=optimizer))


def test_full_fine_tuning_does_not_depend_on_the_settings_of_adapters():
    full = replace(GPU_RUN, method="full", optimizer="adamw_8bit")
    strange = replace(full, rank=3, adapter_dtype="bfloat16", block_size=128, double_quant=False, dropout=0.5)
    strange = replace(strange, target_modules=["q_proj"], upcast_fp32=True)
    assert predict(LLAMA, strange).parts == predict(LLAMA, full).parts
    lora = replace(GPU_RUN, method="lora")
    assert predict(LLAMA, replace(lora, block_size=128, double_quant=False)).parts == predict(LLAMA, lora).parts


def test_accumulation_keeps_the_gradients():
    run = replace(GPU_RUN, method="full", optimizer="adamw_8bit", batch_size=2, max_length=4_096)
    once, often = (predict(LLAMA, replace(run, accumulation=steps)) for steps in (1, 8))
    assert often.parts["gradients"] == 2 * LLAMA.parameters > once.parts["gradients"]
    assert often.peak_allocated_bytes > once.peak_allocated_bytes


def test_float32_has_no_flash_attention():
    run = replace(GPU_RUN, compute_dtype="float32", max_length=4_096)
    assert predict(LLAMA, run).parts == predict(LLAMA, replace(run, attention="math")).parts
    unshared = replace(LLAMA, num_key_value_heads=32)
    assert (
        predict(unshared, run).peak_allocated_bytes
        < predict(unshared, replace(run, attention="math")).peak_allocated_bytes
    )


def test_loading_needs_the_largest_tensor_in_main_memory_twice_over_in_16_bits():
    table = 128_256 * 4_096
    found, narrow = predict(LLAMA, GPU_RUN), predict(replace(LLAMA, vocab_size=1_000), GPU_RUN)
    assert found.host_bytes_to_load - narrow.host_bytes_to_load == 2 * (table - 14_336 * 4_096)


def test_a_name_in_place_of_a_shape_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"shape='Qwen/Qwen2.5-7B': give a shape, such as find_shape"):
        predict("Qwen/Qwen2.5-7B", GPU_RUN)
    with pytest.raises(ValueError, match=r"settings=\{\}: give a Settings"):
        predict(LLAMA, {})


def test_what_does_not_go_with_the_model_is_refused():
    with pytest.raises(ValueError, match="rank=5000: must be no more than the model's hidden size, 4096"):
        predict(LLAMA, replace(GPU_RUN, rank=5_000))
    with pytest.raises(
        ValueError, match="max_length=200000: must be no more than max_position_embeddings of this model, 131072"
    ):
        predict(LLAMA, replace(GPU_RUN, max_length=200_000))
    predict(replace(LLAMA, max_position_embeddings=None), replace(GPU_RUN, max_length=200_000))
    with pytest.raises(ValueError, match="gpu='gtx': no GPU is known by this name"):
        predict(LLAMA, GPU_RUN, "gtx")


def test_merge_aware_steps_are_not_predicted():
    with pytest.raises(ValueError, match=r"^merge_aware=0\.3: its steps take more memory, which was not measured"):
        predict(LLAMA, replace(GPU_RUN, dropout=0.0, merge_aware=0.3))


def test_a_prediction_needs_no_torch_and_little_time():
    code = "import sys, qlora_helpers.memory as m; m.predict(m.find_shape('Qwen/Qwen2.5-7B'), m.GPU_RUN); " + (
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
    started = time.perf_counter()
    for max_length in range(1_000, 1_100):
        predict(LLAMA, replace(GPU_RUN, max_length=max_length))
    assert (time.perf_counter() - started) / 100 < 0.02  # seconds; about 0.001 on a quiet machine
