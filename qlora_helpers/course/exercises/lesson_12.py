"""The exercises of lesson 12: averaged gradients, what is received in a step, which way to take, a chat that counts twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_helpers.course.exercises.asking import Exercise, choice, function, values
from qlora_helpers.memory import find_shape, predict
from qlora_helpers.memory.several import on_gpus
from qlora_helpers.settings import GPU_RUN, Settings

if TYPE_CHECKING:
    import torch

__all__ = ["a_strange_gradient", "averaged", "counts", "received_in_a_step", "way"]


# ---- 12.1


def _averaged(gradients: Sequence[torch.Tensor], tokens: Sequence[int]) -> torch.Tensor:
    return sum(gradient * count for gradient, count in zip(gradients, tokens, strict=True)) / sum(tokens)


def _cases_of_gradients() -> dict[str, tuple]:
    import torch

    dice = torch.Generator().manual_seed(0)

    def some(number: int) -> list[torch.Tensor]:
        return [torch.randn(6, generator=dice) for _ in range(number)]

    return {
        "two ranks with as many tokens": (some(2), [40, 40]),
        "two ranks, one with three times the tokens": (some(2), [29, 87]),
        "four ranks": (some(4), [10, 200, 31, 7]),
        "one rank": (some(1), [12]),
        "a rank without answer tokens": ([torch.ones(6), torch.zeros(6)], [25, 0]),
    }


averaged = Exercise(
    number="12.1",
    title="an average that changes nothing",
    kind="build",
    difficulty="easy",
    minutes=8,
    hints=(
        "what would one GPU divide by, if it had the chats of all ranks?",
        "a rank's gradient is that of a mean. Multiply it by what it was divided by, add up, and divide by the tokens of all.",
    ),
    fault=function(_averaged, _cases_of_gradients),
)


# ---- 12.2


def _received_in_a_step(adapters: float, packed: float, ranks: int, passes: int, sharded: bool) -> float:
    share = (ranks - 1) / ranks
    if not sharded:
        return 2 * share * adapters
    return share * (2 * passes * (packed + adapters) + adapters)


received_in_a_step = Exercise(
    number="12.2",
    title="bytes in a step",
    kind="build",
    difficulty="medium",
    minutes=15,
    hints=(
        "list the exchanges of a step, and how often each is done: which are done in every pass, and which once?",
        "in an all-gather or a reduce-scatter a rank receives what it has not got itself; an all-reduce is both. Passes matter "
        "only where something is gathered.",
    ),
    fault=function(
        _received_in_a_step,
        {
            "two ranks with copies": (168e6, 3.5e9, 2, 1, False),
            "two ranks with copies, four passes": (168e6, 3.5e9, 2, 4, False),
            "two ranks with shards": (168e6, 3.5e9, 2, 1, True),
            "eight ranks with shards, four passes": (828e6, 34e9, 8, 4, True),
            "eight ranks with copies": (828e6, 34e9, 8, 4, False),
            "one rank with shards": (168e6, 3.5e9, 1, 2, True),
        },
    ),
)


# ---- 12.3

WAYS = {
    "copies": ["copy", "data parallel", "a copy on each"],
    "shards": ["shard", "sharding", "fsdp"],
    "offloaded": ["offload", "offloaded shards", "shards in main memory"],
    "none": ["nothing", "none of these"],
}
# Each run: the model, the GPU, how many of it, chats of a step, tokens of each.
RUNS = {
    "A": ("meta-llama/Llama-3.1-8B", "4090", 2, 4, 2048),
    "B": ("meta-llama/Llama-3.1-70B", "4090", 2, 2, 512),
    "C": ("meta-llama/Llama-3.1-70B", "4090", 4, 4, 2048),
    "D": ("meta-llama/Llama-3.1-70B", "a100-80", 2, 4, 2048),
}


def first_that_fits(model: str, gpu: str, number: int, chats: int, tokens: int) -> str:
    """The first of copies, shards and offloaded shards with which a run fits; "none" if none of them does."""
    run = replace(GPU_RUN, batch_size=chats, max_length=tokens)
    ways: dict[str, Settings] = {
        "copies": replace(run, num_gpus=number),
        "shards": on_gpus(run, number),
        "offloaded": on_gpus(run, number, cpu_offload=True),
    }
    shape = find_shape(model)
    return next((name for name, settings in ways.items() if predict(shape, settings, gpu).fits), "none")


def _way(answer: Any) -> str:
    if not isinstance(answer, Mapping):
        return f"a dictionary is needed, with a way for each of {', '.join(RUNS)}."
    if missing := [run for run in RUNS if run not in answer]:
        return f"there is no way for {', '.join(missing)}."
    for run, given in RUNS.items():
        if fault := choice(first_that_fits(*given), WAYS)(answer[run]):
            return f"run {run}: {fault}"
    return ""


way = Exercise(
    number="12.3",
    title="which way?",
    kind="predict",
    difficulty="medium",
    minutes=10,
    hints=(
        "begin with what sends least. Does one of the GPUs hold the whole model with its adapters?",
        "if not, a half or a quarter of the weights, and beside it what has to be whole for a moment. The table of the parts "
        "has both for two GPUs.",
    ),
    fault=_way,
)


# ---- 12.4

_CHATS = 7
_SEED = 3


def _sampled() -> list[int]:
    """Which chats the two ranks take together, as torch's sampler deals them out."""
    from torch.utils.data import DistributedSampler

    samplers = [DistributedSampler(range(_CHATS), num_replicas=2, rank=rank, seed=_SEED) for rank in (0, 1)]
    return [place for sampler in samplers for place in sampler]


def a_strange_gradient(gradient_of: Callable[[list], tuple[torch.Tensor, int]], chats: Sequence[Any]) -> torch.Tensor:
    """The gradient of a step of two ranks on seven chats, averaged by answer tokens.

    Args:
        gradient_of: gives the gradient of the mean loss of some chats, and their answer tokens.
        chats: seven of them.

    Raises:
        ValueError: there are not seven chats.
    """
    if len(chats) != _CHATS:
        raise ValueError(f"chats has {len(chats)}: give {_CHATS}, as the exercise says")
    return gradient_of([chats[place] for place in _sampled()])[0]


counts = Exercise(
    number="12.4",
    title="why does it learn differently?",
    kind="run",
    difficulty="hard",
    minutes=20,
    hints=(
        "the gradient of a sum of losses is the sum of their gradients. So `strange` is a sum of seven gradients, and only how "
        "much of each is not known.",
        "put gradient x answer tokens of each chat into a column, and let torch.linalg.lstsq find the seven factors. They have "
        "a factor in common: divide by the smallest.",
    ),
    fault=values(lambda: [float(_sampled().count(place)) for place in range(_CHATS)], rel=0.02),
)
