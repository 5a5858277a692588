"""Freed memory is kept for the next step instead of given back to the system."""

import platform
import subprocess
import sys

import pytest

from qlora_helpers import freed_memory

STEPS = """
import resource
from qlora_helpers.freed_memory import keep_freed_memory
import torch

def pages_fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(megabytes, 2**18) for megabytes in (1, 4, 40)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages_fetched()
before = pages_fetched()
assert keep_freed_memory()
pages_fetched()
print(before, pages_fetched())
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@needs_glibc
def test_a_step_fetches_its_memory_once():
    result = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, encoding="utf-8", check=True)
    before, after = map(int, result.stdout.split())
    assert before > 10 * 40 * 2**20 / 2**16  # in pages of up to 64 KiB
    assert after < before / 20


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: pytest.fail("it was called"))
    assert freed_memory.keep_freed_memory() is False
