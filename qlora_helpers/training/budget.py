"""A run within a budget of GPU memory: how it is chosen, and how the run is held to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qlora_helpers.hardware import Hardware
from qlora_helpers.memory.budget import Plan, budget_bytes, plan_for
from qlora_helpers.memory.gpus import GPU, measured_gpu
from qlora_helpers.memory.live_run import shape_of
from qlora_helpers.settings import Settings
from qlora_helpers.units import in_words

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["free_for_a_run", "in_whole_steps", "kept_within", "peak_beside", "plan_of", "use_segments_that_grow"]


def in_whole_steps(settings: Settings) -> bool:
    """Whether the trainer takes the chats of a step as one batch (see `whole_steps`)."""
    return settings.packing or settings.memory_budget is not None


def plan_of(model: PreTrainedModel | PeftModel, settings: Settings, hardware: Hardware) -> Plan | None:
    """Choose how a run of this model is made, and print what was chosen; None without a budget, or without a GPU.

    Raises:
        ValueError: the budget is more than the GPU has, or too little for the run.
    """
    if settings.memory_budget is None:
        return None
    if hardware.device == "cpu":
        print("memory_budget: there is no GPU whose memory could be used, so the settings stay as they are.")
        return None
    gpu = measured_gpu(hardware.gpu_name, hardware.gpu_bytes, hardware.capability)
    free = free_for_a_run(gpu)
    budget = budget_bytes(settings, gpu, free)
    if budget > free:
        print(
            f"memory_budget is {in_words(budget)}, and only {in_words(free)} of the GPU's memory are free now: the run is "
            "planned for these."
        )
        budget = free
    dtype = str(hardware.compute_dtype).removeprefix("torch.")
    plan = plan_for(shape_of(model), replace(settings, compute_dtype=dtype), gpu, budget)
    print(plan)
    return plan


def free_for_a_run(gpu: GPU) -> int:
    """Bytes of the card that this process has or can get: for its tensors, up to torch's own limit, and the CUDA context."""
    free, total = torch.cuda.mem_get_info()
    for_tensors = min(free + torch.cuda.memory_reserved(), int(torch.cuda.get_per_process_memory_fraction() * total))
    return min(for_tensors + gpu.context_bytes, gpu.usable_bytes)


@contextmanager
def kept_within(plan: Plan | None) -> Iterator[None]:
    """Refuse this process more GPU memory than its budget, as a card of that size would; and measure its peak anew.

    torch may not count segments that grow against this limit (`expandable_segments`): then the prediction alone keeps the run
    within its budget.
    """
    if plan is None:
        yield
        return
    torch.cuda.empty_cache()  # what loading left
    before, (_, total) = torch.cuda.get_per_process_memory_fraction(), torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min((plan.budget - plan.context_bytes) / total, before))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


def peak_beside(plan: Plan, peak: int) -> str:
    """The peak of a run's tensors, in bytes, beside what was predicted, in a sentence."""
    said = plan.chosen.prediction.peak_allocated_bytes
    return (
        f"Memory: the run's tensors took {in_words(peak)} at most, of {in_words(said)} predicted "
        f"({peak / said - 1:+.1%}); its budget is {in_words(plan.budget)}."
    )


def use_segments_that_grow(settings: Settings, hardware: Hardware) -> None:
    """Let torch's allocator grow its segments from here on, if the settings say so."""
    if settings.expandable_segments and hardware.device == "cuda":
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
