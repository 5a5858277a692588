"""What a run's last bits depend on beside its settings: the device, the number of threads, the versions of libraries."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from qlora_helpers.hardware import Hardware

__all__ = ["changes", "environment"]

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def environment(hardware: Hardware) -> dict[str, str | int]:
    """The device, the versions of Python and of the libraries, and on a CPU the number of threads.

    Sums are done in another order on another device or with other threads, so their last bits differ.
    """
    on_gpu = hardware.device == "cuda"
    cpu = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": hardware.gpu_name if on_gpu else cpu,
        **({} if on_gpu else {"threads": torch.get_num_threads()}),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def changes(before: dict[str, str | int], now: dict[str, str | int]) -> list[str]:
    """What differs, each as "torch was 2.12.0 and is now 2.13.0"."""
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name} was {before.get(name)} and is now {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]
