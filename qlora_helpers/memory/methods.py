"""What full fine-tuning, LoRA and QLoRA take, counted in the same way for each.

What is called "the memory of full fine-tuning" depends on what is counted. Here it is always the same:

- weights, gradients and optimizer states, wherever they lie: what a run keeps for its numbers, before activations;
- of these the paged states, which are not in torch's tensors: they lie on the card as long as there is room, else in main memory;
- the peak in torch's tensors: with activations, without paged states;
- all that is on the card: what torch reserves, the CUDA context, and the paged states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qlora_helpers import validation
from qlora_helpers.memory.gpus import GPU
from qlora_helpers.memory.prediction import predict
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.trained import what_is_trained
from qlora_helpers.settings import GPU_RUN, Settings

__all__ = ["MethodMemory", "memory_of_methods"]

RUNS = (
    ("full", "paged_adamw_32bit"), ("full", "adamw_torch"), ("full", "paged_adamw_8bit"),
    ("lora", "paged_adamw_32bit"), ("lora", "paged_adamw_8bit"),
    ("qlora", "paged_adamw_32bit"), ("qlora", "paged_adamw_8bit"),
)  # fmt: skip


@dataclass(frozen=True)
class MethodMemory:
    """What a run of one method takes, in bytes.

    Attributes:
        settings: of the run, with its method and its optimizer.
        weights: of the model, and of the adapters.
        gradients: of what is trained.
        states: of the optimizer, in torch's tensors and paged.
        paged: of these states the ones that are paged.
        peak: the most in torch's tensors: with activations, without paged states.
        on_the_card: all of it: what torch reserves, the CUDA context, and the paged states.
    """

    settings: Settings
    weights: int
    gradients: int
    states: int
    paged: int
    peak: int
    on_the_card: int

    @property
    def kept(self) -> int:
        """Weights, gradients and optimizer states, wherever they lie, before activations."""
        return self.weights + self.gradients + self.states


def memory_of_methods(
    shape: ModelShape,
    runs: Iterable[tuple[str, str]] = RUNS,
    settings: Settings = GPU_RUN,
    gpu: str | GPU = "h200",
) -> list[MethodMemory]:
    """The memory of one run for each method and optimizer, by the predictor.

    Args:
        shape: of a model whose layers are written out here.
        runs: the method and the optimizer of each.
        settings: all else of the runs, on one GPU.

    Raises:
        ValueError: the shape is no `ModelShape`, the run is one on several GPUs, or as `predict` does.
    """
    if not isinstance(shape, ModelShape):
        raise validation.refuse("shape", shape, "give the shape of one of the families in qlora_helpers.memory.shape")
    if settings.num_gpus > 1:
        raise validation.refuse("num_gpus", settings.num_gpus, "must be 1: one GPU holds all of it")
    found = []
    for method, optimizer in runs:
        p = predict(shape, replace(settings, method=method, optimizer=optimizer), gpu)
        trained = what_is_trained(shape, p.settings)
        found.append(
            MethodMemory(
                settings=p.settings,
                weights=p.loaded_bytes + trained.adapters,
                gradients=trained.gradients,
                states=trained.states + trained.paged,
                paged=trained.paged,
                peak=p.peak_allocated_bytes,
                on_the_card=p.device_bytes,
            )
        )
    return found
