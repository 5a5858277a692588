"""Loss spikes: steps whose loss is far above that of the steps before.

The rule is robust: neither a falling loss nor one odd batch upsets it. Of the last `WINDOW` losses it takes
the median (what is usual) and the median distance from it, times 1.4826 (the spread: for normal noise this is the
standard deviation). A loss is a spike if it is above the usual one by more than each of three: `SPREADS` spreads,
`SHARE` of the usual one, and `NATS`. Before `AT_LEAST` losses are known, nothing is called a spike.

The losses of a spike do not count as usual. Consecutive steps are one spike. If it lasts a whole window, it is no
longer a spike but a new level: the rule starts over there.

The constants were chosen so that healthy runs of the shipped model with batches of 16, 4 and 1 have none.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass

__all__ = ["NATS", "SHARE", "SPREADS", "WINDOW", "Spike", "SpikeWatch", "find_spikes"]

WINDOW = 20
AT_LEAST = 3
SPREADS = 8.0
SHARE = 0.5
NATS = 0.5


@dataclass
class Spike:
    """A loss far above that of the steps before.

    Attributes:
        step: its first step.
        loss: the loss of that step.
        usual: the median of the losses before.
        limit: a loss above this one is a spike.
        peak: the highest loss while it lasted.
        steps: how many steps in a row were above their limit.
    """

    step: int
    loss: float
    usual: float
    limit: float
    peak: float
    steps: int = 1

    def __str__(self) -> str:
        return (
            f"loss spike at step {self.step}: {self.loss:.4g}, where {self.usual:.4g} is usual (limit {self.limit:.4g})"
        )


class SpikeWatch:
    """Takes the losses one by one; `spikes` has those found so far."""

    def __init__(self) -> None:
        self.spikes: list[Spike] = []
        self.before: deque[float] = deque(maxlen=WINDOW)
        self.lasting = False

    def add(self, step: int, loss: float) -> Spike | None:
        """Look at the next loss. Returns the spike if one begins here.

        Raises:
            ValueError: the loss is NaN or infinite, which is not a spike but the end of a run.
        """
        if not math.isfinite(loss):
            raise ValueError(f"loss={loss!r} at step {step}: a spike is a finite loss")
        if len(self.before) >= AT_LEAST:
            usual = statistics.median(self.before)
            spread = 1.4826 * statistics.median(abs(value - usual) for value in self.before)
            limit = usual + max(SPREADS * spread, SHARE * usual, NATS)
            if loss > limit:
                return self._above(step, loss, usual, limit)
        self.lasting = False
        self.before.append(loss)
        return None

    def _above(self, step: int, loss: float, usual: float, limit: float) -> Spike | None:
        if not self.lasting:
            self.lasting = True
            self.spikes.append(Spike(step, loss, usual, limit, peak=loss))
            return self.spikes[-1]
        spike = self.spikes[-1]
        spike.steps += 1
        spike.peak = max(spike.peak, loss)
        if spike.steps >= WINDOW:
            self.before.clear()
            self.lasting = False
        return None


def find_spikes(losses: list[tuple[int, float]]) -> list[Spike]:
    """The spikes among (step, loss) pairs, one pair per step."""
    watch = SpikeWatch()
    for step, loss in losses:
        watch.add(step, loss)
    return watch.spikes
