"""Units of memory. GiB is a power of two, as GPU tools count; GB, a power of ten, is what disks and model files are sold in."""

from __future__ import annotations

__all__ = ["GB", "GIB", "KIB", "MIB", "in_words"]

KIB, MIB, GIB = 2**10, 2**20, 2**30
GB = 10**9


def in_words(size: int | None) -> str:
    """Bytes in GiB, or in MiB below one GiB; "-" for what was not measured."""
    if size is None:
        return "-"
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB else f"{size / MIB:.1f} MiB"
