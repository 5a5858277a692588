"""The shipped model on a GPU: each gear learns what the cpu gear learns, and a killed run continues."""

import json
import os
import random
import subprocess
import sys

import pytest

from qlora_helpers import evaluation
from qlora_helpers.paths import data_path
from tests import ROOT

SCORES = json.loads(data_path("tiny-llama", "scores.json").read_text())


@pytest.mark.parametrize("gear", ["t4", "ampere", "cpu"])
def test_the_run_reaches_the_score_of_the_cpu_gear(gear, tmp_path):
    command = [sys.executable, "-m", "qlora_helpers", "run", "--output", str(tmp_path / "run")]
    subprocess.run(
        command,
        env=os.environ | {"QLORA_GEAR": gear, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        check=True,
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    wanted, count = SCORES["exact_match_after"]["NF4"], report["test_rows"]
    found = report["scores"]["after"]["exact_match"]
    print(f"\n{gear}: {found:.1%} in {report['train_seconds']:.0f} s of training")
    assert report["gear"] == gear
    # the standard error of the difference between two shares of the same number of questions
    assert found >= wanted - 2 * 2**0.5 * evaluation.standard_error(wanted, count)


@pytest.mark.parametrize("gear", ["t4", "ampere"])
@pytest.mark.parametrize("where", ["between steps", "inside a save"])
def test_a_run_killed_on_a_gpu_ends_bit_identical(where, gear, tmp_path, monkeypatch):
    from tests.support import kills

    monkeypatch.setenv("QLORA_GEAR", gear)
    result = kills.trial(tmp_path, where, random.Random(where))
    print(f"\n{gear}: {result}")
    assert result["kills"] == 1
    assert result["differing tensors"] == 0
