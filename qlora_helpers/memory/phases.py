"""The phases of a run and of a training step, by the names that everything here uses."""

LOAD = "load"
FORWARD = "forward"  # the embeddings and the decoder
LOSS = "loss"  # the output head
BACKWARD = "backward"
STEP = "optimizer step"  # clipping included
EVALUATION = "evaluation"
SAVING = "saving"
MERGING = "merging"

IN_A_STEP = (FORWARD, LOSS, BACKWARD, STEP)  # in the order in which they come
BETWEEN = "between steps"

# The moments of a step in which its peak can lie, and the phase that each belongs to.
MOMENTS = {
    "loss": LOSS,
    "loss backward": BACKWARD,
    "last layer backward": BACKWARD,
    "first layer backward": BACKWARD,
    "embeddings backward": BACKWARD,
    "optimizer step": STEP,
}

# The optimizer makes its states in the first step that changes the weights: only the steps after it are alike.
FIRST_STEP, STEADY_STEPS = "first step", "steady steps"
