"""What a run of any model takes: a step of the libraries' own code, and torch's allocator with all that the step asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from qlora_helpers import validation
from qlora_helpers.library_messages import silenced
from qlora_helpers.memory.allocator import CachingAllocator
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.fake.ledger import ALIVE
from qlora_helpers.memory.fake.model import prepare
from qlora_helpers.memory.fake.trace import Standing, trace_evaluation, trace_step
from qlora_helpers.memory.fake.whole import Timeline, whole_pass
from qlora_helpers.memory.gpus import GPU, find_gpu
from qlora_helpers.memory.layers import DEQUANTISED, TILE
from qlora_helpers.memory.tape import rounded
from qlora_helpers.memory.trained import OPTIMIZERS, Trained, TrainedTensor, state_sizes, trained_of
from qlora_helpers.settings import MEMORY_SETTINGS, Settings

__all__ = ["Run", "parameters_per_rank", "run_on_fake_tensors"]

WEIGHTS = ("4-bit weights", "quantisation constants", "16-bit weights")


@dataclass(frozen=True)
class Run:
    """What a run takes, in bytes.

    Attributes:
        weights: of the model when training begins, by part.
        loaded: of the model after loading.
        trained: what is trained.
        moments: the most in torch's tensors at each moment of a steady step, what is there throughout included.
        peak: the moment with the most.
        at_peak: what is alive then besides the weights, by part.
        reserved: the most that torch's allocator holds.
        ran, layers: how many decoder layers were run, and how many there are.
    """

    weights: dict[str, int]
    loaded: int
    trained: Trained
    moments: dict[str, int]
    peak: str
    at_peak: dict[str, int]
    reserved: int
    ran: int
    layers: int


@dataclass(frozen=True)
class _Traced:
    standing: tuple[tuple[Standing, int], ...]  # each with how often the whole model has it, in the order of its modules
    passes: tuple[Timeline, ...]
    evaluation: Timeline | None
    ran: int
    layers: int


def run_on_fake_tensors(shape: AnyShape, settings: Settings, gpu: GPU) -> Run:
    """What a run takes.

    Args:
        settings: with a `compute_dtype` and an `optimizer`.

    Raises:
        ValueError: the libraries refuse such a run, or their code cannot run without values; the message has their reason.
    """
    traced = _traced(shape, _of_memory(settings), gpu.compute_capability)
    tensors = [
        TrainedTensor(entry.elements, count, entry.embedding) for entry, count in traced.standing if entry.trained
    ]
    if not tensors:
        raise validation.refuse("target_modules", settings.target_modules, "no layer of this model has such a name")
    trained = trained_of(tensors, settings)
    weights = dict.fromkeys(WEIGHTS, 0)
    for entry, count in traced.standing:
        if entry.kind in weights:
            weights[entry.kind] += count * entry.elements * entry.width
    throughout = sum(weights.values()) + trained.adapters + trained.states + gpu.workspace_bytes
    steady = traced.passes[-1]
    # with accumulation the gradients of the first pass are there while the second runs
    gradients = trained.gradients if len(traced.passes) > 1 else 0
    found = _moments(steady)
    moments = {name: throughout + gradients + most for name, (most, _) in found.items()}
    moments["optimizer step"] = throughout + trained.gradients + trained.temporaries
    if traced.evaluation is not None:
        moments["evaluation"] = throughout + max(most for most, _ in traced.evaluation.peaks().values())
    peak = max(moments, key=moments.__getitem__)
    parts = {
        "adapters": trained.adapters,
        "gradients": trained.gradients if peak == "optimizer step" else 0,
        "optimizer (GPU)": trained.states + (trained.temporaries if peak == "optimizer step" else 0),
        "optimizer (paged)": trained.paged,
    }
    if peak in found:
        parts |= _alive(steady, found[peak][1], settings)
        parts["gradients"] += gradients
    elif peak == "evaluation":
        most, when = max(traced.evaluation.peaks().values())
        parts |= _alive(traced.evaluation, when, settings)
    return Run(
        weights=weights,
        loaded=_loaded(shape, settings, gpu, weights),
        trained=trained,
        moments=moments,
        peak=peak,
        at_peak=parts,
        reserved=_reserved(traced, settings, gpu),
        ran=traced.ran,
        layers=traced.layers,
    )


def parameters_per_rank(shape: AnyShape, target_modules: str | tuple[str, ...]) -> int:
    """Trainable parameters of LoRA with rank 1.

    Raises:
        ValueError: PEFT refuses these layers.
    """
    return _parameters_per_rank(shape, target_modules)


@lru_cache(maxsize=64)
def _parameters_per_rank(shape: AnyShape, target_modules) -> int:
    settings = Settings(method="lora", rank=1, target_modules=target_modules, compute_dtype="bfloat16")
    with _reasons(shape):
        prepared = prepare(shape.config, settings, find_gpu("h200"), shape.skip)
    often = _how_often(prepared.template)
    owner = {id(module): place for place, layer in enumerate(prepared.layers) for module in layer.modules()}
    return sum(
        parameter.numel() * often.get(owner.get(id(module)), 1)
        for module in prepared.model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    )


# ---- Tracing


def _of_memory(settings: Settings) -> Settings:
    """Settings that are equal if their memory is; the optimizer has no part in the traced passes."""
    kept = {name: getattr(settings, name) for name in MEMORY_SETTINGS}
    return Settings(**kept | {"optimizer": None, "accumulation": min(settings.accumulation, 2)})


def _how_often(template: list[int]) -> dict[int, int]:
    return {place: template.count(place) for place in set(template)}


@contextmanager
def _reasons(shape: AnyShape) -> Iterator[None]:
    """An error of the libraries as one of ours, that names the model; their other messages are of a run that is not made."""
    try:
        with silenced():
            yield
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        whose = f"{shape.name or 'the model'} ({shape.model_type})"
        raise ValueError(f"{whose}: the libraries cannot make such a run: {what}") from error


@lru_cache(maxsize=256)
def _traced(shape: AnyShape, settings: Settings, capability: tuple[int, int]) -> _Traced:
    gpu = GPU("", 0, capability, 0)
    with _reasons(shape):
        prepared = prepare(shape.config, settings, gpu, shape.skip)
        standing, passes = trace_step(prepared, settings, gpu)
        evaluation = trace_evaluation(prepared, settings, gpu) if settings.eval_batch_size else None
    often = _how_often(prepared.template)
    return _Traced(
        tuple((entry, often.get(entry.layer, 1)) for entry in standing),
        tuple(whole_pass(run, prepared.template) for run in passes),
        None if evaluation is None else whole_pass(evaluation, prepared.template),
        len(prepared.layers),
        len(prepared.template),
    )


def _loaded(shape: AnyShape, settings: Settings, gpu: GPU, weights: dict[str, int]) -> int:
    if not settings.upcast_fp32:
        return sum(weights.values())
    plain = _traced(shape, replace(_of_memory(settings), upcast_fp32=False, max_length=8), gpu.compute_capability)
    return sum(entry.elements * entry.width * count for entry, count in plain.standing if entry.kind in WEIGHTS)


# ---- The moments of a step


def _moments(run: Timeline) -> dict[str, tuple[int, int]]:
    """The most within each moment of a pass, and when, under the names of `phases.MOMENTS`."""
    layers, found = run.layers, {}
    names = {0: "forward", layers + 1: "loss", layers + 2: "loss backward", 2 * layers + 3: "embeddings backward"}
    names |= {layers + 3: "last layer backward"} if layers else {}
    names |= {2 * layers + 2: "first layer backward"} if layers > 1 else {}
    for part, (most, when) in run.peaks().items():
        name = names.get(part, "forward" if part <= layers else "middle layer backward")
        if most > found.get(name, (-1, 0))[0]:
            found[name] = most, when
    order = ("forward", "loss", "loss backward", "last layer backward", "middle layer backward", "first layer backward")
    return {name: found[name] for name in (*order, "embeddings backward") if name in found}


def _alive(run: Timeline, when: int, settings: Settings) -> dict[str, int]:
    """What is alive at a moment, by part."""
    alive = run.alive_at(when)
    sizes, kinds = run.sizes[alive], run.kinds[alive]
    lasting = run.deaths[alive] == ALIVE
    born, dies = run.part_of(run.births[alive]), run.part_of(np.minimum(run.deaths[alive], ALIVE - 1))
    here = run.part_of(np.array([when]))[0]
    kept = ~lasting & (born < here) & (dies > born) & (born <= run.layers + 1)
    tile, decoded = kinds == TILE, kinds == DEQUANTISED
    kept &= ~tile & ~decoded
    at_work = ~lasting & ~kept & ~tile & ~decoded
    checkpointing = settings.gradient_checkpointing
    return {
        "gradients": int(sizes[lasting].sum()),
        "checkpointed activations" if checkpointing else "activations": int(sizes[kept].sum()),
        "recomputed layer" if checkpointing else "layer at work": int(sizes[at_work].sum()),
        "logits tile": int(sizes[tile].sum()),
        "dequantised weight": int(sizes[decoded].sum()),
    }


# ---- What torch reserves


def _reserved(traced: _Traced, settings: Settings, gpu: GPU) -> int:
    """The most that torch's allocator holds, from the order of all requests of a run: the model, two steps, an evaluation."""
    allocator = CachingAllocator()
    for entry, count in _in_order(traced):
        size = rounded(entry.elements * entry.width)
        for _ in range(count):
            allocator.allocate(size)
    for step in range(2):
        held = [_serve(allocator, run, gpu.workspace_bytes // 2 if step == 0 and not place else 0)
                for place, run in enumerate(traced.passes)]
        if step == 0:
            for size in _states(traced, settings):
                allocator.allocate(size)
        if OPTIMIZERS[settings.optimizer].temporaries:
            copies = [
                allocator.allocate(rounded(entry.elements * entry.width))
                for entry, count in traced.standing
                if entry.trained
                for _ in range(count)
            ]
            for handle in copies:
                allocator.free(handle)
        for handle in (handle for handles in held for handle in handles):
            allocator.free(handle)  # the gradients
    if traced.evaluation is not None:
        _serve(allocator, traced.evaluation, 0)
    return allocator.peak_reserved


def _in_order(traced: _Traced) -> Iterator[tuple[Standing, int]]:
    """The model first, then its adapters."""
    yield from (pair for pair in traced.standing if pair[0].kind != "adapters")
    yield from (pair for pair in traced.standing if pair[0].kind == "adapters")


def _states(traced: _Traced, settings: Settings) -> Iterator[int]:
    kind = OPTIMIZERS[settings.optimizer]
    for entry, count in traced.standing:
        if entry.trained:
            sizes, _ = state_sizes(TrainedTensor(entry.elements, 1, entry.embedding), kind, entry.width)
            for _ in range(count):
                yield from map(rounded, sizes)


def _serve(allocator: CachingAllocator, run: Timeline, workspace: int) -> list[int]:
    """Let the allocator serve a pass; returns the handles of what outlives it."""
    which, change = run.events()
    handles: dict[int, int] = {}
    allocate, free = allocator.allocate, allocator.free
    if workspace:  # of cuBLAS: for the thread of the forward pass, and for that of the backward pass
        allocate(workspace)
        allocate(workspace)
    for entry, size in zip(which.tolist(), change.tolist(), strict=True):
        if size > 0:
            handles[entry] = allocate(size)
        elif size < 0:
            free(handles.pop(entry))
    return list(handles.values())
