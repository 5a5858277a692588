"""Checkpoints in main memory: what TRL's activation offloading changes in the memory of a pass.

TRL copies what autograd keeps to main memory and back (`trl.models.activation_offloading.OffloadActivations`). On its way
out a tensor stays on the GPU until five more have been kept, and comes back when the backward pass asks for it. In a layer
that is checkpointed its input is all that is kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qlora_helpers.memory.fake.ledger import ALIVE
from qlora_helpers.memory.fake.whole import PART, Timeline

__all__ = ["offloaded"]

STASH = 5  # tensors on their way out, OffloadActivations' max_fwd_stash_size
LEAST = 1024  # bytes, its min_offload_size


def offloaded(run: Timeline) -> Timeline:
    """A pass through a model whose layers are checkpointed, with their inputs in main memory in between.

    Where the layers could not be told from the rest of the model, everything is taken to stay.
    """
    born, dies = run.part_of(run.births), run.part_of(np.minimum(run.deaths, ALIVE - 1))
    forward_ends = run.layers + 1  # the part of the output head
    across = (run.deaths < ALIVE) & (born < forward_ends) & (dies > forward_ends + 1)
    out = np.flatnonzero(across & (run.sizes >= LEAST)) if run.layers else np.array([], dtype=np.int64)
    deaths = run.deaths.copy()
    gone = np.minimum(born[out] + STASH, forward_ends) * PART
    deaths[out] = np.maximum(gone, run.births[out] + 1)
    back = (dies[out] - 1) * PART + 1  # asked for by the part that ends it; fetched while the one before is at work
    return replace(
        run,
        sizes=np.concatenate([run.sizes, run.sizes[out]]),
        kinds=np.concatenate([run.kinds, run.kinds[out]]),
        births=np.concatenate([run.births, back]),
        deaths=np.concatenate([deaths, run.deaths[out]]),
    )
