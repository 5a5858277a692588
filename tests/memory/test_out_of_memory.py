"""Reading an out-of-memory message, and naming the place where a run died."""

import pytest
import torch

from qlora_helpers.memory.out_of_memory import PLACES, place_of, read_message
from qlora_helpers.units import GIB, MIB

# as c10/cuda/CUDACachingAllocator.cpp writes it, with a cap
CAPPED = (
    "CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 124.06 GiB is free. "
    "Process 4242 has 15.73 GiB memory in use. 15.00 GiB allowed; Of the allocated memory 14.87 GiB is allocated by PyTorch, "
    "and 96.50 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
# instantX-research/InstantID #72, with the spelling of torch before 2.2 corrected
REPORTED = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 14.00 MiB. GPU 0 has a total capacity of 4.00 GiB "
    "of which 0 bytes is free. Of the allocated memory 6.97 GiB is allocated by PyTorch, and 184.73 MiB is reserved by "
    "PyTorch but unallocated."
)
PRIVATE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.50 GiB is free. "
    "Including non-PyTorch memory, this process has 6.50 GiB memory in use. Of the allocated memory 5.00 GiB is allocated "
    "by PyTorch, with 12.00 MiB allocated in private pools (e.g., CUDA Graphs), and 768.00 MiB is reserved by PyTorch but "
    "unallocated."
)


def test_every_number_of_a_message_under_a_cap_is_read():
    found = read_message(CAPPED)
    assert found.asked_bytes == 112 * MIB
    assert found.total_bytes == pytest.approx(139.80 * GIB, abs=1)
    assert found.free_bytes == pytest.approx(124.06 * GIB, abs=1)
    assert found.process_bytes is None  # "Process 4242" may be another process
    assert found.allowed_bytes == found.limit_bytes == 15 * GIB
    assert found.allocated_bytes == pytest.approx(14.87 * GIB, abs=1)
    assert found.unallocated_bytes == 96.5 * MIB
    assert found.reserved_bytes == found.allocated_bytes + found.unallocated_bytes
    assert found.missing_bytes == pytest.approx((14.87 - 15) * GIB + 208.5 * MIB, abs=2)
    assert "missing" in str(found) and "14.87 GiB" in str(found)


def test_messages_of_other_machines_are_read_too():
    reported, private = read_message(f"a log\n  {REPORTED}\nand more"), read_message(PRIVATE)
    assert (reported.allowed_bytes, reported.free_bytes) == (None, 0)
    assert reported.limit_bytes == reported.reserved_bytes and reported.missing_bytes == 14 * MIB
    assert private.process_bytes == 6.5 * GIB
    assert private.limit_bytes == 5 * GIB + 768 * MIB + 1.5 * GIB
    assert private.missing_bytes == 0.5 * GIB


@pytest.mark.parametrize(
    "text",
    [
        "",
        "RuntimeError: shapes do not match",
        "CUDA out of memory. Tried to allocate 1.63 GiB (GPU 0; 44.56 GiB total)",
    ],
)
def test_a_text_that_is_no_such_message_is_refused(text):
    with pytest.raises(ValueError, match=r"text is .*without .*paste the whole message"):
        read_message(text)


def test_a_refused_text_is_quoted_up_to_80_characters():
    with pytest.raises(ValueError, match=rf"^text is '{'x' * 80}', without asked_bytes, "):
        read_message("x" * 100)


SITE = "/usr/lib/python3/site-packages"
CALLS = {  # a run's frames, outermost first
    "load": [("transformers/modeling_utils.py", "from_pretrained"), ("bitsandbytes/nn/modules.py", "forward")],
    "forward": [("trl/trainer/sft_trainer.py", "training_step"), ("trl/trainer/sft_trainer.py", "compute_loss")],
    "backward": [
        ("trl/trainer/sft_trainer.py", "training_step"),
        ("accelerate/accelerator.py", "backward"),
        ("transformers/models/llama/modeling_llama.py", "forward"),  # computed again
    ],
    "optimizer step": [("accelerate/optimizer.py", "step"), ("bitsandbytes/optim/optimizer.py", "init_state")],
    "evaluation": [("transformers/trainer.py", "evaluate"), ("trl/trainer/sft_trainer.py", "compute_loss")],
    "saving": [("trl/trainer/sft_trainer.py", "_save_checkpoint"), ("torch/serialization.py", "save")],
    "merging": [("peft/tuners/lora/model.py", "merge_and_unload"), ("peft/tuners/lora/bnb.py", "merge")],
}


@pytest.mark.parametrize("place", PLACES)
def test_the_outermost_frame_that_tells_decides(place):
    frames = [("my_run.py", "<module>"), ("transformers/trainer.py", "train"), *CALLS[place]]
    text = "".join(f'  File "{SITE}/{file}", line 1, in {function}\n    x\n' for file, function in frames)
    assert place_of(f"Traceback (most recent call last):\n{text}torch.OutOfMemoryError: {CAPPED}") == place


def test_a_traceback_that_does_not_tell_gives_none():
    assert place_of('Traceback:\n  File "a.py", line 1, in <module>\ntorch.OutOfMemoryError') is None


def test_a_caught_error_is_placed_by_its_own_traceback():
    class Asks(torch.nn.Module):
        def forward(self, x):
            return torch.empty(2**50, dtype=torch.int8)  # no machine has a pebibyte

    with pytest.raises((RuntimeError, MemoryError)) as caught:
        Asks()(torch.ones(1))
    assert place_of(caught.value) == "forward"
