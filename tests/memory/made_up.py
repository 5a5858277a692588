"""Cards of any size, and a trainer's calls without a trainer."""

from dataclasses import replace
from types import SimpleNamespace

from qlora_helpers.memory import (
    find_gpu,
)


def card(usable_bytes, like="l4"):
    return replace(find_gpu(like), usable_bytes=usable_bytes)


def steps(callback, skipped=()):
    """Call a callback as a trainer does, with one step for each flag."""
    callback.on_train_begin(None, None, None)
    for flag in skipped:
        callback.on_step_end(None, None, None, optimizer=SimpleNamespace(step_was_skipped=flag))
    callback.on_train_end(None, None, None)
