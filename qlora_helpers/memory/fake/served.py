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
from qlora_helpers.memory.loaded import constant_sizes
from qlora_helpers.memory.tape import FLOAT32
from qlora_helpers.memory.trained import OPTIMIZERS, TrainedTensor, state_sizes
from qlora_helpers.settings import Settings

__all__ = ["Served", "Traced", "moments_of", "serve"]


@dataclass(frozen=True)
class Traced:
    """What a run asks for.

    Attributes:
        standing: what is there throughout, in the order of the modules, of the decoder layers that were run.
        template: for each decoder layer of the whole model, the one that stands for it.
        passes: of a step: one, or with accumulation the first and a later one.
        evaluation: a batch of it; None without.
        ran: how many decoder layers were run.
        why_all: why no fewer of them ran, if the model cannot.
    """

    standing: tuple[Standing, ...]
    template: tuple[int, ...]
    passes: tuple[Timeline, ...]
    evaluation: Timeline | None
    ran: int
    why_all: str = ""

    def in_order(self) -> Iterator[tuple[int | None, Standing]]:
        """What is there throughout in the whole model, in the order of its modules, with the number of its decoder layer."""
        of_layer: dict[int | None, list[Standing]] = {}
        for entry in self.standing:
            of_layer.setdefault(entry.layer, []).append(entry)
        first = next((at for at, entry in enumerate(self.standing) if entry.layer is not None), len(self.standing))
        for entry in self.standing[:first]:
            yield None, entry
        for place, stands_for in enumerate(self.template):
            for entry in of_layer.get(stands_for, ()):
                yield place, entry
        for entry in self.standing[first:]:
            if entry.layer is None:
                yield None, entry


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
    for _, entry in traced.in_order():
        if entry.kind == "adapters":
            allocator.allocate(entry.elements * entry.width)
    moments: dict[str, int] = {}
    for step in range(2):
        held: list[int] = []
        for place, run in enumerate(traced.passes):
            moments = {}  # in the end those of the last pass, which has the gradients of the others beside it
            held += _serve(allocator, run, moments, workspace_bytes // 2 if step == place == 0 else 0)
        _optimizer_step(allocator, traced, settings, moments, first=step == 0)
        for handle in held:
            allocator.free(handle)  # the gradients
    if traced.evaluation is not None:
        evaluated: dict[str, int] = {}
        _serve(allocator, traced.evaluation, evaluated, 0)
        moments["evaluation"] = max(evaluated.values())
    return Served(loaded, moments, allocator.peak_reserved)


def _order_of_loading(place: int | None, entry: Standing) -> list[tuple]:
    """Where a weight stands among those that are loaded: by its name, numbers as numbers (`dot_natural_key`).

    What is no weight of the files comes last.
    """
    if not entry.name:
        return [(2,)]
    parts: list[tuple] = []
    for part in entry.name.split("."):
        if part.isdigit():
            parts.append((0, int(part)))
        else:
            text = part.rstrip("0123456789")
            parts.append((1, text, int(part[len(text) :])) if text != part else (1, text))
    if place is not None:  # the first number of a name in a decoder layer is that of the layer
        at = next(at for at, part in enumerate(parts) if part[0] == 0)
        parts[at] = 0, place
    return parts


def _load(allocator: CachingAllocator, traced: Traced, settings: Settings) -> int:
    """Load the model as transformers does; returns what is handed out then.

    It asks for all that the weights will take at once and gives it back, so that they get one segment
    (`modeling_utils.caching_allocator_warmup`). Then it takes the weights in the order of their names
    (`core_model_loading.convert_and_load_state_dict_in_model`), each in 16 bits, and quantises it before the next comes.
    """
    weights = [
        (place, entry) for place, entry in traced.in_order() if entry.kind in ("4-bit weights", "16-bit weights")
    ]
    allocator.free(allocator.allocate(sum(entry.elements * entry.loaded_width for _, entry in weights)))
    wide: list[tuple[int, Standing]] = []
    for _, entry in sorted(weights, key=lambda weight: _order_of_loading(*weight)):
        if entry.kind == "4-bit weights":
            _quantise(allocator, entry, settings)
            continue
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


def _quantise(allocator: CachingAllocator, entry: Standing, settings: Settings) -> None:
    """What bitsandbytes asks for when it quantises a weight on the card (`functional.quantize_4bit`), in its order."""
    original = allocator.allocate(entry.decoded * 2)
    absmax = -(-entry.decoded // settings.block_size) * FLOAT32
    scales = allocator.allocate(absmax)
    allocator.allocate(entry.elements * entry.width)
    constants = constant_sizes(entry.decoded, settings.double_quant, settings.block_size)
    if settings.double_quant:
        in_8_bits, nested, nested_codebook, offset, codebook = constants
        for size in (codebook, offset):
            allocator.allocate(size)
        shifted = allocator.allocate(absmax)
        for size in (nested, in_8_bits, nested_codebook):
            allocator.allocate(size)
        allocator.free(shifted)
        allocator.free(scales)
    else:
        _, codebook = constants
        allocator.allocate(codebook)
    allocator.free(original)


def _optimizer_step(
    allocator: CachingAllocator, traced: Traced, settings: Settings, moments: dict[str, int], first: bool
) -> None:
    """The states, which the first step makes, and what an optimizer takes while it works."""
    kind = OPTIMIZERS[settings.optimizer]
    trained = [entry for _, entry in traced.in_order() if entry.trained]
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
    most, at = [0] * len(names), 0
    if workspace:  # of cuBLAS: for the thread of the forward pass, and for that of the backward pass
        allocate(workspace)
        allocate(workspace)
    for entry, size, part in zip(which.tolist(), change.tolist(), parts.tolist(), strict=True):
        while at <= part:  # what is there when a part begins
            most[at] = allocator.allocated
            at += 1
        if size > 0:
            handles[entry] = allocate(size)
            if allocator.allocated > most[part]:
                most[part] = allocator.allocated
        elif size < 0:
            free(handles.pop(entry))
    most[at:] = [allocator.allocated] * len(most[at:])
    for part, size in enumerate(most):
        moments[names[part]] = max(moments.get(names[part], 0), size)
    return handles.values()
