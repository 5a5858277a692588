"""How this process was started: alone, or as one of several that torchrun or accelerate has launched for one run.

A launcher starts one process for each GPU and tells each, in environment variables, which of how many it is (`RANK`,
`WORLD_SIZE`, `LOCAL_RANK`); `accelerate launch` also says there whether the model is sharded (`ACCELERATE_USE_FSDP`,
`FSDP_…`). Nothing else has to change in the command that is launched. This module reads these variables, and needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qlora_helpers import validation
from qlora_helpers.settings import OF_SEVERAL_GPUS, Settings

__all__ = ["HOW_TO_LAUNCH", "Launch", "launch_of_this_process", "settings_in"]

# by number of processes
HOW_TO_LAUNCH = "torchrun --nproc-per-node {} -m qlora_helpers run …"
# of other launchers, such as mpirun, which `accelerate` understands, too
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """The processes of a run, and which of them this one is.

    Attributes:
        processes: how many there are, each with a GPU of its own, or on a CPU with its own threads.
        rank: which one this is, from 0.
        local_rank: the same on this machine: the number of its GPU among those that can be seen.
        sharding: "fsdp" if accelerate's configuration shards the model; None if each process has a whole one.
        cpu_offload: whether that configuration keeps the shards in main memory.
        fsdp_version: torch's FSDP, 1 or 2, as that configuration says; None without sharding.
    """

    processes: int = 1
    rank: int = 0
    local_rank: int = 0
    sharding: str | None = None
    cpu_offload: bool = False
    fsdp_version: int | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints, and writes the run's folder."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Whether a launcher has started this process as a part of a run: of several processes, or of one that is sharded."""
        return self.processes > 1 or self.sharding is not None


def launch_of_this_process(environment: Mapping[str, str] | None = None) -> Launch:
    """Read how this process was launched; without a launcher it is alone.

    Args:
        environment: the variables; by default those of this process.

    Raises:
        ValueError: several processes were asked for, and a launcher has started one; they are on several machines; or the
            model would be sharded in a way that does not work, or not without a launcher.
    """
    environment = os.environ if environment is None else environment
    _refuse_a_lonely_process(environment)
    processes, rank, local_rank = (_number(environment, name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    processes = max(processes, 1)
    here = _number(environment, "LOCAL_WORLD_SIZE") or processes
    if here != processes:
        raise ValueError(
            f"WORLD_SIZE={processes}: a launcher has started {here} of them on this machine, and the rest elsewhere. A run is "
            f"on one machine here: {HOW_TO_LAUNCH.format(here)}"
        )
    if not _is_true(environment, "ACCELERATE_USE_FSDP"):
        return Launch(processes, rank, local_rank)
    if "LOCAL_RANK" not in environment:
        raise ValueError(
            "ACCELERATE_USE_FSDP=true, and no launcher has started this process, so nothing would be sharded: start it with "
            "accelerate launch --config_file data/accelerate/fsdp.yaml -m qlora_helpers run …"
        )
    if _is_true(environment, "ACCELERATE_USE_CPU"):
        raise ValueError(
            "ACCELERATE_USE_FSDP=true on a CPU: accelerate shards on GPUs alone, and would leave it out without a word. Start "
            f"the processes with {HOW_TO_LAUNCH.format(processes)}"
        )
    return Launch(
        processes,
        rank,
        local_rank,
        sharding="fsdp",
        cpu_offload=_is_true(environment, "FSDP_OFFLOAD_PARAMS"),
        fsdp_version=_number(environment, "FSDP_VERSION") or 1,
    )


def _refuse_a_lonely_process(environment: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, which has a port to talk to others and no others."""
    alone = not any(name in environment for name in _SIZES)
    if alone and _is_true(environment, "ACCELERATE_USE_CPU") and "MASTER_PORT" in environment:
        raise ValueError(
            "ACCELERATE_USE_CPU=True: accelerate launch --cpu was asked for several processes, and has started one. On a CPU "
            f"start them with {HOW_TO_LAUNCH.format(2)}"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    """The number in a variable; 0 if it is not set.

    Raises:
        ValueError: it is none.
    """
    text = environment.get(name, "").strip()
    if text and not text.isdecimal():
        raise ValueError(
            f"{name}={text!r}: must be a whole number, as torchrun sets it; or unset it to run one process"
        )
    return int(text or 0)


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    """As accelerate reads it."""
    return environment.get(name, "").strip().lower() in ("1", "true", "yes", "y", "t", "on")


def settings_in(launch: Launch, settings: Settings) -> Settings:
    """The settings of a run with the number of GPUs and the sharding that its processes were launched with.

    Raises:
        ValueError: the settings name others; or `batch_size` cannot be divided among the processes; or a setting needs one
            process.
    """
    if not isinstance(settings, Settings):
        raise validation.refuse("settings", settings, "give a Settings(...)")
    found = {"num_gpus": launch.processes, "sharding": launch.sharding, "cpu_offload": launch.cpu_offload}
    for name in OF_SEVERAL_GPUS:
        value, default = getattr(settings, name), Settings.__dataclass_fields__[name].default
        if value not in (default, found[name]):
            raise validation.refuse(name, value, _cure(name, value, launch))
    if launch.processes > 1 and settings.batch_size % launch.processes:
        up = -(-settings.batch_size // launch.processes) * launch.processes
        cure = f"{launch.processes} processes were launched, and each takes as many of them: choose {up}, or another number of processes"
        raise validation.refuse("batch_size", settings.batch_size, cure)
    if launch.is_shared and settings.memory_budget is not None:
        cure = "it is planned for one GPU and one process. Leave it out, and choose batch_size and gradient_checkpointing yourself"
        raise validation.refuse("memory_budget", settings.memory_budget, cure)
    return replace(settings, **found)


def _cure(name: str, value: object, launch: Launch) -> str:
    """How to launch what a setting names, where something else was launched."""
    if name == "num_gpus":
        how = "process was" if launch.processes == 1 else "processes were"
        return f"{launch.processes} {how} launched. Start it with {HOW_TO_LAUNCH.format(value)}, or leave it out"
    file = "fsdp_offload" if name == "cpu_offload" else "fsdp"
    return (
        "the processes were launched without it. Start them with "
        f"accelerate launch --config_file data/accelerate/{file}.yaml -m qlora_helpers run …, or leave it out"
    )
