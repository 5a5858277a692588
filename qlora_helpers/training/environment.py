"""What a run's last bits depend on beside its settings: the device, the number of threads, the versions of libraries."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from qlora_helpers.hardware import Hardware
from qlora_helpers.launch import launch_of_this_process

__all__ = ["changes", "environment"]

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def environment(hardware: Hardware) -> dict[str, str | int]:
    """The device, the versions of Python and of the libraries; of several processes their number, and whether they shard the
    model; on a CPU the number of threads.

    Sums are done in another order on another device, with other threads or other processes, so their last bits differ.
    """
    on_gpu = hardware.device == "cuda"
    cpu = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    launch = launch_of_this_process()
    return {
        "device": hardware.gpu_name if on_gpu else cpu,
        **({"processes": launch.processes} if launch.processes > 1 else {}),
        **({"sharding": launch.sharding} if launch.sharding else {}),
        **({} if on_gpu else {"threads": torch.get_num_threads()}),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def changes(before: dict[str, str | int | None], now: dict[str, str | int | None]) -> list[str]:
    """What differs, each as "torch was 2.12.0 and is now 2.13.0"; what is missing or None "was not set"."""
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name} {_was(before.get(name))} and {_is(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _was(value: str | int | None) -> str:
    return "was not set" if value is None else f"was {value}"


def _is(value: str | int | None) -> str:
    return "is not set now" if value is None else f"is now {value}"
