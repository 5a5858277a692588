"""Tests that need a GPU; elsewhere they are skipped, and say so. They run as on a T4, whatever the GPU."""

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # short_runs.py, kills.py


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if FOLDER in item.path.parents:  # pytest hands over the items of all folders
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can see"))


@pytest.fixture(scope="session")
def stand_ins():
    """A function from the name of a shape to a folder with random weights of it, written once."""
    import stand_in  # in data/

    folder = Path(os.environ.get("QLORA_STAND_INS") or Path(tempfile.gettempdir(), "stand-ins"))
    folder.mkdir(parents=True, exist_ok=True)

    def written(shape: str) -> str:
        cap = torch.cuda.get_per_process_memory_fraction()
        torch.cuda.set_per_process_memory_fraction(1.0)  # the cap is for training, not for making random weights
        try:
            return str(stand_in.write(shape, folder / shape))
        finally:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(cap)

    return written


@pytest.fixture
def t4(monkeypatch):
    """A T4's memory and attention kernels, without the math kernel; the GPU's own come back afterwards."""
    from measure_t4 import as_on_a_t4  # in data/

    monkeypatch.setenv("QLORA_GEAR", "t4")
    as_on_a_t4(math_kernel=False)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    for enable in ("flash", "cudnn", "math"):
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(True)
