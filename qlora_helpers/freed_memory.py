"""Memory that a step frees is kept for the next step, on a CPU under Linux.

torch asks the C library for the memory of each tensor and gives it back when the tensor is gone. glibc gives large pieces
back to the system at once, and a page that comes from the system has to be cleared and mapped first. So each step of a
run fetched the same pages anew: some 4,000 of them with the shipped model, for a few per cent of a step's time. Here, glibc is
told to keep what is freed. Nothing is computed in another way, and the peak of memory is the same; between two peaks, the
process holds up to `MOST_BYTES` more.
"""

from __future__ import annotations

import ctypes
import platform

__all__ = ["MOST_BYTES", "keep_freed_memory"]

MOST_BYTES = 2**28  # of freed memory that is kept
_OLD_LIMIT = 2**25  # before 2.35, glibc takes no larger one for what always comes from the system
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to `MOST_BYTES` of freed memory, until this process ends.

    Returns:
        Whether it does so; False for another C library, which is left as it is.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    large = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (MOST_BYTES, _OLD_LIMIT))
    return large and bool(mallopt(_M_TRIM_THRESHOLD, MOST_BYTES))
