"""The memory that it takes to merge an adapter into its base, in each way that `qlora_helpers.adapters.merge` has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_helpers import validation
from qlora_helpers.memory.loaded import loaded_bytes
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.settings import DTYPES, GPU_RUN, Settings

__all__ = ["MergeMemory", "predict_merge"]

# Bytes per weight of the layer being merged. PEFT computes B A and B A alpha / r in the adapter's float32. A merge into 4 bits
# then holds the dequantised weight (2), the scaled difference (4), their sum (4) and its copy on the device (4), from which it
# makes the packed weight (1/2) and the scales before and after their mean is subtracted (2 x 4/64).
_INTO_16_BITS = 4 + 4
_INTO_4_BITS = 2 + 4 + 4 + 4 + 0.5 + 2 * 4 / 64


@dataclass(frozen=True)
class MergeMemory:
    """Bytes on the device that does the merge, or in main memory if that is a CPU.

    Attributes:
        base_bytes: the base that the adapter is added to.
        base_peak_bytes: the most while the base is loaded, or loaded and dequantised.
        adapter_bytes: the adapter's weights.
        peak_bytes: the most overall, until the merged model is complete.
        merged_bytes: the merged model.
    """

    base_bytes: int
    base_peak_bytes: int
    adapter_bytes: int
    peak_bytes: int
    merged_bytes: int


def predict_merge(shape: ModelShape, into: str, settings: Settings | None = None) -> MergeMemory:
    """Predict the memory of a merge.

    Args:
        into: "4bit", "dequantised" or "16bit".
        settings: of the run that made the adapter; its rank, target modules and dtypes count. By default rank 16 on all
            layers, and 16-bit weights in bfloat16.

    Raises:
        ValueError: `into` is not one of these, or the run trained no adapter.
    """
    settings = settings or GPU_RUN
    if settings.method == "full":
        raise validation.refuse("settings.method", "full", "such a run has no adapter to merge")
    validation.one_of("into", into, ("4bit", "dequantised", "16bit"))
    settings = replace(settings, compute_dtype=settings.compute_dtype or "bfloat16")
    bits_16, bits_4 = (loaded_bytes(shape, settings, method) for method in ("lora", "qlora"))
    largest = max(linear.weights for linear in shape.targets(settings.target_modules))
    adapter = shape.lora_parameters(settings.rank, settings.target_modules) * DTYPES[settings.adapter_dtype]
    if into == "4bit":
        base = peak_before = bits_4
        work = _INTO_4_BITS * largest
    elif into == "16bit":
        base = peak_before = bits_16
        work = _INTO_16_BITS * largest
    else:
        # transformers keeps the 4-bit weights until the last layer is dequantised; the embeddings and the rest are shared
        width = DTYPES[settings.compute_dtype]
        rest = bits_16 - shape.linear_parameters * width
        base, peak_before = bits_16, bits_16 + (bits_4 - rest) + largest * width
        work = _INTO_16_BITS * largest
    return MergeMemory(base, peak_before, adapter, max(peak_before, round(base + adapter + work)), base)
