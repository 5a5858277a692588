"""Provoke the messages in TROUBLESHOOTING.md that need a GPU. Memory runs out under a cap, in small models."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from tests.course.provoke import four_bit, is_entry, random_llama, seen, trainer_of

from datasets import Dataset  # isort: skip
from peft import prepare_model_for_kbit_training

from qlora_helpers.units import GIB

LONG = Dataset.from_list([{"text": "a " * 600}] * 64)


@pytest.fixture
def cap():
    """A function that leaves torch this many bytes beyond what is reserved; the limit is removed after the test."""

    def leave(count: float):
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + count) / total)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def on_a_gpu(folder, model, **options):
    return trainer_of(folder, model, use_cpu=False, **options)


def test_float16_training_meets_bfloat16_adapters(tmp_path):
    trainer = on_a_gpu(tmp_path, four_bit(torch.float16, device_map={"": 0}), fp16=True)
    text = seen(trainer.train)
    is_entry("\"_amp_foreach_non_finite_check_and_unscale_cuda\" not implemented for 'BFloat16'", text)


def test_the_cure_of_float16_training_cures_it(tmp_path):
    trainer = on_a_gpu(tmp_path, four_bit(torch.float16, device_map={"": 0}), fp16=True)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert "Error" not in seen(trainer.train) and trainer.state.global_step == 1


def test_memory_runs_out_in_a_step(cap, tmp_path):
    model = random_llama(hidden_size=1024, intermediate_size=8192)
    trainer = on_a_gpu(tmp_path, model, data=LONG, max_length=512, per_device_train_batch_size=64)
    cap(0.25 * GIB)  # one layer's activations are several GiB
    is_entry("CUDA out of memory (OOM)", seen(trainer.train))


def test_memory_runs_out_in_prepare_model(cap):
    model = random_llama(vocab_size=200_000, hidden_size=1024).to("cuda", torch.bfloat16)
    cap(0.25 * GIB)  # the embeddings alone are 0.76 GiB in float32
    is_entry("Out of memory in prepare_model_for_kbit_training", seen(lambda: prepare_model_for_kbit_training(model)))


def test_memory_runs_out_in_evaluation(cap, tmp_path):
    extra = {"eval_dataset": LONG, "compute_metrics": lambda prediction: {}}
    model = random_llama(vocab_size=50_000, max_position_embeddings=1024)
    trainer = on_a_gpu(tmp_path, model, data=LONG, max_length=512, trainer=extra)
    cap(3 * GIB)  # all logits are 6.1 GiB
    is_entry("Out of memory in evaluation, though training was fine", seen(trainer.evaluate))


def test_the_tokens_are_not_on_the_gpu():
    model = random_llama().to("cuda")
    is_entry("Expected all tensors to be on the same device", seen(lambda: model(torch.tensor([[1, 2]]))))


def test_total_mem_is_no_attribute():
    is_entry("No attribute 'total_mem'", seen(lambda: torch.cuda.get_device_properties(0).total_mem))


def test_bitsandbytes_has_no_library_for_this_cuda():
    code = "import bitsandbytes, torch; bitsandbytes.functional.quantize_4bit(torch.ones(64, device='cuda'))"
    environment = os.environ | {"BNB_CUDA_VERSION": "999"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    is_entry("CUDA Setup failed despite GPU being available", done.stderr)
