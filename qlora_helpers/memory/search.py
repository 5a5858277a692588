"""From "does it fit?" to "what fits?": the largest batch, the longest sequence, and a table of models and GPUs.

Memory grows with the batch size, and with the sequence length on either side of a model's attention window; where the
window begins it can fall, because the mask for it needs another kernel. So each limit is enclosed from both sides, on each
side of the window for itself. A search calls `predict` five to twenty times, whatever the numbers are.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.catalogue import find_shape
from qlora_helpers.memory.gpus import GPU, find_gpu
from qlora_helpers.memory.prediction import Prediction, predict
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.units import GIB

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "LONGEST",
    "MOST_DIVISORS",
    "STEP",
    "Suggestion",
    "divisors",
    "largest_batch",
    "largest_that_fits",
    "longest_sequence",
    "suggest",
    "what_fits",
]

STEP = 128  # tokens: sequence lengths are tried in multiples of it
LONGEST = 131_072  # tokens: where the search ends for a model whose config states no limit
FASTEST = 64  # no batch that is tried is so many times the one before: what was seen says little about it
MOST_DIVISORS = 2**20  # of a number are looked for: without a bound a large prime would take for ever


def largest_that_fits(spare: Callable[[int], int], above: int, up_to: int, known: int | None = None) -> int:
    """The largest number above `above`, and up to `up_to`, that fits; `above` if none does. All below it must fit, too.

    Args:
        spare: bytes that a number leaves over; negative if it does not fit.
        known: a number between the two to begin with.

    Each guess is where the straight line through the last two numbers leaves nothing over, since memory grows nearly so. If
    three guesses do not halve what is left, the next one does.
    """
    if above >= up_to:
        return above
    if (left := spare(up_to)) >= 0:
        return up_to
    low, high = above, up_to
    tried, marks = [(up_to, left)], [high - low]
    guess = known if known is not None and low < known < high else (low + high) // 2
    while high - low > 1:
        left = spare(guess)
        low, high = (guess, high) if left >= 0 else (low, guess)
        tried.append((guess, left))
        marks.append(high - low)
        (x, y), (z, w) = tried[-2:]
        slow = len(marks) > 3 and 2 * marks[-1] > marks[-4]
        guess = (low + high) // 2 if slow or y == w else z - w * (z - x) // (w - y)
        guess = min(max(guess, low + 1), high - 1)
    return low


@lru_cache(maxsize=64)
def divisors(number: int) -> tuple[int, ...]:
    """The divisors of a number, the largest first: those up to 2**20, and what each of them leaves."""
    small = [size for size in range(1, min(math.isqrt(number), MOST_DIVISORS) + 1) if number % size == 0]
    return tuple(sorted({*small, *(number // size for size in small)}, reverse=True))


def largest_batch(shape: ModelShape | AnyShape, settings: Settings, gpu: str | GPU) -> int:
    """The largest `batch_size` with which the run fits, in sequences; 0 if not even one on each GPU does.

    Raises:
        ValueError: as `predict` does.
    """
    gpus = settings.num_gpus
    most = validation.LARGEST // gpus

    def spare(batch: int) -> int:
        """With so many sequences on each GPU."""
        return predict(shape, replace(settings, batch_size=batch * gpus), gpu).spare_bytes

    low, left, high = 1, spare(1), 2
    if left < 0:
        return 0
    while (more := spare(high)) >= 0:
        if high == most:
            return high * gpus
        # where the straight line through the last two leaves nothing over; a small model's first batches can cost nothing
        each = (left - more) / (high - low)
        limit = high + int(more / each) + 1 if each > 0 else FASTEST * high
        low, left = high, more
        high = min(max(limit, high + high // 8 + 1), FASTEST * high, most)
    return gpus * largest_that_fits(spare, low, high, known=low + (high - low) * left // (left - more))


def longest_sequence(
    shape: ModelShape | AnyShape, settings: Settings, gpu: str | GPU, at_most: int | None = None
) -> int:
    """The longest `max_length` with which the run fits at its batch size, in tokens: a multiple of 128; 0 if none fits.

    The search ends at the model's `max_position_embeddings`, or at 131,072 if the config does not state it. With a model
    that has an attention window, some shorter sequences may need more memory and not fit.

    Args:
        at_most: look for no longer one than this, in tokens.

    Raises:
        ValueError: as `predict` does, or `at_most` is not a positive whole number.
    """

    def spare(steps: int) -> int:
        return predict(shape, replace(settings, max_length=steps * STEP), gpu).spare_bytes

    most = shape.max_position_embeddings or LONGEST
    if at_most is not None:
        most = min(most, validation.whole("at_most", at_most))
    unmasked = min((getattr(shape, "sliding_window", None) or most + 1) - 1, most)
    # a sequence that fills the window has a mask, and may run in a kernel that takes less memory
    for above, up_to in ((unmasked // STEP, most // STEP), (0, unmasked // STEP)):
        if (found := largest_that_fits(spare, above, up_to, settings.max_length // STEP)) > above:
            return found * STEP
    return 0


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


def suggest(
    shape: ModelShape | AnyShape, gpu: str | GPU, settings: Settings = GPU_RUN, effective_batch: int = 16
) -> Suggestion:
    """The largest batch that fits and divides the effective batch, and the accumulation that makes up for the rest.

    Args:
        shape: of the model.
        gpu: to run on.
        settings: all but `batch_size` and `accumulation`.
        effective_batch: sequences per optimizer step.

    Raises:
        ValueError: not even a batch of 1 on each GPU fits, or `effective_batch` is not a positive whole number, or the GPUs of
            the settings cannot share it evenly.
    """
    wanted, gpus = validation.whole("effective_batch", effective_batch), settings.num_gpus
    gpu = find_gpu(gpu)
    if wanted % gpus:
        raise validation.refuse("effective_batch", wanted, f"must be a multiple of num_gpus={gpus}")

    def predicted(batch: int) -> Prediction:
        return predict(shape, replace(settings, batch_size=batch, accumulation=wanted // batch), gpu)

    # the whole batch for itself: without accumulation it keeps no gradients, and may fit where a smaller one does not
    batch, *smaller = (size * gpus for size in divisors(wanted // gpus))
    prediction = predicted(batch)
    if smaller and not prediction.fits:
        place = bisect_left(smaller, True, key=lambda size: predicted(size).fits)
        batch = smaller[min(place, len(smaller) - 1)]
        prediction = predicted(batch)
    if prediction.fits:
        return Suggestion(batch, wanted // batch, prediction)
    missing = -prediction.spare_bytes / GIB
    raise ValueError(
        f"gpu is {gpu.name}: not even a batch of {gpus} fits; {missing:.2f} GiB more would be needed. "
        "cures(shape, settings, gpu) says what would help"
    )


def what_fits(
    models: Iterable[ModelShape | AnyShape | PretrainedConfig | dict | str | Path],
    gpus: Iterable[str | GPU],
    settings: Settings = GPU_RUN,
) -> list[tuple[ModelShape | AnyShape, tuple[Prediction | None, ...]]]:
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
