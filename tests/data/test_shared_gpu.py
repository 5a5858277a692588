"""Processes that share a GPU reach each other through main memory. On a GPU: tests/gpu/test_several_gpus.py."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.scripts.measure import shared_gpu
from tests import ROOT

EACH_PROCESS = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from data.scripts.measure.shared_gpu import BACKEND, share_the_gpu

share_the_gpu()
dist.init_process_group(backend="nccl")  # what accelerate asks for
assert dist.get_backend() == BACKEND
rank = dist.get_rank()
mine = torch.full((4,), float(rank + 1))

found = mine.clone(); dist.all_reduce(found); assert found.tolist() == [3.0] * 4
found = mine.clone(); dist.broadcast(found, 1); assert found.tolist() == [2.0] * 4
found = [torch.empty(4) for _ in range(2)]; dist.all_gather(found, mine)
assert [part.tolist() for part in found] == [[1.0] * 4, [2.0] * 4]
for dtype in (torch.float32, torch.bfloat16, torch.uint8):
    for _ in range(2):  # the second time through the buffer of the first
        found = torch.empty(2, 4, dtype=dtype); dist.all_gather_into_tensor(found, mine.to(dtype))
        assert found.tolist() == [[1.0] * 4, [2.0] * 4], dtype
found = torch.empty(2); dist.reduce_scatter_tensor(found, mine + torch.arange(4)); assert found.tolist() == [3.0 + 4 * rank, 5.0 + 4 * rank]
dist.barrier()
told = [None, None]; dist.all_gather_object(told, rank); assert told == [0, 1]

# data-parallel and sharded, against both processes' inputs in one
torch.manual_seed(0)
whole, copies, shards = (torch.nn.Linear(4, 4) for _ in range(3))
for other in (copies, shards):
    other.load_state_dict(whole.state_dict())
(whole(torch.tensor([[1.0] * 4, [2.0] * 4])).square().sum() / 2).backward()
together = torch.nn.parallel.DistributedDataParallel(copies)
together(mine).square().sum().backward()
torch.testing.assert_close(copies.weight.grad, whole.weight.grad)
fully_shard(shards, mesh=init_device_mesh("cpu", (2,)))
shards(mine).square().sum().backward()
torch.testing.assert_close(shards.weight.grad.full_tensor(), whole.weight.grad)
print("all of it")
"""


def test_what_training_needs_of_a_group_comes_out_right(tmp_path):
    script = tmp_path / "each.py"
    script.write_text(EACH_PROCESS, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    alone = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(launcher, env=alone, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3_000:]
    assert ended.stdout.count("all of it") == 2


def test_sharded_tensors_on_a_gpu_go_through_main_memory_too():
    """Without a GPU it can be seen where torch would go with such a tensor."""

    def goes_there(name: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"_c10d_functional::{name}", "CUDA")

    assert not any(map(goes_there, shared_gpu.FUNCTIONAL))
    held = shared_gpu.functional_through_main_memory()
    assert all(map(goes_there, shared_gpu.FUNCTIONAL))
    held._destroy()


@pytest.mark.parametrize("nested", [torch.ones(2), [torch.ones(2)], [[torch.ones(2)], []]])
def test_the_tensors_of_nested_lists(nested):
    (found,) = shared_gpu.tensors(nested)
    assert found.tolist() == [1.0, 1.0]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_a_buffer_that_is_too_large_for_shared_memory_lies_on_the_disk(monkeypatch):
    monkeypatch.setattr(shared_gpu.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    assert shared_gpu.folder_with_room(100) == tempfile.gettempdir()
    assert shared_gpu.folder_with_room(99) == "/dev/shm"
