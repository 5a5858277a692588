"""Measured against predicted: what a run really takes, phase by phase, and what `qlora_helpers.memory` said before.

measurement = Measurement()
with measurement.phase("load"):
    model = load_model(name)
trainer = build_trainer(model, tokenizer, chats, folder, settings, hardware)
trainer.add_callback(MemoryCallback(measurement))
trainer.train()
print(compare(predict(shape_of(trainer), settings_of(trainer), "t4"), measurement))
"""

from __future__ import annotations

import torch

from qlora_helpers.memory import Prediction
from qlora_helpers.memory.measurement import Measurement
from qlora_helpers.memory.phases import LOAD, STEADY_STEPS
from qlora_helpers.units import in_words

__all__ = ["OUTSIDE", "TOLERANCE", "compare"]

TOLERANCE = 0.10  # a prediction that is further off is marked
OUTSIDE = ("optimizer (paged)", "CUDA context", "NCCL")  # parts of a prediction that are not in torch's allocator


def compare(prediction: Prediction, measurement: Measurement) -> str:
    """A table of predicted and measured sizes, the parts of the predicted peak, and the measured phases.

    Both peaks are those of the steady steps; the memory on the card is that at their end. The difference is predicted
    minus measured, in per cent of what was measured; one of more than 10 % is marked.

    Raises:
        ValueError: no steady step was measured.
    """
    phases = measurement.phases
    if STEADY_STEPS not in phases:
        raise ValueError(
            f"measurement has no {STEADY_STEPS!r} but {list(phases)}: train two steps or more with a MemoryCallback"
        )
    settings, steady, load = prediction.settings, phases[STEADY_STEPS], phases.get(LOAD)
    what = f"{settings.method}, {settings.batch_size} x {settings.max_length:,} tokens, predicted for a {prediction.gpu.name}"
    if measurement.on_gpu:
        lines = [f"{what}, measured on a {torch.cuda.get_device_name()}"]
    else:
        lines = [
            f"{what}.",
            "No GPU was measured here. The main memory below is the whole process's: no prediction stands beside it.",
        ]
    lines.append(f"{'':26}{'predicted':>15}{'measured':>15}{'difference':>15}")
    rows = {
        "after loading": (prediction.loaded_bytes, load.allocated_bytes if load else None),
        "peak, allocated": (prediction.peak_allocated_bytes, steady.peak_allocated_bytes),
        "peak, reserved": (prediction.peak_reserved_bytes, steady.peak_reserved_bytes),
        "on the card": (prediction.device_bytes, steady.device_used_bytes),
    }
    for name, (predicted, measured) in rows.items():
        line = f"{name:26}{in_words(predicted):>15}{in_words(measured):>15}"
        if measured:
            difference = predicted / measured - 1
            line += f"{difference:>+13.1%}".replace("%", " %")
            line += f"  over {TOLERANCE:.0%}".replace("%", " %") if abs(difference) > TOLERANCE else ""
        lines.append(line)
    lines += ["", f"The predicted peak ({prediction.peak_phase}):"]
    lines += [
        f"  {name:24}{in_words(size):>15}" for name, size in prediction.parts.items() if size and name not in OUTSIDE
    ]
    outside = {name: prediction.parts[name] for name in OUTSIDE if prediction.parts.get(name)}
    lines += ["Beside torch's allocator:"] if outside else []
    lines += [f"  {name:24}{in_words(size):>15}" for name, size in outside.items()]
    return "\n".join([*lines, "", str(measurement)])
