"""Answers to the exercises of lesson 9."""

from dataclasses import replace

import torch

from qlora_helpers.course.exercises.lesson_09 import split_step
from qlora_helpers.memory import cures, find_shape, largest_batch, predict
from qlora_helpers.settings import GPU_RUN
from tests.course.exercises.tried import Tried
from tests.course.provoke import random_llama

EIGHT, SEVEN, GIB = find_shape("meta-llama/Llama-3.1-8B"), find_shape("Qwen/Qwen2.5-7B"), 2**30
ONE = replace(GPU_RUN, adapter_dtype="bfloat16")

# ---- 9.1

RUNS = {
    "A": replace(ONE, batch_size=8),
    "B": replace(ONE, batch_size=8, gradient_checkpointing=False),
    "C": replace(ONE, max_length=512, rank=256, optimizer="adamw_torch"),
    "D": replace(ONE, batch_size=8, rank=256, optimizer="adamw_torch"),
}
DIES = {"shape": EIGHT, "runs": RUNS, "room": 11 * GIB}


def where(a, b, c, d):
    return dict(zip("ABCD", (a, b, c, d), strict=True))


# ---- 9.2


def by_bisection(shape, settings, gpu):
    """The sizes that fit come first: memory grows with the batch."""
    chats = settings.batch_size * settings.accumulation
    sizes = [size for size in range(1, chats + 1) if chats % size == 0]
    fits = lambda size: predict(shape, replace(settings, batch_size=size, accumulation=chats // size), gpu).fits  # noqa: E731
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return replace(settings, batch_size=sizes[low - 1], accumulation=chats // sizes[low - 1]) if low else None


def recursive(shape, settings, gpu, passes=1):
    chats = settings.batch_size * settings.accumulation
    if passes > chats:
        return None
    changed = replace(settings, batch_size=chats // passes, accumulation=passes)
    whole = chats % passes == 0
    return changed if whole and predict(shape, changed, gpu).fits else recursive(shape, settings, gpu, passes + 1)


def collected(shape, settings, gpu):
    chats = settings.batch_size * settings.accumulation
    tried = [replace(settings, batch_size=n, accumulation=chats // n) for n in range(1, chats + 1) if chats % n == 0]
    return max((t for t in tried if predict(shape, t, gpu).fits), key=lambda t: t.batch_size, default=None)


def never_larger(shape, settings, gpu):
    for batch in range(settings.batch_size, 0, -1):
        if settings.batch_size % batch == 0:
            passes = settings.accumulation * settings.batch_size // batch
            changed = replace(settings, batch_size=batch, accumulation=passes)
            if predict(shape, changed, gpu).fits:
                return changed
    return None


def forgets_accumulation(shape, settings, gpu):
    for batch in range(settings.batch_size, 0, -1):
        if predict(shape, replace(settings, batch_size=batch), gpu).fits:
            return replace(settings, batch_size=batch)
    return None


def uneven(shape, settings, gpu):
    chats = settings.batch_size * settings.accumulation
    for batch in range(chats, 0, -1):
        changed = replace(settings, batch_size=batch, accumulation=-(-chats // batch))
        if predict(shape, changed, gpu).fits:
            return changed
    return None


def one_at_a_time(shape, settings, gpu):
    chats = settings.batch_size * settings.accumulation
    changed = replace(settings, batch_size=1, accumulation=chats)
    return changed if predict(shape, changed, gpu).fits else None


def cheapest_cure(shape, settings, gpu):
    found = cures(shape, settings, gpu)
    return found[0].settings if found else settings


def at_any_price(shape, settings, gpu):
    return split_step(shape, settings, gpu) or replace(settings, batch_size=1)


def the_size_alone(shape, settings, gpu):
    return largest_batch(shape, settings, gpu)


# ---- 9.3

torch.manual_seed(0)
MODEL = random_llama()
BATCHES = [torch.randint(1216, (2, length)) for length in (9, 12, 10, 11)]
GROWS = {"model": MODEL, "batches": BATCHES}


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def without_gradients(model, batches):
    with torch.no_grad():
        return sum(loss_of(model, ids) for ids in batches) / len(batches)


@torch.inference_mode()
def as_inference(model, batches):
    return torch.stack([loss_of(model, ids) for ids in batches]).mean()


def its_number(model, batches):
    total = 0.0
    for ids in batches:
        total += loss_of(model, ids).item()
    return total / len(batches)


def detached(model, batches):
    losses = [loss_of(model, ids).detach() for ids in batches]
    return float(sum(losses) / len(losses))


def as_numpy(model, batches):
    import numpy

    return numpy.mean([float(loss_of(model, ids)) for ids in batches])


def as_it_was(model, batches):
    total = 0
    for ids in batches:
        total = total + loss_of(model, ids)
    return total / len(batches)


def number_at_the_end(model, batches):
    return torch.stack([loss_of(model, ids) for ids in batches]).mean().item()


def in_evaluation_mode(model, batches):
    model.eval()
    return as_it_was(model, batches)


def emptied(model, batches):
    import gc

    total = 0
    for ids in batches:
        total = total + loss_of(model, ids)
        gc.collect()
    return total / len(batches)


def the_first_alone(model, batches):
    return loss_of(model, batches[0]).item()


def a_sum(model, batches):
    return its_number(model, batches) * len(batches)


# ---- 9.4

RUN = replace(
    GPU_RUN, compute_dtype="float16", batch_size=8, rank=64, optimizer="adamw_torch", upcast_fp32=True,
    gradient_checkpointing=False,
)  # fmt: skip
FITS = {"shape": SEVEN, "run": RUN, "gpu": "t4"}
SLIM = replace(RUN, upcast_fp32=False, gradient_checkpointing=True)

RIGHT = {
    "places": [
        Tried(where("backward", "forward", "optimizer step", "forward"), **DIES),
        Tried(where("Backward", "FORWARD", "optimizer-step", "loss"), **DIES),
        Tried(where("backward pass", "forward pass", "step", "forward pass"), **DIES),
        Tried(where("backward", "loss", "optimizer", "loss"), **DIES),
        Tried(where(" backward ", "forward", "Optimizer Step", "Forward"), **DIES),
    ],
    "in_parts": [Tried(split_step), Tried(by_bisection), Tried(recursive), Tried(collected), Tried(lambda *a: split_step(*a))],
    "evaluation": [Tried(f, **GROWS) for f in (without_gradients, as_inference, its_number, detached, as_numpy)],
    "fitted": [
        Tried(replace(SLIM, batch_size=4, accumulation=2), **FITS),
        Tried(replace(SLIM, batch_size=2, accumulation=4), **FITS),
        Tried(replace(SLIM, batch_size=1, accumulation=8, optimizer="paged_adamw_8bit"), **FITS),
        Tried(replace(SLIM, batch_size=4, accumulation=2, optimizer="adamw_torch_fused"), **FITS),
        Tried(replace(RUN, gradient_checkpointing=True, batch_size=1, accumulation=8), **FITS),
    ],
}  # fmt: skip

WRONG = {
    "places": [
        Tried(where("forward", "forward", "optimizer step", "forward"), says="run A", **DIES),
        Tried(where("backward", "backward", "optimizer step", "forward"), says="run B", **DIES),
        Tried(where("backward", "forward", "backward", "forward"), says="run C", **DIES),
        Tried(where("backward", "forward", "optimizer step", "optimizer step"), says="run D", **DIES),
        Tried(where("backward", "forward", "optimizer step", "backward"), says="run D", **DIES),
        Tried("backward", says="dictionary", **DIES),
        Tried({"A": "backward"}, says="no place for B, C, D", **DIES),
        Tried(where("somewhere", "forward", "optimizer step", "forward"), says="run A", **DIES),
    ],
    "in_parts": [
        Tried(never_larger, says="smaller than it need be"),
        Tried(forgets_accumulation, says="another number of chats"),
        Tried(uneven, says="another number of chats"),
        Tried(one_at_a_time, says="a larger batch fits, too"),
        Tried(cheapest_cure, says="in the case"),
        Tried(at_any_price, says="a model that is too large"),
        Tried(the_size_alone, says="your function gave"),
        Tried(4, says="a function is needed"),
    ],
    "evaluation": [
        Tried(as_it_was, says="memory still grows", **GROWS),
        Tried(number_at_the_end, says="memory still grows", **GROWS),
        Tried(in_evaluation_mode, says="memory still grows", **GROWS),
        Tried(emptied, says="memory still grows", **GROWS),
        Tried(the_first_alone, says="mean loss", **GROWS),
        Tried(a_sum, says="mean loss", **GROWS),
        Tried(7.0, says="a function is needed", **GROWS),
    ],
    "fitted": [
        Tried(replace(SLIM, batch_size=8), says="too much", **FITS),
        Tried(replace(SLIM, batch_size=4), says="chats now", **FITS),
        Tried(replace(SLIM, batch_size=4, accumulation=2, rank=8), says="rank is 8", **FITS),
        Tried(replace(SLIM, batch_size=8, max_length=512), says="max_length", **FITS),
        Tried(replace(RUN, memory_budget="auto"), says="too much", **FITS),
        Tried(replace(RUN, batch_size=1, accumulation=8), says="too much", **FITS),
        Tried("checkpointing", says="Settings are needed", **FITS),
    ],
}  # fmt: skip
