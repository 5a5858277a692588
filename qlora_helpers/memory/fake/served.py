"""torch's allocator, with all that a run asks it for in order: the model is loaded, then two steps, then an evaluation.

It hands out blocks that can be larger than what was asked for, and holds more than it hands out. Both follow from the order
of the requests alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qlora_helpers.memory.allocator import CachingAllocator
from qlora_helpers.memory.fake.trace import Standing
from qlora_helpers.memory.fake.whole import Timeline
from qlora_helpers.memory.tape import FLOAT32
from qlora_helpers.memory.trained import OPTIMIZERS, TrainedTensor, state_sizes
from qlora_helpers.settings import Settings

__all__ = ["Served", "Traced", "moments_of", "serve"]

_NESTED = 256  # quantised scales that share a scale


@dataclass(frozen=True)
class Traced:
    """What a run asks for.

    Attributes:
        standing: what is there throughout, each with how often the whole model has it, in the order of its modules.
        passes: of a step: one, or with accumulation the first and a later one.
        evaluation: a batch of it; None without.
        ran, layers: how many decoder layers were run, and how many there are.
        why_all: why no fewer of them ran, if the model cannot.
    """

    standing: tuple[tuple[Standing, int], ...]
    passes: tuple[Timeline, ...]
    evaluation: Timeline | None
    ran: int
    layers: int
    why_all: str = ""


@dataclass(frozen=True)
class Served:
    """What torch's allocator has handed out and holds, in bytes.

    Attributes:
        loaded: handed out after loading.
        moments: the most handed out at each moment of the second step, and in an evaluation.
        reserved: the most that it holds.
    """

    loaded: int
    moments: dict[str, int]
    reserved: int


def moments_of(run: Timeline) -> dict[str, tuple[int, int]]:
    """The most within each moment of a pass, and when, under the names of `phases.MOMENTS`."""
    names, found = _names(run.layers), {}
    for part, (most, when) in run.peaks().items():
        if most > found.get(names[part], (-1, 0))[0]:
            found[names[part]] = most, when
    return found


def _names(layers: int) -> list[str]:
    """The moment that each part of a pass belongs to."""
    backward = ["last layer backward", *["middle layer backward"] * (layers - 2), "first layer backward"]
    return ["forward", *["forward"] * layers, "loss", "loss backward", *backward[:layers], "embeddings backward"]


def serve(traced: Traced, settings: Settings, workspace_bytes: int) -> Served:
    """Let torch's allocator serve a run.

    Args:
        settings: of the run; its optimizer decides what the first step leaves behind.
        workspace_bytes: of cuBLAS, for the threads of the forward and the backward pass together.
    """
    allocator = CachingAllocator()
    loaded = _load(allocator, traced, settings)
    for entry in _each(traced, "adapters"):
        allocator.allocate(entry.elements * entry.width)
    moments: dict[str, int] = {}
    for step in range(2):
        held: list[int] = []
        moments = {}
        for place, run in enumerate(traced.passes):
            moments = {}  # those of the last pass, which has the gradients of the others beside it
            held += _serve(allocator, run, moments, workspace_bytes // 2 if step == place == 0 else 0)
        _optimizer_step(allocator, traced, settings, moments, first=step == 0)
        for handle in held:
            allocator.free(handle)  # the gradients
    if traced.evaluation is not None:
        evaluated: dict[str, int] = {}
        _serve(allocator, traced.evaluation, evaluated, 0)
        moments["evaluation"] = max(evaluated.values())
    return Served(loaded, moments, allocator.peak_reserved)


def _each(traced: Traced, *kinds: str) -> Iterator[Standing]:
    for entry, count in traced.standing:
        if entry.kind in kinds:
            for _ in range(count):
                yield entry


def _load(allocator: CachingAllocator, traced: Traced, settings: Settings) -> int:
    """Load the model as transformers does; returns what is handed out then.

    It asks for all that the weights will take at once and gives it back, so that they get one segment
    (`modeling_utils.caching_allocator_warmup`). A weight comes in 16 bits and is quantised; its scales come in float32.
    """
    weights = list(_each(traced, "4-bit weights", "16-bit weights"))
    allocator.free(allocator.allocate(sum(entry.elements * entry.loaded_width for entry in weights)))
    wide: list[tuple[int, Standing]] = []
    for entry in _each(traced, "4-bit weights", "16-bit weights", "quantisation constants"):
        if entry.kind == "4-bit weights":
            original = allocator.allocate(entry.decoded * 2)
            scales = allocator.allocate(-(-entry.decoded // settings.block_size) * FLOAT32)
            allocator.allocate(entry.elements * entry.width)
            if settings.double_quant:
                allocator.free(scales)
            else:
                allocator.free(scales)
            allocator.free(original)
        else:
            handle = allocator.allocate(entry.elements * entry.loaded_width)
            if entry.loaded_width != entry.width:
                wide.append((handle, entry))
    allocator.empty_cache()
    loaded = allocator.allocated
    for handle, entry in wide:  # prepare_model_for_kbit_training, then its own emptying of the cache
        allocator.allocate(entry.elements * entry.width)
        allocator.free(handle)
    allocator.empty_cache()
    return loaded


def _optimizer_step(
    allocator: CachingAllocator, traced: Traced, settings: Settings, moments: dict[str, int], first: bool
) -> None:
    """The states, which the first step makes, and what an optimizer takes while it works."""
    kind = OPTIMIZERS[settings.optimizer]
    trained = [entry for entry, count in traced.standing if entry.trained for _ in range(count)]
    for entry in trained if first else ():
        sizes, _ = state_sizes(TrainedTensor(entry.elements, 1, entry.embedding), kind, entry.width)
        for size in sizes:
            allocator.allocate(size)
    copies = [allocator.allocate(entry.elements * entry.width) for entry in trained] if kind.temporaries else []
    moments["optimizer step"] = allocator.allocated
    for handle in copies:
        allocator.free(handle)


def _serve(allocator: CachingAllocator, run: Timeline, moments: dict[str, int], workspace: int) -> Iterable[int]:
    """Let the allocator serve a pass; returns the handles of what outlives it, and notes the most in each moment."""
    which, change, parts = run.events()
    names, handles = _names(run.layers), {}
    allocate, free = allocator.allocate, allocator.free
    most = [0] * len(names)
    if workspace:  # of cuBLAS: for the thread of the forward pass, and for that of the backward pass
        allocate(workspace)
        allocate(workspace)
    for entry, size, part in zip(which.tolist(), change.tolist(), parts.tolist(), strict=True):
        if size > 0:
            handles[entry] = allocate(size)
            if allocator.allocated > most[part]:
                most[part] = allocator.allocated
        elif size < 0:
            free(handles.pop(entry))
    for part, size in enumerate(most):
        moments[names[part]] = max(moments.get(names[part], 0), size)
    return handles.values()
