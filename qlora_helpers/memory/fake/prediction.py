"""What a run of any model takes: a step of the libraries' own code, and torch's allocator with all that the step asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qlora_helpers import validation
from qlora_helpers.library_messages import silenced
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.fake.ledger import ALIVE
from qlora_helpers.memory.fake.model import Prepared, prepare
from qlora_helpers.memory.fake.offload import offloaded
from qlora_helpers.memory.fake.served import Traced, moments_of, serve
from qlora_helpers.memory.fake.trace import trace_evaluation, trace_step
from qlora_helpers.memory.fake.whole import Timeline, whole_pass
from qlora_helpers.memory.gpus import GPU, find_gpu
from qlora_helpers.memory.layers import DEQUANTISED, TILE
from qlora_helpers.memory.trained import Trained, TrainedTensor, trained_of
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
        ran, layers: how many decoder layers were run, and how many there are; 0 if they could not be told from the rest of
            the model, which then ran as one.
        why_all: why all layers were run, in the libraries' words, if the model cannot do with few of them; "" otherwise.
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
    why_all: str = ""


@lru_cache(maxsize=256)
def run_on_fake_tensors(shape: AnyShape, settings: Settings, gpu: GPU, whole: bool = False) -> Run:
    """What a run takes.

    Args:
        settings: with a `compute_dtype` and an `optimizer`.
        whole: run all decoder layers, rather than some of each kind.

    Raises:
        ValueError: the libraries refuse such a run, or their code cannot run without values; the message has their reason.
    """
    traced = _traced(shape, _of_memory(settings), gpu.compute_capability, whole)
    standing = Counter(entry for _, entry in traced.in_order())
    tensors = [
        TrainedTensor(entry.elements, count, entry.embedding) for entry, count in standing.items() if entry.trained
    ]
    if not tensors:
        raise validation.refuse("target_modules", settings.target_modules, "no layer of this model has such a name")
    trained = trained_of(tensors, settings)
    weights = dict.fromkeys(WEIGHTS, 0)
    for entry, count in standing.items():
        if entry.kind in weights:
            weights[entry.kind] += count * entry.elements * entry.width
    served = serve(traced, settings, gpu.workspace_bytes)
    steady, moments = traced.passes[-1], served.moments
    # with accumulation the gradients of the first pass are there while the second runs
    gradients = trained.gradients if len(traced.passes) > 1 else 0
    found = {name: when for name, (_, when) in moments_of(steady).items()}
    peak = max(moments, key=moments.__getitem__)
    parts = {
        "adapters": trained.adapters,
        "gradients": trained.gradients if peak == "optimizer step" else 0,
        "optimizer (GPU)": trained.states + (trained.temporaries if peak == "optimizer step" else 0),
        "optimizer (paged)": trained.paged,
    }
    if peak in found:
        parts |= _alive(steady, found[peak], settings)
        parts["gradients"] += gradients
    elif peak == "evaluation":
        _, when = max(traced.evaluation.peaks().values())
        parts |= _alive(traced.evaluation, when, settings)
    in_tensors = sum(weights.values()) + sum(parts.values()) - trained.paged + gpu.workspace_bytes
    parts["ends of blocks"] = moments[peak] - in_tensors
    return Run(
        weights=weights,
        loaded=served.loaded,
        trained=trained,
        moments=moments,
        peak=peak,
        at_peak=parts,
        reserved=served.reserved,
        ran=traced.ran,
        layers=len(traced.template),
        why_all=traced.why_all,
    )


@lru_cache(maxsize=64)
def parameters_per_rank(shape: AnyShape, target_modules: str | tuple[str, ...]) -> int:
    """Trainable parameters of LoRA with rank 1.

    Raises:
        ValueError: PEFT refuses these layers.
    """
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
    """Settings that are equal if the memory of the traced passes is."""
    kept = {name: getattr(settings, name) for name in MEMORY_SETTINGS}
    no_part = dict.fromkeys(("packing", "compile_layers", "liger_layers", "expandable_segments"), False)
    return Settings(**kept | no_part | {"optimizer": None, "accumulation": min(settings.accumulation, 2)})


def _how_often(template: list[int]) -> dict[int, int]:
    return {place: template.count(place) for place in set(template)}


@contextmanager
def _reasons(shape: AnyShape) -> Iterator[None]:
    """An error of the libraries as one of ours, that names the model; their other messages are of a run that is not made."""
    try:
        with silenced():
            yield
    except Exception as error:
        whose = f"{shape.name or 'the model'} ({shape.model_type})"
        raise ValueError(f"{whose}: the libraries cannot make such a run: {_what(error)}") from error


def _what(error: Exception) -> str:
    """An error's message in one line; one that is no sentence, such as a lone key, has its kind before it."""
    text = " ".join(str(error).split())
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


# A model that has something for each layer outside of them, or hands what one computes to a later one, needs more than few.
_WAYS = ({}, {"long_config": True}, {"whole": True}, {"as_one": True})


@lru_cache(maxsize=256)
def _traced(shape: AnyShape, settings: Settings, capability: tuple[int, int], whole: bool) -> Traced:
    """A run's requests, from as few layers as the model can run with."""
    refused = ""
    for ways in _WAYS[2:] if whole else _WAYS:
        with _reasons(shape):
            try:
                prepared = prepare(shape.config, settings, GPU("", 0, capability, 0), shape.skip, **ways)
                return _trace(prepared, settings, capability, refused)
            except Exception as error:
                if ways is _WAYS[-1]:
                    raise
                refused = refused or _what(error)
    raise AssertionError("the last way either answers or raises")


def _trace(prepared: Prepared, settings: Settings, capability: tuple[int, int], refused: str) -> Traced:
    gpu = GPU("", 0, capability, 0)
    standing, passes = trace_step(prepared, settings, gpu)
    evaluation = trace_evaluation(prepared, settings, gpu) if settings.eval_batch_size else None
    ran = len(prepared.layers)
    whole = [whole_pass(run, prepared.template) for run in passes]
    return Traced(
        tuple(standing),
        tuple(prepared.template),
        tuple(map(offloaded, whole) if settings.activation_offloading else whole),
        None if evaluation is None else whole_pass(evaluation, prepared.template),
        ran,
        refused if ran == len(prepared.template) else "",
    )


# ---- What is alive at a moment


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
