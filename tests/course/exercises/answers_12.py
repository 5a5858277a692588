"""Answers to the exercises of lesson 12."""

from fractions import Fraction

import numpy
import torch

from qlora_helpers.course.exercises import lesson_12
from tests.course.exercises.tried import Tried

# ---- 12.1


def by_tokens(gradients, tokens):
    return sum(gradient * count for gradient, count in zip(gradients, tokens, strict=True)) / sum(tokens)


def stacked(gradients, tokens):
    weights = torch.tensor(tokens, dtype=torch.float32)
    return (torch.stack(gradients) * weights[:, None]).sum(0) / weights.sum()


def as_shares(gradients, tokens):
    total = torch.zeros_like(gradients[0])
    for gradient, count in zip(gradients, tokens, strict=True):
        total += gradient * (count / sum(tokens))
    return total


def by_einsum(gradients, tokens):
    return torch.einsum("ri,r->i", torch.stack(gradients), torch.tensor(tokens) / sum(tokens))


def plain_mean(gradients, tokens):
    return sum(gradients) / len(gradients)


def summed(gradients, tokens):
    return sum(gradients)


def not_divided(gradients, tokens):
    return sum(gradient * count for gradient, count in zip(gradients, tokens, strict=True))


def divided_by_ranks(gradients, tokens):
    return not_divided(gradients, tokens) / len(tokens)


def the_other_way(gradients, tokens):
    return sum(gradient / max(count, 1) for gradient, count in zip(gradients, tokens, strict=True)) * sum(tokens)


def in_place(gradients, tokens):
    for gradient, count in zip(gradients, tokens, strict=True):
        gradient.mul_(count / sum(tokens))
    return sum(gradients)


# ---- 12.2


def in_one_formula(adapters, packed, ranks, passes, sharded):
    share = (ranks - 1) / ranks
    return share * (2 * passes * (packed + adapters) + adapters) if sharded else 2 * share * adapters


def step_by_step(adapters, packed, ranks, passes, sharded):
    def received(size):
        return size - size / ranks

    if not sharded:
        return received(adapters) + received(adapters)
    total = 0
    for _ in range(passes):
        for _way in ("forward", "backward"):
            total += received(packed) + received(adapters)
    return total + received(adapters)


def in_fractions(adapters, packed, ranks, passes, sharded):
    return float(Fraction(ranks - 1, ranks) * int(in_units(adapters, packed, passes, sharded)))


def in_units(adapters, packed, passes, sharded):
    return 2 * passes * (packed + adapters) + adapters if sharded else 2 * adapters


def gathered_once(adapters, packed, ranks, passes, sharded):
    share = (ranks - 1) / ranks
    return share * (passes * (packed + adapters) + adapters) if sharded else 2 * share * adapters


def all_reduce_once(adapters, packed, ranks, passes, sharded):
    share = (ranks - 1) / ranks
    return share * (2 * passes * (packed + adapters) + adapters) if sharded else share * adapters


def every_pass(adapters, packed, ranks, passes, sharded):
    return in_one_formula(adapters, packed, ranks, passes, sharded) * (1 if sharded else passes)


def its_own_share_too(adapters, packed, ranks, passes, sharded):
    return in_units(adapters, packed, passes, sharded)


def weights_alone(adapters, packed, ranks, passes, sharded):
    share = (ranks - 1) / ranks
    return share * (2 * passes * packed + adapters) if sharded else 2 * share * adapters


def weights_for_copies_too(adapters, packed, ranks, passes, sharded):
    return 2 * (ranks - 1) / ranks * (adapters + packed)


# ---- 12.3


def of(a, b, c, d):
    return dict(zip("ABCD", (a, b, c, d), strict=True))


# ---- 12.4

COUNTS = [float(lesson_12._sampled().count(place)) for place in range(7)]


def other(place):
    """The counts, as if another chat counted twice."""
    moved = COUNTS.index(2.0)
    found = [1.0] * 7
    found[(moved + place) % 7] = 2.0
    return found


RIGHT = {
    "averaged": [Tried(function) for function in (by_tokens, stacked, as_shares, by_einsum)],
    "received_in_a_step": [Tried(function) for function in (in_one_formula, step_by_step, in_fractions)],
    "way": [
        Tried(of("copies", "offloaded", "shards", "copies")),
        Tried(of("Copies", "offload", "FSDP", "data parallel")),
        Tried(of("copy", "offloaded shards", "sharding", "a copy on each")),
    ],
    "counts": [
        Tried(COUNTS),
        Tried([int(count) for count in COUNTS]),
        Tried(torch.tensor(COUNTS) * 1.001),
        Tried(numpy.array(COUNTS)),
        Tried(tuple(COUNTS)),
    ],
}

WRONG = {
    "averaged": [
        Tried(plain_mean, says="one with three times the tokens"),
        Tried(summed, says="in the case"),
        Tried(not_divided, says="in the case"),
        Tried(divided_by_ranks, says="in the case"),
        Tried(the_other_way, says="in the case"),
        Tried(in_place, says="changes"),
        Tried(3.0, says="function"),
    ],
    "received_in_a_step": [
        Tried(gathered_once, says="two ranks with shards"),
        Tried(all_reduce_once, says="two ranks with copies"),
        Tried(every_pass, says="two ranks with copies, four passes"),
        Tried(its_own_share_too, says="in the case"),
        Tried(weights_alone, says="two ranks with shards"),
        Tried(weights_for_copies_too, says="two ranks with copies"),
        Tried(1e9, says="function"),
    ],
    "way": [
        Tried(of("shards", "offloaded", "shards", "copies"), says="run A"),
        Tried(of("copies", "shards", "shards", "copies"), says="run B"),
        Tried(of("copies", "none", "shards", "copies"), says="run B"),
        Tried(of("copies", "offloaded", "copies", "copies"), says="run C"),
        Tried(of("copies", "offloaded", "offloaded", "copies"), says="run C"),
        Tried(of("copies", "offloaded", "shards", "shards"), says="run D"),
        Tried("copies", says="a dictionary is needed"),
        Tried({"A": "copies"}, says="no way for B, C, D"),
    ],
    "counts": [
        Tried([1] * 7, says="wrong value"),
        Tried(other(1), says="wrong value"),
        Tried(other(3), says="wrong value"),
        Tried([count / 8 for count in COUNTS], says="wrong value"),
        Tried(8, says="single number"),
        Tried(COUNTS[:6], says="shape"),
    ],
}
