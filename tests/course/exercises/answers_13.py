"""Answers to the exercises of lesson 13."""

import itertools
import math
from collections import Counter

import numpy
import torch

from qlora_helpers.course.exercises import lesson_13
from tests.course.exercises.tried import Tried

# ---- 13.2


def stacked(A0, B0, A, B):
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)


def the_start_first(A0, B0, A, B):
    return [torch.vstack([-A0, A]), torch.hstack([B0, B])]


def turned(A0, B0, A, B):
    A2, B2 = stacked(A0, B0, A, B)
    Q, _ = torch.linalg.qr(torch.randn(len(A2), len(A2)))
    return Q.T @ A2, B2 @ Q


def no_minus(A0, B0, A, B):
    return torch.cat([A, A0]), torch.cat([B, B0], dim=1)


def two_minuses(A0, B0, A, B):
    return torch.cat([A, -A0]), torch.cat([B, -B0], dim=1)


def plain_differences(A0, B0, A, B):
    return A - A0, B - B0


def the_other_way_round(A0, B0, A, B):
    return stacked(A0, B0, A, B)[::-1]


def in_another_order(A0, B0, A, B):
    return torch.cat([A0, A]), torch.cat([B, -B0], dim=1)


def the_product(A0, B0, A, B):
    return B @ A - B0 @ A0


# ---- 13.3

PAIRS = [0.040, -0.002, 0.034, 0.006, 0.156]
SEEDS = lesson_13._seeds(PAIRS)

# ---- 13.4


def by_lgamma(answers):
    ways = math.lgamma(len(answers) + 1) - sum(math.lgamma(n + 1) for n in Counter(answers).values())
    return ways / math.log(2)


def by_logarithms(answers):
    bits = sum(math.log2(n) for n in range(1, len(answers) + 1))
    return bits - sum(math.log2(n) for count in Counter(answers).values() for n in range(1, count + 1))


def by_whole_numbers(answers):
    ways = math.factorial(len(answers))
    for count in Counter(answers).values():
        ways //= math.factorial(count)
    return math.log2(ways)


def one_after_the_other(answers):
    ways, left = 1, len(answers)
    for count in Counter(answers).values():
        ways *= math.comb(left, count)
        left -= count
    return math.log2(ways)


def in_nats(answers):
    return by_lgamma(answers) * math.log(2)


def all_differ(answers):
    return math.lgamma(len(answers) + 1) / math.log(2)


def by_entropy(answers):
    shares = [n / len(answers) for n in Counter(answers).values()]
    return -len(answers) * sum(share * math.log2(share) for share in shares)


def number_of_ways(answers):
    return 2 ** min(by_lgamma(answers), 1000)


def by_trying(answers):
    return math.log2(len(set(itertools.permutations(answers[:7]))))


RIGHT = {
    "alpha_of_plain_lora": [Tried(128), Tried(128.0), Tried(32 / 16**0.5 * 16), Tried(torch.tensor(128))],
    "as_plain": [Tried(function) for function in (stacked, the_start_first, turned)],
    "seeds": [
        Tried(SEEDS, pairs=PAIRS),
        Tried(float(SEEDS), pairs=PAIRS),
        Tried(numpy.int64(SEEDS), pairs=PAIRS),
    ],
    "bits_of_deal": [Tried(function) for function in (by_lgamma, by_logarithms, by_whole_numbers, one_after_the_other)],
}

WRONG = {
    "alpha_of_plain_lora": [
        Tried(8, says="not right"),
        Tried(32, says="not right"),
        Tried(64, says="not right"),
        Tried(2, says="not right"),
        Tried("alpha", says="text"),
    ],
    "as_plain": [
        Tried(no_minus, says="is not B @ A - B0 @ A0"),
        Tried(two_minuses, says="is not B @ A - B0 @ A0"),
        Tried(in_another_order, says="is not B @ A - B0 @ A0"),
        Tried(plain_differences, says="the shapes are"),
        Tried(the_other_way_round, says="the shapes are"),
        Tried(the_product, says="two matrices are needed"),
        Tried(128, says="a function is needed"),
    ],
    "seeds": [
        Tried(SEEDS - 1, says="missed too often", pairs=PAIRS),
        Tried(SEEDS + 1, says="fewer seeds are enough", pairs=PAIRS),
        Tried(5, says="missed too often", pairs=PAIRS),
        Tried(7.5, says="whole number", pairs=PAIRS),
        Tried(1, says="whole number", pairs=PAIRS),
        Tried("many", says="text", pairs=PAIRS),
    ],
    "bits_of_deal": [
        Tried(in_nats, says="in the case"),
        Tried(all_differ, says="two alike"),
        Tried(by_entropy, says="in the case"),
        Tried(number_of_ways, says="in the case"),
        Tried(by_trying, says="a thousand answers"),
        Tried(3.0, says="function"),
    ],
}
