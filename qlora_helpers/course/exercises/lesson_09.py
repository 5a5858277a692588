"""The exercises of lesson 9: where runs die, a step in parts, an evaluation that grows, a run that has to fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_helpers.course.exercises.asking import Exercise, choice
from qlora_helpers.memory import find_gpu, find_shape, predict
from qlora_helpers.memory.gpus import GPU
from qlora_helpers.memory.phases import BACKWARD, FORWARD, LOSS, MOMENTS, STEP
from qlora_helpers.memory.saved_for_backward import most_saved
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.units import GIB

__all__ = ["evaluation", "fitted", "in_parts", "places"]

_DIED = {FORWARD: [LOSS, "forward pass"], BACKWARD: ["backward pass"], STEP: ["step", "optimizer"]}


def place_under(shape: ModelShape, settings: Settings, room: int) -> str:
    """Where a run first needs more than `room` bytes for its tensors: "forward", "backward" or "optimizer step".

    Raises:
        ValueError: it needs no more.
    """
    for moment, size in predict(shape, settings).phases.items():
        if size > room:
            return FORWARD if MOMENTS[moment] in (FORWARD, LOSS) else MOMENTS[moment]
    raise ValueError(f"room={room}: these settings stay within it")


def _places(answer: Any, *, shape: ModelShape, runs: Mapping[str, Settings], room: int) -> str:
    if not isinstance(answer, Mapping):
        return f"a dictionary is needed, with a place for each of {', '.join(runs)}."
    if missing := [name for name in runs if name not in answer]:
        return f"there is no place for {', '.join(missing)}."
    for name, settings in runs.items():
        if fault := choice(place_under(shape, settings, room), _DIED)(answer[name]):
            return f"run {name}: {fault}"
    return ""


places = Exercise(
    number="9.1",
    title="where will it die?",
    kind="predict",
    difficulty="medium",
    minutes=8,
    hints=(
        "what does each run keep until its loss, and what is it doing when it needs the most? A run dies at the first moment "
        "that is too large.",
        "predict(shape, settings).phases has the bytes of each moment, in order. Find the first that is above the room.",
    ),
    fault=_places,
)


# ---- A step in parts


def split_step(shape: ModelShape, settings: Settings, gpu: str | GPU) -> Settings | None:
    """The settings with the largest batch that fits, and as many chats in a step as before; None if none fits."""
    chats = settings.batch_size * settings.accumulation
    for passes in range(1, chats + 1):
        if chats % passes == 0:
            changed = replace(settings, batch_size=chats // passes, accumulation=passes)
            if predict(shape, changed, gpu).fits:
                return changed
    return None


_CASES = {
    "a step that fits as it is": ("meta-llama/Llama-3.2-1B", "t4", {"batch_size": 4}),
    "a batch that is too large": ("Qwen/Qwen2.5-7B", "t4", {"batch_size": 16}),
    "a step that is already in parts": ("meta-llama/Llama-3.1-8B", "rtx 4090", {"batch_size": 12, "accumulation": 3}),
    "a batch that is smaller than it need be": ("Qwen/Qwen2.5-7B", "rtx 4090", {"batch_size": 1, "accumulation": 8}),
    "an odd number of chats": ("meta-llama/Llama-3.1-8B", "t4", {"batch_size": 15}),
    "a model that is too large": ("meta-llama/Llama-3.1-70B", "t4", {"batch_size": 4}),
}


def _in_parts(answer: Any) -> str:
    if not callable(answer):
        return "a function is needed, of a shape, settings and a GPU's name."
    for name, (model, gpu, changed) in _CASES.items():
        shape, settings = find_shape(model), replace(GPU_RUN, adapter_dtype="bfloat16", **changed)
        got, want = answer(shape, settings, gpu), split_step(shape, settings, gpu)
        if got == want:
            continue
        case = f"in the case “{name}” ({model} on a {find_gpu(gpu).name}, {settings.batch_size} x {settings.accumulation} chats)"
        if not isinstance(got, Settings):
            return f"{case} your function gave {got!r}."
        made = f"{got.batch_size} x {got.accumulation} chats"
        chats = settings.batch_size * settings.accumulation
        if got.batch_size * got.accumulation != chats:
            return f"{case} your function gave {made}: that is another number of chats in a step."
        if replace(got, batch_size=1, accumulation=1) != replace(settings, batch_size=1, accumulation=1):
            return f"{case} your function changed other settings, too."
        fits = predict(shape, got, gpu).fits
        return f"{case} your function gave {made}: " + ("a larger batch fits, too." if fits else "that does not fit.")
    return ""


in_parts = Exercise(
    number="9.2",
    title="a step in parts",
    kind="build",
    difficulty="medium",
    minutes=15,
    hints=(
        "a step has batch_size x accumulation chats, and that product must stay. Which batch sizes divide it?",
        "try them from the largest down, with replace(settings, batch_size=…, accumulation=…), and give back the first "
        "for which predict(shape, changed, gpu).fits is true.",
    ),
    fault=_in_parts,
)


# ---- An evaluation that grows


def _evaluation(answer: Any, *, model: Any, batches: Sequence[Any]) -> str:
    if not callable(answer):
        return "a function is needed, of a model and batches."
    want = _losses(model, batches)
    few, many = most_saved(answer, model, batches[:1]), most_saved(answer, model, batches)
    for count, run in ((1, few), (len(batches), many)):
        try:
            got = float(run.result)
        except (TypeError, ValueError):
            return f"a number is needed, and your function gave {type(run.result).__name__}."
        mean = sum(want[:count]) / count
        if not math.isclose(got, mean, rel_tol=1e-3):
            return f"the mean loss of {count} {'batch' if count == 1 else 'batches'} is not {got:.4g}."
    if many.most_bytes > 1.5 * few.most_bytes:
        return (
            f"the losses are right, but memory still grows: the graph holds {few.most_bytes / 2**20:.0f} MiB after 1 batch "
            f"and {many.most_bytes / 2**20:.0f} MiB after {len(batches)}."
        )
    return ""


def _losses(model: Any, batches: Sequence[Any]) -> list[float]:
    import torch

    with torch.no_grad():
        return [model(input_ids=ids, labels=ids).loss.item() for ids in batches]


evaluation = Exercise(
    number="9.3",
    title="an evaluation that grows",
    kind="run",
    difficulty="medium",
    minutes=10,
    hints=(
        "no tensor in this function is large. What does each loss still hold on to, as long as the sum holds the loss?",
        "an evaluation needs no gradients. Either keep torch from recording them, or take from each loss only its number.",
    ),
    fault=_evaluation,
)


# ---- A run that has to fit

SPARE = 0.5 * GIB


def _fitted(answer: Any, *, shape: ModelShape, run: Settings, gpu: str) -> str:
    if not isinstance(answer, Settings):
        return f"Settings are needed, and this is {type(answer).__name__}: replace(run, …) makes them."
    if answer.batch_size * answer.accumulation != run.batch_size * run.accumulation:
        return f"a step has {answer.batch_size * answer.accumulation} chats now, so it learns something else."
    for name, what in (
        ("max_length", "longer chats would be cut off"),
        ("rank", "the adapters are smaller or larger"),
        ("target_modules", "other layers are adapted"),
        ("method", "it is no longer the same method"),
        ("learning_rate", "memory does not depend on it"),
    ):
        if getattr(answer, name) != getattr(run, name):
            return f"{name} is {getattr(answer, name)!r} now: {what}."
    found = predict(shape, answer, gpu)
    if found.spare_bytes < SPARE:
        left = found.spare_bytes / GIB
        over = f"{-left:.1f} GiB too much" if left < 0 else f"only {left:.2f} GiB are left free"
        return f"it takes {found.device_bytes / GIB:.1f} GiB: {over}. {_largest(found.parts)}"
    return ""


def _largest(parts: Mapping[str, int]) -> str:
    name, size = max(parts.items(), key=lambda part: part[1])
    return f"The largest part is {name!r}, with {size / GIB:.1f} GiB."


fitted = Exercise(
    number="9.4",
    title="make it fit",
    kind="run",
    difficulty="hard",
    minutes=15,
    hints=(
        "predict(shape, run, gpu).parts says which part is the largest. Make that one smaller, and look again.",
        "three changes are enough, and none of them changes what is learnt: one concerns float32 copies, one what the layers "
        "keep, and one how many chats go through the model at once.",
    ),
    fault=_fitted,
)
