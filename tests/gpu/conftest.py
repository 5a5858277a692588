"""Tests that need a GPU; without one they are skipped, and say so. They run as on a T4, whatever the GPU."""

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

FOLDER = Path(__file__).resolve().parent
# With several GPUs, a process that no launcher has started is refused. These tests use the first one; and those of several
# find all of them under this name, also in the processes of pytest-xdist.
ALL_GPUS = "QLORA_TESTS_ALL_GPUS"
if torch.cuda.device_count() > 1 and ALL_GPUS not in os.environ:
    every = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    os.environ |= {ALL_GPUS: every, "CUDA_VISIBLE_DEVICES": every.split(",")[0]}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if FOLDER in item.path.parents:  # pytest passes the items of all folders
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can see"))


@pytest.fixture(scope="session")
def stand_ins():
    """A function that takes the name of a shape and returns a folder with random weights of it, written once."""
    from data.scripts.make import stand_in_models as stand_in

    folder = Path(os.environ.get("QLORA_STAND_INS") or Path(tempfile.gettempdir(), "stand-ins"))
    folder.mkdir(parents=True, exist_ok=True)

    def written(shape: str) -> str:
        cap = torch.cuda.get_per_process_memory_fraction()
        torch.cuda.set_per_process_memory_fraction(1.0)  # the cap is for training, not for making random weights
        try:
            with FileLock(folder / f"{shape}.lock"):  # several workers need it at the same time: the others wait
                return str(stand_in.write(shape, folder / shape))
        finally:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(cap)

    return written


@pytest.fixture
def t4(monkeypatch):
    """A T4's memory and attention kernels, without the math kernel; the GPU's own are restored afterwards."""
    from data.scripts.measure.t4_gear import as_on_a_t4

    monkeypatch.setenv("QLORA_GEAR", "t4")
    as_on_a_t4(math_kernel=False)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    for enable in ("flash", "cudnn", "math"):
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(True)
