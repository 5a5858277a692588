"""What this machine can do, and which of the course's gears it runs.

The same lessons run in three gears: `cpu` (the shipped model in float32), `t4` (a GPU without native bfloat16, in
float16) and `ampere` (bfloat16, from compute capability 8.0). The environment variable QLORA_GEAR overrides the choice.
"""

import os
import sys
from dataclasses import dataclass

import psutil
import torch

from qlora_helpers import validation
from qlora_helpers.launch import launch_of_this_process

__all__ = ["GEARS", "Hardware", "detect", "given_or_detected", "peak_memory_bytes"]

GEARS = {"cpu": torch.float32, "t4": torch.float16, "ampere": torch.bfloat16}  # gear: compute dtype


@dataclass(frozen=True)
class Hardware:
    """One machine.

    Attributes:
        gear: "cpu", "t4" or "ampere".
        chosen_by: "gear" (the argument), "QLORA_GEAR" or "detection".
        gpu_name, gpu_bytes, capability: of this process's GPU, which is the first one unless several processes were launched;
            None, 0 and None if there is none.
        native_bfloat16: whether the GPU has bfloat16 in hardware; emulation does not count.
        cores: processor cores that this process may use.
        host_bytes: main memory.
    """

    gear: str
    chosen_by: str
    gpu_name: str | None
    gpu_bytes: int
    capability: tuple[int, int] | None
    native_bfloat16: bool
    cores: int
    host_bytes: int

    @property
    def device(self) -> str:
        """torch's name of the device: "cpu" or "cuda"."""
        return "cpu" if self.gear == "cpu" else "cuda"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products in this gear."""
        return GEARS[self.gear]


def detect(gear: str | None = None) -> Hardware:
    """Look at the machine and choose the gear.

    Args:
        gear: use this one; by default QLORA_GEAR decides, or the machine if it is not set.

    Raises:
        ValueError: `gear` or QLORA_GEAR is not the name of a gear, or this machine cannot run it.
    """
    has_gpu = torch.cuda.is_available()
    # the plain call is True on a T4, since it counts emulation
    native = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    asked_by = "gear" if gear else "QLORA_GEAR"
    wanted = gear or os.environ.get("QLORA_GEAR", "").strip()
    if wanted and wanted not in GEARS:
        raise ValueError(f"{asked_by}={wanted!r}: choose one of {', '.join(GEARS)}")
    if wanted in ("t4", "ampere") and not has_gpu:
        raise ValueError(f"{asked_by}={wanted!r} needs a GPU that torch can see, and there is none: use cpu")
    if wanted == "ampere" and not native:
        raise ValueError(f"{asked_by}='ampere' needs a GPU with native bfloat16, and this one has none: use t4")
    detected = "ampere" if native else "t4" if has_gpu else "cpu"
    properties = torch.cuda.get_device_properties(_gpu_of_this_process()) if has_gpu else None
    return Hardware(
        gear=wanted or detected,
        chosen_by=asked_by if wanted else "detection",
        gpu_name=properties.name if properties else None,
        gpu_bytes=properties.total_memory if properties else 0,
        capability=(properties.major, properties.minor) if properties else None,
        native_bfloat16=native,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        host_bytes=psutil.virtual_memory().total,
    )


def _gpu_of_this_process() -> int:
    """The number of its GPU. Where there are fewer GPUs than processes, which training refuses, that of the last."""
    return min(launch_of_this_process().local_rank, torch.cuda.device_count() - 1)


def given_or_detected(hardware: Hardware | None) -> Hardware:
    """The argument `hardware` of a function; for None, what `detect()` finds.

    Raises:
        ValueError: it is something else.
    """
    if hardware is None:
        return detect()
    if not isinstance(hardware, Hardware):
        cure = "pass what qlora_helpers.hardware.detect() returns, or None"
        raise validation.refuse("hardware", hardware, cure)
    return hardware


def peak_memory_bytes() -> int:
    """The peak main memory of this process so far, in bytes (its peak resident set size)."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
