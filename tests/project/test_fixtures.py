"""The effects of the tests' own fixtures and hooks outside their module."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests import ROOT

TESTS = ROOT / "tests"


class Item:
    def __init__(self, path: Path):
        self.path, self.marks = path, []

    def add_marker(self, mark):
        self.marks.append(mark)


@pytest.mark.parametrize("there", [False, True])
def test_tests_of_a_gpu_and_no_others_are_skipped_without_one(there, monkeypatch):
    spec = importlib.util.spec_from_file_location("conftest_of_gpu", TESTS / "gpu" / "conftest.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    needs_one = Item(TESTS / "gpu" / "test_gears.py")
    others = [Item(TESTS / "test_hardware.py"), Item(Path("/home/me/gpu/course/tests/models/test_loading.py"))]
    hooks.pytest_collection_modifyitems([needs_one, *others])
    reasons = [mark.kwargs for mark in needs_one.marks]
    assert reasons == ([] if there else [{"reason": "needs a GPU that torch can see"}])
    assert not any(item.marks for item in others)


def test_nothing_takes_back_what_conftest_has_frozen():
    """`gc.unfreeze` in one module makes each collection slow in all later modules."""
    unfreezing = [path.name for path in TESTS.rglob("*.py") if re.search(r"^\s+gc\.unfreeze", path.read_text(), re.M)]
    assert unfreezing == []
