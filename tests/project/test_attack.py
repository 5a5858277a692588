"""The table of `make attack` is that of a whole run, and no other run of pytest writes it."""

import subprocess
import sys

import pytest

from qlora_helpers.paths import data_path
from tests import ROOT


@pytest.mark.parametrize(
    "arguments",
    [["tests/attack", "tests/test_units.py"], ["-o", "python_files=attack_*.py", "tests/attack", "-k", "no such"]],
)
def test_the_table_of_attacks_is_left_alone_by_other_runs(arguments):
    table = data_path("measured", "attack.txt")
    before = table.read_bytes()
    assert len(before.splitlines()) > 10
    subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, capture_output=True, check=False)
    assert table.read_bytes() == before
