"""A run that does not fit on one GPU, on several: what the next step is, and the least memory that it can be trained with.

The course has no prices: the memory of all GPUs together stands for what they cost. Sets that differ in speed alone, or that
have cards of several kinds, are not told apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.gpus import GPU, find_gpu, known_gpus, nominal_gib
from qlora_helpers.memory.ladder import Change
from qlora_helpers.memory.loaded import weights_by_part
from qlora_helpers.memory.prediction import Prediction, needs_libraries, predict
from qlora_helpers.memory.search import divisors
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.settings import SHARDED_OPTIMIZERS, Settings
from qlora_helpers.units import GIB

__all__ = ["NUMBERS", "CheapSet", "cheapest_sets", "on_gpus", "several_gpus"]

NUMBERS = (1, 2, 4, 8)  # of GPUs in one machine
OLDEST = (7, 5)  # compute capability


@dataclass(frozen=True)
class CheapSet:
    """GPUs on which a run fits.

    Attributes:
        settings: of the run on them.
        nominal_gib: what each of them is sold with.
        gpus: all known ones of this size on which it fits, by their short names.
        prediction: for the one with the least spare memory.
    """

    settings: Settings
    nominal_gib: int
    gpus: tuple[str, ...]
    prediction: Prediction

    @property
    def total_gib(self) -> int:
        """What all of them together are sold with."""
        return self.settings.num_gpus * self.nominal_gib

    def __str__(self) -> str:
        how = {None: "", "fsdp": " with FSDP"}[self.settings.sharding]
        if self.settings.sharding and self.settings.num_gpus == 1:
            how = " with FSDP's offload"
        elif self.settings.cpu_offload:
            how += " and offload"
        return f"{self.settings.num_gpus} x {self.nominal_gib} GB{how}"


def on_gpus(settings: Settings, number: int, sharding: str | None = "fsdp", cpu_offload: bool = False) -> Settings:
    """A run made on so many GPUs, each with at most as many sequences at once as now.

    A step has as many sequences as before if the GPUs can share them evenly, else the fewest more. An optimizer that takes no
    shards is left to `predict`. A `memory_budget` is left out: the batch is settled.
    """
    sequences, each = settings.batch_size * settings.accumulation, settings.batch_per_gpu
    if sequences % number == 0:
        each = next(size for size in divisors(sequences // number) if size <= each)
    batch = number * min(each, -(-sequences // number))
    optimizer = settings.optimizer
    if sharding and optimizer not in SHARDED_OPTIMIZERS:
        optimizer = None
    return replace(
        settings,
        num_gpus=number,
        sharding=sharding,
        cpu_offload=cpu_offload,
        batch_size=batch,
        accumulation=-(-sequences // batch),
        optimizer=optimizer,
        memory_budget=None,
    )


def _can_be_sharded(shape: ModelShape | AnyShape, settings: Settings) -> bool:
    return isinstance(shape, ModelShape) and not needs_libraries(settings) and not settings.upcast_fp32


def several_gpus(shape: ModelShape | AnyShape, settings: Settings, gpu: str | GPU) -> list[Change]:
    """What FSDP does for a run that does not fit, the fewest GPUs first; an empty list if it fits, or is not predicted with it.

    One GPU with the weights in main memory; the first number of 2, 4 and 8 GPUs of this kind with which the run fits in that
    way; and the first with which it fits with the shards on the GPUs, which is faster. The second is left out if it saves no
    GPU. Numbers below that of the settings are not tried.

    Raises:
        ValueError: as `predict` does.
    """
    gpu = find_gpu(gpu)
    if not _can_be_sharded(shape, settings) or predict(shape, settings, gpu).fits:
        return []
    numbers = [number for number in NUMBERS if number >= settings.num_gpus]
    several = [number for number in numbers if number > 1]
    found = []
    for tried, offload in (([1] if settings.num_gpus == 1 else [], True), (several, True), (several, False)):
        runs = [on_gpus(settings, number, cpu_offload=offload) for number in tried]
        predictions = ((run, predict(shape, run, gpu)) for run in runs)
        found.append(next((one for one in predictions if one[1].fits), None))
    alone, offloaded, split = found
    if offloaded and split and offloaded[0].num_gpus >= split[0].num_gpus:
        offloaded = None
    return [_change(shape, settings, *one) for one in (alone, offloaded, split) if one]


def _change(shape: ModelShape | AnyShape, before: Settings, settings: Settings, prediction: Prediction) -> Change:
    number, more = settings.num_gpus, settings.num_gpus - before.num_gpus
    what = f"{number} GPUs like this one, the model split over them with FSDP"
    if number == 1:
        what = "FSDP on this GPU alone, the weights in main memory"
    elif settings.cpu_offload:
        what += ", its shards in main memory"
    moved = _moved_bytes(shape, settings) / GIB
    way = "from main memory" if settings.cpu_offload else "from GPU to GPU"
    price = f"time: {moved:.0f} GiB go {way} in each pass, forward and backward; {prediction.host_bytes_of_run / GIB:.0f} GiB of main memory"
    if more:
        price = f"{more} more GPU{'s' * (more > 1)}; {price}"
    now, then = (run.batch_size * run.accumulation for run in (before, settings))
    if now != then:
        price += f"; a step learns from {then:,} sequences instead of {now:,}"
    return Change(what, price, settings, prediction, ((what, price),))


def _moved_bytes(shape: ModelShape, settings: Settings) -> int:
    """Bytes that come to each GPU to make all layers whole, once forward and once backward."""
    parts = weights_by_part(shape, replace(settings, compute_dtype=settings.compute_dtype or "bfloat16"))
    layers = parts["4-bit weights"] + parts["16-bit weights"]
    others = 1 if settings.cpu_offload else 1 - 1 / settings.num_gpus
    return int(2 * layers * others)


def cheapest_sets(shape: ModelShape | AnyShape, settings: Settings) -> list[CheapSet]:
    """The sets of equal GPUs on which a run fits, the least memory of all GPUs together first.

    For 1, 2, 4 and 8 of the known cards, with the model as it is on one, with FSDP, and with FSDP and its shards in main memory: the smallest size of card with which the run fits. A way is left out if the same number of cards of
    the same size does without it. Laptops' cards come alone. Left out are AMD's, on which nothing of this course was tried, and
    those below compute capability 7.5, for which current builds of torch have no kernels.

    Raises:
        ValueError: as `predict` does.
    """
    found = []
    for number, ways in _ways(shape, settings):
        smallest = None
        for run in ways:
            one = _smallest(shape, run, number)
            if one and (smallest is None or one.nominal_gib < smallest):
                found.append(one)
                smallest = one.nominal_gib
    return sorted(found, key=lambda one: (one.total_gib, one.settings.num_gpus, one.settings.cpu_offload))


def _ways(shape: ModelShape | AnyShape, settings: Settings) -> Iterator[tuple[int, list[Settings]]]:
    """For each number of GPUs how the run can be made on them, the fastest way first."""
    sharded = _can_be_sharded(shape, settings)
    for number in NUMBERS:
        ways = [on_gpus(settings, number, sharding=None)] if number == 1 or not sharded else []
        if sharded:
            ways += [
                on_gpus(settings, number, cpu_offload=offload) for offload in (False, True) if number > 1 or offload
            ]
        yield number, ways


def _smallest(shape: ModelShape | AnyShape, run: Settings, number: int) -> CheapSet | None:
    """The smallest size of card on which a run fits."""
    sizes, by_size = nominal_gib(), {}
    for key, gpu in known_gpus().items():
        current = gpu.compute_capability >= OLDEST and not gpu.name.startswith("AMD")
        if current and (number == 1 or "Laptop" not in gpu.name):
            by_size.setdefault(sizes[key], []).append((key, gpu))
    for size in sorted(by_size):
        predictions = {key: predict(shape, run, gpu) for key, gpu in by_size[size]}
        fitting = {key: one for key, one in predictions.items() if one.fits}
        if fitting:
            closest = min(fitting.values(), key=lambda one: one.spare_bytes)
            return CheapSet(run, size, tuple(fitting), closest)
    return None
