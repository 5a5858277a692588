"""The settings of a run."""

from dataclasses import dataclass
from numbers import Integral, Real

from qlora_helpers.training.run_folder import RESULT

# Names of transformers for each. Its own "constant" has no warm-up, whatever warmup_steps says.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Settings:
    """The knobs of a run. The defaults are those of the course's run with the shipped model.

    Attributes:
        method: "lora" trains adapters in a frozen base, "full" all weights of an unquantised model.
        steps: optimizer steps.
        batch_size: chats that go through the model at once.
        accumulation: so many batches make one optimizer step.
        learning_rate: the peak; linear warm-up over `warmup_steps`, then as `schedule` says.
        schedule: after the warm-up: "linear" or "cosine" decay to zero, or "constant".
        max_grad_norm: longer gradients are clipped to this length; None for no clipping.
        rank, alpha, dropout, target_modules: of LoRA; see `peft.LoraConfig`. Not used by "full".
        max_length: the longest chat in tokens. A longer one is refused, not cut.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        optimizer: a name that transformers' `optim` takes; None for paged 8-bit AdamW on a GPU and AdamW on a CPU.
        save_steps: write a checkpoint every so many steps; None for none.
        save_minutes: write a checkpoint at the first step after every so many minutes; None for none.
        keep_checkpoints: the newest so many are kept. With two, a kill while one is written leaves the other.
        log_steps: log loss and gradient norm every so many steps; None for twenty times in a run. On a GPU logging waits
            for the step to end.
        seed: of the adapters' first values, the order of the chats, and dropout.
    """

    method: str = "lora"
    steps: int = 300
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 15
    schedule: str = "linear"
    max_grad_norm: float | None = 1.0
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    max_length: int = 64
    gradient_checkpointing: bool = False
    optimizer: str | None = None
    save_steps: int | None = None
    save_minutes: float | None = None
    keep_checkpoints: int = 2
    log_steps: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.method not in RESULT:
            raise ValueError(f"method={self.method!r}: choose one of {', '.join(RESULT)}")
        positive = ("steps", "batch_size", "accumulation", "learning_rate", "rank", "alpha", "max_length")
        for name in positive:
            value = getattr(self, name)
            if not (isinstance(value, Real) and value > 0):
                raise ValueError(f"{name}={value!r}: must be more than 0")
            if name in ("steps", "batch_size", "accumulation", "rank", "max_length") and not isinstance(
                value, Integral
            ):
                raise ValueError(f"{name}={value!r}: must be a whole number")
        if not (isinstance(self.warmup_steps, Real) and self.warmup_steps >= 0):
            raise ValueError(f"warmup_steps={self.warmup_steps!r}: must be 0 or more")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r}: must be more than 0, or None for no clipping")
        if self.log_steps is not None and self.log_steps < 1:
            raise ValueError(f"log_steps={self.log_steps!r}: must be 1 or more, or None for twenty times in a run")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: must be at least 0 and less than 1")
        if self.save_steps is not None and self.save_steps < 1:
            raise ValueError(f"save_steps={self.save_steps!r}: must be 1 or more, or None for no checkpoints")
        if self.save_minutes is not None and not self.save_minutes >= 0:
            raise ValueError(f"save_minutes={self.save_minutes!r}: must be 0 or more, or None for no checkpoints")
        if not self.keep_checkpoints >= 2:
            raise ValueError(
                f"keep_checkpoints={self.keep_checkpoints!r}: must be 2 or more, else a kill can leave none"
            )
