"""Every figure of every lesson is legible: the lessons are run, and their figures looked at as they are rendered."""

import os
import subprocess
import sys

import pytest

from notebooks.scripts import build
from tests import ROOT


@pytest.mark.everything
@pytest.mark.parametrize("name", build.lessons())
def test_the_figures_of_a_lesson_have_no_fault(name, tmp_path):
    environment = os.environ | {"QLORA_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.notebooks.lesson_figures", name[:2]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=1800)
    figures = [line for line in done.stdout.splitlines() if line.startswith(f"figure {int(name[:2])}.")]
    assert done.returncode == 0 and figures, "\n".join([*figures, done.stderr[-2000:]])
