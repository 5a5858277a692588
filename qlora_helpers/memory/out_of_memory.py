"""Read an out-of-memory error: what each number in its message says, and where in the run it happened.

try:
    trainer.train()
except torch.OutOfMemoryError as error:
    print(read_message(str(error)))
    print(place_of(error))
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from qlora_helpers.memory.phases import BACKWARD, EVALUATION, FORWARD, LOAD, MERGING, SAVING, STEP
from qlora_helpers.units import GIB, KIB, MIB

__all__ = ["PLACES", "Message", "place_of", "read_message"]

# Where a run can run out of memory, in order. A traceback does not tell the loss from the rest of the forward pass.
PLACES = (LOAD, FORWARD, BACKWARD, STEP, EVALUATION, SAVING, MERGING)

UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}
SIZE = r"(\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)"
# as written in c10/cuda/CUDACachingAllocator.cpp
NUMBERS = {
    "asked_bytes": rf"Tried to allocate {SIZE}",
    "total_bytes": rf"has a total capacity of {SIZE}",
    "free_bytes": rf"of which {SIZE} is free",
    "process_bytes": rf"this process has {SIZE} memory in use",
    "allowed_bytes": rf"{SIZE} allowed;",
    "allocated_bytes": rf"Of the allocated memory {SIZE} is allocated by PyTorch",
    "unallocated_bytes": rf"and {SIZE} is reserved by PyTorch but unallocated",
}


@dataclass(frozen=True)
class Message:
    """The numbers in torch's message, in bytes, as exact as it gives them (two decimal places).

    Attributes:
        asked_bytes: of the one request that failed. It is the last straw, not the load.
        total_bytes: what the card has.
        free_bytes: what is free on the whole card.
        process_bytes: what this process has taken, CUDA context included; None if the driver does not say.
        allowed_bytes: the cap, if `torch.cuda.set_per_process_memory_fraction` has set one, else None.
        allocated_bytes: what is in torch's tensors.
        unallocated_bytes: what torch holds besides that, too fragmented for the request.
    """

    asked_bytes: int
    total_bytes: int
    free_bytes: int
    process_bytes: int | None
    allowed_bytes: int | None
    allocated_bytes: int
    unallocated_bytes: int

    @property
    def reserved_bytes(self) -> int:
        """What torch holds of the card for its tensors: only this counts against the cap."""
        return self.allocated_bytes + self.unallocated_bytes

    @property
    def limit_bytes(self) -> int:
        """What torch may hold: the cap, or what it holds plus all that is free."""
        return self.allowed_bytes if self.allowed_bytes is not None else self.reserved_bytes + self.free_bytes

    @property
    def missing_bytes(self) -> int:
        """How much more torch must be allowed to hold for this one request; the next may still fail.

        Negative if there is room, but not in one piece: memory is fragmented.
        """
        return self.reserved_bytes + self.asked_bytes - self.limit_bytes

    def __str__(self) -> str:
        rows = [("asked for", self.asked_bytes), ("in tensors", self.allocated_bytes)]
        rows += [("held by torch, unused", self.unallocated_bytes), ("torch may hold", self.limit_bytes)]
        rows += [("missing", self.missing_bytes), ("the card has", self.total_bytes)]
        return "\n".join(f"{name:24}{size / GIB:7.2f} GiB" for name, size in rows)


def read_message(text: str) -> Message:
    """Read an out-of-memory message of torch 2.1 or newer, alone or within other text.

    Raises:
        ValueError: it is not such a message, or an older one without these numbers.
    """
    text = " ".join(str(text).split())
    found = {}
    for name, pattern in NUMBERS.items():
        hit = re.search(pattern, text)
        found[name] = round(float(hit[1]) * UNITS[hit[2]]) if hit else None
    missing = [name for name in NUMBERS if found[name] is None and name not in ("process_bytes", "allowed_bytes")]
    if missing:
        raise ValueError(
            f"text is {text[:80]!r}, without {', '.join(missing)}: paste the whole message, from "
            "'CUDA out of memory' to 'reserved by PyTorch but unallocated'"
        )
    return Message(**found)


# Functions that identify a place, with the end of the path of their file. The outermost decides: what is computed again for
# the gradients is part of the backward pass, and a forward pass in an evaluation is evaluation.
_SIGNS = (
    (MERGING, r"(merge_and_unload|merge_adapter|_unload_and_optionally_merge|dequantize)$", r"(peft|transformers)/"),
    (SAVING, r"(_save_checkpoint|save_model|save_pretrained|save_adapter)$", r""),
    (EVALUATION, r"(evaluate|evaluation_loop|prediction_step|generate|_evaluate)$", r""),
    (LOAD, r"(from_pretrained|load_model|prepare_model_for_kbit_training|get_peft_model)$", r""),
    (BACKWARD, r"backward$", r"(accelerate/accelerator|torch/_tensor|torch/autograd/.*)\.py$"),
    (STEP, r"(step|clip_grad_norm_?|_clip_grad_norm)$", r"(accelerate/optimizer|optim/.*|transformers/trainer|accelerator)\.py$"),
    (FORWARD, r"(compute_loss|forward)$", r""),
)  # fmt: skip
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line \d+, in (?P<function>\S+)')


def place_of(error: BaseException | str) -> str | None:
    """Where in a run an error happened: one of `PLACES`, or None if the traceback does not tell.

    Args:
        error: a caught exception, or the text of a traceback.
    """
    if isinstance(error, BaseException):
        error = "".join(traceback.format_exception(error))
    for frame in _FRAME.finditer(error):
        file = frame["file"].replace("\\", "/")
        for place, function, path in _SIGNS:
            if re.search(f"(^|\\.){function}", frame["function"]) and re.search(path, file):
                return place
    return None
