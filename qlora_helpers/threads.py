"""How OpenMP's threads wait for each other: asleep, not in a loop that keeps a core busy.

A thread that waits in a loop has its core taken away as soon as another program needs one, and all others wait for it: on
two cores beside one busy program, training was more than ten times slower. `OMP_WAIT_POLICY=passive` makes threads sleep.
torch's OpenMP reads it once, when it is loaded, so it must be set before torch is imported.
"""

import os
import sys

VARIABLE = "OMP_WAIT_POLICY"
too_late = False  # whether torch was loaded before the setting was made, and waits as it always does


def wait_passively() -> None:
    """Set OMP_WAIT_POLICY=passive for torch, which is still to be imported, unless the user has set how to wait."""
    global too_late
    if VARIABLE in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    too_late = "torch" in sys.modules
    os.environ[VARIABLE] = "passive"  # if too late for this process, then still for those that it starts


def say_if_slowed(threads: int, seconds: float = 0.2) -> None:
    """Print a line if the setting came too late and other programs need the cores that `threads` threads compute on.

    Args:
        threads: that torch computes with (`torch.get_num_threads()`).
        seconds: how long to look at the other programs; this process must be idle meanwhile.
    """
    if not too_late or threads < 2:
        return
    import psutil

    cores = psutil.cpu_count()
    busy = psutil.cpu_percent(interval=seconds) / 100 * cores
    if cores - busy < threads - 0.5:
        print(
            f"Other programs keep {busy:.1f} of {cores} cores busy. Training will be several times slower than it need be, since "
            "torch was imported before qlora_helpers. Restart the kernel, import qlora_helpers first, or set "
            f"{VARIABLE}=passive before Python starts."
        )
