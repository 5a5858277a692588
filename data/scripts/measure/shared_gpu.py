"""Processes of a launch that share one GPU, for a machine with fewer GPUs than a run needs.

    torchrun --standalone --nproc-per-node 2 -m data.scripts.measure.shared_gpu qlora_helpers run
    accelerate launch --config_file data/accelerate/fsdp.yaml -m data.scripts.measure.shared_gpu qlora_helpers run

What each process takes and what the run learns is as on GPUs of their own: each has its own allocator, with a limit of its own,
and holds its own shards. How fast it is says nothing: the processes take turns, and talk through main memory.

Two things differ. Each process takes GPU 0, whatever its number. And they do not talk over NCCL, which refuses two processes on
one GPU (from 2.30 on it has a switch, `NCCL_MULTI_RANK_GPU_ENABLE`; torch 2.11 brings 2.28), but over gloo, with tensors that are
copied to main memory and back. gloo's own functions for tensors on a GPU end with a segmentation fault where shards are gathered.
"""

import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

BACKEND = "main_memory"
_HELD: list[torch.library.Library] = []
FUNCTIONAL = ("all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor")


class ThroughMainMemory(dist.ProcessGroup):
    """torch's gloo, for tensors on any device: each call copies them to main memory, and what comes back to where they were.

    A call returns when it is done, so that the work it gives has nothing to wait for.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.store = store
        self.buffers: dict[int, torch.Tensor] = {}
        for device in ("cpu", "cuda"):  # which the group's name is kept in
            self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, self.gloo)

    def getBackendName(self) -> str:
        return BACKEND

    def _done(self, call: Callable[..., dist.Work], *args: Any) -> dist.Work:
        """Call one of gloo's functions, of which the first argument holds the outputs."""
        copies = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, args)
        call(*copies).wait()
        outputs = tensors(args[0])
        for there, back in zip(outputs, tensors(copies[0]), strict=True):
            if there is not back:
                there.copy_(back)
        return done(outputs)

    def _buffer(self, size: int) -> torch.Tensor:
        """Main memory of so many bytes that all processes see, made at its first use and then kept."""
        if size not in self.buffers:
            if self.rank() == 0:
                handle, name = tempfile.mkstemp(dir=folder_with_room(size))
                os.close(handle)
                self.store.set(f"buffer of {size}", name)
            name = self.store.get(f"buffer of {size}").decode()
            self.buffers[size] = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            self.gloo.barrier().wait()
            if self.rank() == 0:
                os.unlink(name)  # it lasts as long as a process has it
        return self.buffers[size]

    def _allgather_base(self, output: torch.Tensor, given: torch.Tensor, *opts: Any) -> dist.Work:
        """What FSDP gathers layers with, through memory that the processes share: several times as fast as over gloo."""
        size = given.numel() * given.element_size()
        whole = self._buffer(size * self.size())
        whole[self.rank() * size :][:size].view(given.dtype).copy_(given.reshape(-1))
        self.gloo.barrier().wait()
        output.copy_(whole.view(output.dtype).view(output.shape))
        self.gloo.barrier().wait()  # before another call writes to it
        return done([output])

    def _reduce_scatter_base(self, output: torch.Tensor, given: torch.Tensor, *opts: Any) -> dist.Work:
        return self._done(lambda *both: self.gloo._reduce_scatter_base(*both, *opts), output, given)

    def allgather(self, outputs: list, inputs: list, *opts: Any) -> dist.Work:
        return self._done(lambda *both: self.gloo.allgather(*both, *opts), outputs, inputs)

    def allreduce(self, several: list, *opts: Any) -> dist.Work:
        return self._done(lambda given: self.gloo.allreduce(given, *opts), several)

    def allreduce_coalesced(self, several: list, *opts: Any) -> dist.Work:
        return self._done(lambda given: self.gloo.allreduce_coalesced(given, *opts), several)

    def broadcast(self, several: list, *opts: Any) -> dist.Work:
        return self._done(lambda given: self.gloo.broadcast(given, *opts), several)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self.gloo.barrier(*([opts] if opts is not None else []))

    # as torch 2.13 calls them
    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base


def done(outputs: list[torch.Tensor]) -> dist.Work:
    """A work that is done, with its outputs."""
    future = Future(devices=sorted({tensor.device.index for tensor in outputs if tensor.is_cuda}))
    future.set_result(outputs)
    return torch._C._distributed_c10d._create_work_from_future(future)


def folder_with_room(size: int) -> str:
    """Where a file of so many bytes lies in main memory, or if there is too little room, as in a container, on the disk."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > size else tempfile.gettempdir()


def tensors(nested) -> list[torch.Tensor]:
    """The tensors of a tensor, a list of them, or lists of them."""
    return [nested] if isinstance(nested, torch.Tensor) else [tensor for part in nested for tensor in tensors(part)]


def functional_through_main_memory() -> torch.library.Library:
    """The same for the functions that sharded tensors (`DTensor`) call, which reach gloo past a process group in Python.

    Returns:
        what holds them: they are gone when it is.
    """
    held = torch.library.Library("_c10d_functional", "IMPL")
    for name in FUNCTIONAL:
        function = getattr(torch.ops._c10d_functional, name)

        def on_a_gpu(tensor: torch.Tensor, *args: Any, function=function) -> torch.Tensor:
            made = torch.ops._c10d_functional.wait_tensor(function(tensor.cpu(), *args))
            return made.to(tensor.device)

        held.impl(name, on_a_gpu, "CUDA")
    return held


def share_the_gpu() -> None:
    """Let this process, one of several that a launcher has started, use GPU 0 beside the others.

    To be called before anything reads this process's number.
    """
    from qlora_helpers.training import together

    check, begin_nccl = together.check_launch, dist.init_process_group

    def through_main_memory(backend: str | None = None, **options: Any) -> None:
        begin_nccl(BACKEND, **options)

    def of_one_gpu(launch: Any, hardware: Any) -> None:
        if launch.processes <= torch.cuda.device_count():
            check(launch, hardware)

    os.environ["LOCAL_RANK"] = "0"
    dist.Backend.register_backend(BACKEND, ThroughMainMemory, devices=["cpu", "cuda"])
    dist.init_process_group, together.check_launch = through_main_memory, of_one_gpu
    _HELD.append(functional_through_main_memory())


def main() -> None:
    share_the_gpu()
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
