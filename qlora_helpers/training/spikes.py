"""Loss spikes: steps whose loss lies far above that of the steps before.

The rule is robust, so that neither the fall of the loss nor one odd batch moves it. Of the last `WINDOW` losses it takes
the median (what is usual) and the median distance from it, times 1.4826 (the spread: for normal noise this is the
standard deviation). A loss is a spike if it lies above the usual one by `SPREADS` spreads, by `SHARE` of the usual one
and by `NATS`, all three. Nothing is judged before `AT_LEAST` losses are known.

The losses of a spike do not count as usual. Steps that follow each other are one spike. One that lasts a whole window
is no spike any more but a new level: the rule begins anew there.

The constants were chosen so that healthy runs of the shipped model with batches of 16, 4 and 1 have none.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass

WINDOW = 20
AT_LEAST = 3
SPREADS = 8.0
SHARE = 0.5
NATS = 0.5


@dataclass
class Spike:
    """A loss far above that of the steps before.

    Attributes:
        step: the first step of it.
        loss: its loss.
        usual: the median of the losses before.
        limit: the loss from which on it is a spike.
        peak: the highest loss while it lasted.
        steps: so many steps lay above their limit, one after the other.
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

    def __init__(self):
        self.spikes: list[Spike] = []
        self.before: deque[float] = deque(maxlen=WINDOW)
        self.lasting = False

    def add(self, step: int, loss: float) -> Spike | None:
        """Look at the next loss. Returns the spike if one begins here.

        Raises:
            ValueError: the loss is no number: that is no spike but the end of a run.
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
