"""From "does it fit?" to "what fits?": the largest batch, the longest sequence, and a table of models and GPUs.

Memory only grows with batch size and sequence length, so bisection finds the limit. Each search calls `predict` tens of
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.memory.catalogue import find_shape
from qlora_helpers.memory.gpus import GPU, find_gpu
from qlora_helpers.memory.prediction import Prediction, predict
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.units import GIB

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["LONGEST", "STEP", "Suggestion", "largest_batch", "longest_sequence", "suggest", "what_fits"]

STEP = 128  # tokens: sequence lengths are tried in multiples of it
LONGEST = 131_072  # tokens: where the search ends for a model whose config states no limit


def _bisect(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number that fits, where `low` does (or is 0) and `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(shape: ModelShape, settings: Settings, gpu: str | GPU) -> int:
    """The largest `batch_size` with which the run fits, in sequences; 0 if not even 1 does.

    Raises:
        ValueError: as `predict` does.
    """

    def fits(batch: int) -> bool:
        return predict(shape, replace(settings, batch_size=batch), gpu).fits

    high = 1
    while fits(high):
        high *= 2
    return _bisect(fits, high // 2, high)


def longest_sequence(shape: ModelShape, settings: Settings, gpu: str | GPU) -> int:
    """The longest `max_length` with which the run fits at its batch size, in tokens: a multiple of 128; 0 if none fits.

    The search ends at the model's `max_position_embeddings`, or at 131,072 if the config does not state it.

    Raises:
        ValueError: as `predict` does.
    """

    def fits(steps: int) -> bool:
        return predict(shape, replace(settings, max_length=steps * STEP), gpu).fits

    most = (shape.max_position_embeddings or LONGEST) // STEP
    if most and fits(most):
        return most * STEP
    return _bisect(fits, 0, most) * STEP


@dataclass(frozen=True)
class Suggestion:
    """How to reach an effective batch.

    Args:
        batch_size: sequences per forward pass.
        accumulation: forward passes per optimizer step.
        prediction: for this batch size.
    """

    batch_size: int
    accumulation: int
    prediction: Prediction


def suggest(shape: ModelShape, gpu: str | GPU, settings: Settings = GPU_RUN, effective_batch: int = 16) -> Suggestion:
    """The largest batch that fits and divides the effective batch, and the accumulation that makes up for the rest.

    Args:
        shape: of the model.
        gpu: to run on.
        settings: all but `batch_size` and `accumulation`.
        effective_batch: sequences per optimizer step.

    Raises:
        ValueError: not even a batch of 1 fits, or `effective_batch` is not a positive whole number.
    """
    wanted = validation.whole("effective_batch", effective_batch)
    gpu = find_gpu(gpu)
    for batch in (size for size in range(wanted, 0, -1) if wanted % size == 0):
        prediction = predict(shape, replace(settings, batch_size=batch, accumulation=wanted // batch), gpu)
        if prediction.fits:
            return Suggestion(batch, wanted // batch, prediction)
    missing = -prediction.spare_bytes / GIB
    raise ValueError(
        f"gpu is {gpu.name}: not even a batch of 1 fits; {missing:.2f} GiB more would be needed. "
        "cures(shape, settings, gpu) says what would help"
    )


def what_fits(
    models: Iterable[ModelShape | PretrainedConfig | dict | str | Path],
    gpus: Iterable[str | GPU],
    settings: Settings = GPU_RUN,
) -> list[tuple[ModelShape, tuple[Prediction | None, ...]]]:
    """A table of models and GPUs: one row per model, with one prediction per GPU.

    Args:
        models: what `find_shape` takes.
        gpus: names or GPUs, in the order of the columns.
        settings: the same for all.

    Returns:
        Rows of a shape and its predictions, with None if the run's sequences are too long for the model.

    Raises:
        ValueError: as `find_shape`, `find_gpu` and `predict` do.
    """
    gpus = [find_gpu(gpu) for gpu in gpus]
    rows = []
    for shape in map(find_shape, models):
        too_long = settings.max_length > (shape.max_position_embeddings or settings.max_length)
        rows.append((shape, tuple(None if too_long else predict(shape, settings, gpu) for gpu in gpus)))
    return rows
