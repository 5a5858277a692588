"""A pass through the whole model, put together from one through a few of its layers.

Each layer of the whole model takes and gives back what the layer that stands for it did. What outlives a part, such as the
input that the next layer is given or an activation that the backward pass frees, ends in the same place of the part that it
belongs to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_helpers.memory.fake.ledger import ALIVE
from qlora_helpers.memory.fake.trace import Pass

__all__ = ["PART", "Timeline", "whole_pass"]

PART = 1 << 32  # events of one part: a time is part * PART + 2 * place within it


@dataclass(frozen=True)
class Timeline:
    """The memory of a pass through the whole model.

    Attributes:
        layers: of the whole model.
        sizes, kinds: of each piece of memory, as in `Pass`.
        births, deaths: their order; `ledger.ALIVE` if it outlives the pass.
    """

    layers: int
    sizes: np.ndarray
    kinds: np.ndarray
    births: np.ndarray
    deaths: np.ndarray

    def events(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What happens in order: the entry of each event, its bytes, negative where it is given back, and its part."""
        entries = np.arange(len(self.sizes))
        ends = self.deaths < ALIVE
        times = np.concatenate([self.births, self.deaths[ends]])
        order = np.argsort(times, kind="stable")
        which = np.concatenate([entries, entries[ends]])[order]
        change = np.concatenate([self.sizes, -self.sizes[ends]])[order]
        return which, change, times[order] // PART

    def part_of(self, times: np.ndarray) -> np.ndarray:
        """The number of the part in which something happens, in the order that `Pass` describes."""
        return times // PART

    def peaks(self) -> dict[int, tuple[int, int]]:
        """For each part, the most that is alive within it, in bytes, and the time of that."""
        ends = self.deaths < ALIVE
        times = np.concatenate([self.births, self.deaths[ends]])
        order = np.argsort(times, kind="stable")
        live = np.cumsum(np.concatenate([self.sizes, -self.sizes[ends]])[order])
        times = times[order]
        parts = times // PART
        starts = np.flatnonzero(np.diff(parts, prepend=-1))
        highest = np.maximum.reduceat(live, starts) if len(starts) else []
        found = {}
        for start, end, most in zip(starts, [*starts[1:], len(parts)], highest, strict=True):
            found[int(parts[start])] = int(most), int(times[start + int(np.argmax(live[start:end]))])
        return found

    def alive_at(self, time: int) -> np.ndarray:
        """The entries that are alive right after a time."""
        return np.flatnonzero((self.births <= time) & (self.deaths > time))


def _parts(layers: int, place: int) -> tuple[int, int]:
    """The forward and the backward part of a layer."""
    return 1 + place, 2 * layers + 2 - place


def whole_pass(run: Pass, template: Sequence[int]) -> Timeline:
    """A pass through a model of many layers.

    Args:
        run: through the few layers that stand for them.
        template: for each layer of the whole model, the one that stands for it; the first and the last stand for themselves.
    """
    few, many = run.layers, len(template)
    if not many:  # the layers could not be told: all of them ran
        return _timeline(0, [(np.arange(len(run.sizes)), run.born_in, run.dies_in)], run, run.lengths)
    last_few, last_many = 2 * few + 3, 2 * many + 3
    shared = {0: 0, few + 1: many + 1, few + 2: many + 2, last_few: last_many}
    layer_of = np.full(last_few + 1, -1)  # the layer that a part of the run belongs to
    backward = np.zeros(last_few + 1, dtype=bool)
    for place in range(few):
        forward_part, backward_part = _parts(few, place)
        layer_of[[forward_part, backward_part]] = place
        backward[backward_part] = True
    standing_for = [[place for place, of in enumerate(template) if of == few_place] for few_place in range(few)]
    lengths = np.zeros(last_many + 1, dtype=np.int64)
    lengths[list(shared.values())] = run.lengths[list(shared)]
    for place, of in enumerate(template):
        for part, of_part in zip(_parts(many, place), _parts(few, of), strict=True):
            lengths[part] = run.lengths[of_part]
    shared[-1] = -1  # outlives the pass

    def target(part: int, owner: int, instance: int) -> int:
        """Where a part lies in the whole model, seen from one instance of the layer that owns a piece of memory."""
        if part in shared:
            return shared[part]
        of = int(layer_of[part])
        away = of - owner
        if owner < 0 or abs(away) > 1:  # shared by layers: the last one that uses it gives it back
            place = 0 if of == 0 else many - 1 if of == few - 1 else standing_for[of][0 if backward[part] else -1]
        else:
            place = min(max(instance + away, 0), many - 1)
        return _parts(many, place)[1 if backward[part] else 0]

    owners = layer_of[run.born_in]
    blocks = []
    outside = np.flatnonzero(owners < 0)
    born = np.array([shared[part] for part in run.born_in[outside].tolist()], dtype=np.int64)
    dies = np.array([target(part, -1, 0) for part in run.dies_in[outside].tolist()], dtype=np.int64)
    blocks.append((outside, born, dies))
    for of in range(few):
        mine = np.flatnonzero(owners == of)
        in_backward = backward[run.born_in[mine]]
        different, index = np.unique(run.dies_in[mine], return_inverse=True)
        for instance in standing_for[of]:
            forward_part, backward_part = _parts(many, instance)
            born = np.where(in_backward, backward_part, forward_part)
            dies = np.array([target(int(part), of, instance) for part in different], dtype=np.int64)[index]
            blocks.append((mine, born, dies))
    return _timeline(many, blocks, run, lengths)


def _timeline(layers: int, blocks: list, run: Pass, lengths: np.ndarray) -> Timeline:
    entries, born_in, dies_in = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    births = born_in * PART + 2 * run.born_at[entries]
    recorded, at = run.lengths[run.dies_in[entries]], run.dies_at[entries]
    here = lengths[dies_in]
    # in a part of another kind of layer: as far from its beginning, or from its end, whichever is nearer
    near_start = at <= recorded // 2
    moved = np.where(near_start, np.minimum(at, here - 1), np.maximum(here - (recorded - at), 0))
    same = recorded == here
    ends = dies_in * PART + 2 * np.where(same, at, moved) + np.where(same, 0, 1)
    deaths = np.where(run.dies_in[entries] < 0, ALIVE, np.maximum(ends, births + 1))
    return Timeline(layers, run.sizes[entries], run.kinds[entries], births, deaths)
