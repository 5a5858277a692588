"""What the processes of a run tell each other beside their gradients: small things, through main memory.

They go through a group of their own on torch's gloo backend, where waiting takes no GPU and has a long time limit: while the
first process writes a folder or asks questions, the others wait, and NCCL's limit of half an hour does not run. With one
process nothing is exchanged, and torch's process groups are not begun.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from qlora_helpers.launch import HOW_TO_LAUNCH, Launch, launch_of_this_process

if TYPE_CHECKING:
    from qlora_helpers.hardware import Hardware

__all__ = ["ALONE", "Together", "begin_together", "check_launch", "silent_unless_first"]

WAIT = timedelta(hours=24)
_groups: dict[int, Any] = {}  # by the number of processes: a group is made once in a process
T = TypeVar("T")


@dataclass(frozen=True)
class Together:
    """The processes of a run.

    Attributes:
        launch: which of them this one is.
        group: torch's process group for what they tell each other; None for one process.
    """

    launch: Launch
    group: Any = None

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def largest(self, value: int) -> int:
        """The largest of the processes' numbers."""
        if self.group is None:
            return value
        found = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the processes' tensors, in float64 and in main memory; with one process, the tensor itself."""
        if self.group is None:
            return values
        found = values.detach().to("cpu", torch.float64)
        dist.all_reduce(found, group=self.group)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; and if that fails, its error in all of them.

        Raises:
            Exception: what `make` raises.
        """
        if self.group is None:
            return make()
        told: list[Any] = [None]
        failed = None
        if self.launch.leads:
            try:
                told = [(make(), None)]
            except Exception as error:  # raised below, once the others know
                failed, told = error, [(None, _sendable(error))]
        dist.broadcast_object_list(told, src=0, group=self.group)
        made, error = told[0]
        if failed is not None:
            raise failed
        if error is not None:
            raise error
        return made


ALONE = Together(Launch())


def _sendable(error: Exception) -> Exception:
    """An error that another process can raise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some take other arguments than they keep
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def begin_together(hardware: Hardware) -> Together:
    """Meet the other processes of this launch; alone, there is nothing to do.

    Each process takes the GPU of its local rank. Where the process group exists already, it is used.

    Raises:
        ValueError: this machine cannot run what was launched, or would not do what was meant (see `check_launch`).
    """
    launch = launch_of_this_process()
    check_launch(launch, hardware)
    if launch.processes == 1:
        return Together(launch)
    from accelerate import PartialState

    PartialState(cpu=hardware.device == "cpu")  # as the trainer will find it: NCCL or gloo, and the GPU of this process
    if launch.processes not in _groups:
        _groups[launch.processes] = dist.new_group(backend="gloo", timeout=WAIT)
    return Together(launch, _groups[launch.processes])


def check_launch(launch: Launch, hardware: Hardware) -> None:
    """Make sure that this machine does what the launch means.

    A process that was started alone, and sees several GPUs, is refused: transformers' trainer would spread each batch over
    all of them (`torch.nn.DataParallel`), which TRL does not support. A notebook cannot be launched in another way, so there
    the first GPU is used, and that is said.

    Raises:
        ValueError: it does not; the message says how to start the run.
    """
    if hardware.device == "cpu":
        if launch.sharding:
            raise ValueError(
                "sharding='fsdp': accelerate shards on GPUs alone, and this run is on a CPU. Leave out the configuration of "
                f"accelerate: {HOW_TO_LAUNCH.format(launch.processes)}"
            )
        return
    gpus = torch.cuda.device_count()
    if launch.processes > gpus:
        raise ValueError(
            f"{launch.processes} processes were launched, and {gpus} GPU{'' if gpus == 1 else 's'} can be seen: each process "
            f"needs one. Start it with {HOW_TO_LAUNCH.format(gpus)}"
        )
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        said = f"{gpus} GPUs are visible and one process was started"
        if "ipykernel" not in sys.modules:
            raise ValueError(
                f"{said}: {HOW_TO_LAUNCH.format(gpus)} uses all of them, CUDA_VISIBLE_DEVICES=0 before the command one"
            )
        print(f"{said}, this notebook's. The run uses the first GPU; a command uses all: {HOW_TO_LAUNCH.format(gpus)}")


@contextlib.contextmanager
def silent_unless_first(launch: Launch) -> Iterator[None]:
    """Only the first process prints: else each line would come as many times as there are processes."""
    if launch.leads:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
