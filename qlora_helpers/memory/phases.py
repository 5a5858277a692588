"""The phases of a run and of a training step, under the names that are used everywhere here."""

__all__ = [
    "BACKWARD",
    "BETWEEN",
    "EVALUATION",
    "FIRST_STEP",
    "FORWARD",
    "IN_A_STEP",
    "LOAD",
    "LOSS",
    "MERGING",
    "MOMENTS",
    "SAVING",
    "STEADY_STEPS",
    "STEP",
]

LOAD = "load"
FORWARD = "forward"  # the embeddings and the decoder
LOSS = "loss"  # the output head
BACKWARD = "backward"
STEP = "optimizer step"  # clipping included
EVALUATION = "evaluation"
SAVING = "saving"
MERGING = "merging"

IN_A_STEP = (FORWARD, LOSS, BACKWARD, STEP)  # in order
BETWEEN = "between steps"

# The moments of a step at which its peak can occur, and the phase that each belongs to.
MOMENTS = {
    "forward": FORWARD,
    "loss": LOSS,
    "loss backward": BACKWARD,
    "last layer backward": BACKWARD,
    "middle layer backward": BACKWARD,
    "first layer backward": BACKWARD,
    "embeddings backward": BACKWARD,
    "optimizer step": STEP,
    "evaluation": EVALUATION,
}

# The optimizer makes its states in the first step that changes the weights: only the steps after it are alike.
FIRST_STEP, STEADY_STEPS = "first step", "steady steps"
