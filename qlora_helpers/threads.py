"""How OpenMP's threads wait for each other: asleep, not spinning in a loop that keeps a core busy.

A spinning thread loses its core as soon as another program needs one, and all other threads wait for it: on two cores,
next to one busy program, training was more than ten times slower. `OMP_WAIT_POLICY=passive` makes threads sleep.
torch's OpenMP reads it once, when it is loaded, so it must be set before torch is imported.
"""

import os
import sys

__all__ = ["say_if_slowed", "wait_passively"]

VARIABLE = "OMP_WAIT_POLICY"
too_late = False  # whether torch was loaded before the variable was set, so that its threads spin


def wait_passively() -> None:
    """Set OMP_WAIT_POLICY=passive before torch is imported, unless the user has set how threads wait."""
    global too_late
    if VARIABLE in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    too_late = "torch" in sys.modules
    os.environ[VARIABLE] = "passive"  # even if too late for this process: those that it starts inherit it


def say_if_slowed(threads: int, seconds: float = 0.2) -> None:
    """Print a line if the variable was set too late, and other programs need the cores that torch computes on.

    Args:
        threads: how many torch computes with (`torch.get_num_threads()`).
        seconds: how long to watch the other programs; this process must be idle meanwhile.
    """
    if not too_late or threads < 2:
        return
    import psutil

    cores = psutil.cpu_count()
    busy = psutil.cpu_percent(interval=seconds) / 100 * cores
    if cores - busy < threads - 0.5:
        print(
            f"Other programs keep {busy:.1f} of {cores} cores busy. Training will be several times slower than "
            "necessary, since torch was imported before qlora_helpers. Restart the kernel, import qlora_helpers first, "
            f"or set {VARIABLE}=passive before Python starts."
        )
