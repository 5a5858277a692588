"""A run on two GPUs: it learns what one GPU learns, whole or sharded, and is launched as README says. Needs two GPUs."""

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.gpu.conftest import ALL_GPUS

GPUS = os.environ.get(ALL_GPUS, "").split(",")
pytestmark = pytest.mark.skipif(len(GPUS) < 2, reason="needs two GPUs that torch can see")
STEPS = 300


def run(launcher: list[str], folder, *options: str, **environment: str) -> dict:
    """The report of the course's own run, launched so."""
    command = [
        sys.executable,
        *launcher,
        "-m",
        "qlora_helpers",
        "run",
        "--steps",
        str(STEPS),
        "--output",
        str(folder),
        *options,
    ]
    several = {"CUDA_VISIBLE_DEVICES": ",".join(GPUS), "OMP_NUM_THREADS": "4", "HF_HUB_OFFLINE": "1"}
    variables = os.environ | several | environment
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4_000:]
    print(ended.stdout[-1_500:])
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run([], tmp_path_factory.mktemp("one") / "run", CUDA_VISIBLE_DEVICES=GPUS[0])


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def test_two_gpus_reach_the_score_of_one(one, tmp_path):
    two = run(torchrun(2), tmp_path / "run")
    assert (two["settings"]["num_gpus"], two["settings"]["sharding"]) == (2, None)
    (_, first), (_, other) = one["loss_history"][0], two["loss_history"][0]
    assert other == pytest.approx(first, rel=2e-3)
    noise = 3 * one["scores"]["after"]["exact_match_error"]
    assert two["scores"]["after"]["exact_match"] == pytest.approx(one["scores"]["after"]["exact_match"], abs=noise)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_offload"])
def test_two_gpus_with_a_sharded_model_learn_the_same(name, one, tmp_path):
    """In bfloat16, and with torch's AdamW in place of the 8-bit one: so the losses agree in their first digits."""
    config = str(ROOT / "data" / "accelerate" / f"{name}.yaml")
    sharded = run(["-m", "accelerate.commands.launch", "--config_file", config], tmp_path / "run")
    assert sharded["settings"]["sharding"] == "fsdp" and sharded["scores"] is None
    for (_, a), (step, b) in zip(one["loss_history"], sharded["loss_history"], strict=True):
        assert a == pytest.approx(b, abs=0.15), step
    assert sharded["loss_history"][-1][1] < one["loss_history"][0][1] / 2


def test_two_gpus_and_one_process_are_refused_with_the_command_that_uses_both(tmp_path):
    command = [sys.executable, "-m", "qlora_helpers", "run", "--output", str(tmp_path / "run")]
    several = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(GPUS)}
    ended = subprocess.run(command, cwd=ROOT, env=several, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    count = len(GPUS)
    assert f"{count} GPUs are visible and one process was started: torchrun --nproc-per-node {count}" in ended.stderr
