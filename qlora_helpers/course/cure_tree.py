"""The words of lesson 9's tree: where a run died, the cheapest cure, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["branches_of_cures"]

_TRAINING = {
    "load": ("load", "load in 4 bits"),
    "forward": ("forward", "gradient checkpointing"),
    "eager attention": ("forward,\neager attention", "attention by sdpa"),
    "float32 copies": ("forward,\nfloat32 copies", "no prepare_model_for_kbit_training"),
    "backward, batch": ("backward", "half the batch, 2 steps of accumulation"),
    "optimizer": ("optimizer step", "states in 8 bits"),
}


def branches_of_cures(
    training: Mapping[str, tuple[float, float, float]], evaluation: Sequence[float], merging: Sequence[float]
) -> list[tuple[str, str]]:
    """The branches for `plots.decision_tree`: a place and, on two lines, its cure and the cure's price.

    Args:
        training: by the group of the measured runs: GiB before and after, and the pace after as a multiple of that before.
        evaluation: GiB before and after.
        merging: GiB of the GPU if the model is decoded there as a whole; GiB of main memory from file to file.

    Raises:
        ValueError: a group of `training` is missing or unknown.
    """
    if set(training) != set(_TRAINING):
        raise ValueError(f"training={sorted(training)}: must have the groups {sorted(_TRAINING)}")
    branches = []
    for group, (place, cure) in _TRAINING.items():
        before, after, pace = training[group]
        of = " (batch of 1)" if group == "load" else ""  # bound by the CPU: another such pair has another pace
        branches.append((place, f"{cure}\n{before:.1f} → {after:.1f} GiB, {pace:.2f} times the tokens/s{of}"))
    before, after = evaluation
    branches.append(("evaluation", f"keep the best words, not the logits\n{before:.1f} → {after:.1f} GiB"))
    branches.append(("saving", "not the GPU: main memory or disk"))
    decoded, files = merging
    told = f"{decoded:.1f} → 0 GiB, and {files:.1f} GiB of main memory"
    return [*branches, ("merging", f"from file to file (lesson 6)\n{told}")]
