"""A run of two processes with a GPU each: it learns what one learns, whole or sharded, and a killed one is resumed.

Where there is one GPU the two share it (`data.scripts.measure.shared_gpu`), and only what needs two is skipped.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qlora_helpers.training.run_folder import steps_saved
from tests import ROOT
from tests.gpu.conftest import ALL_GPUS
from tests.support.short_runs import adapter, differing

GPUS = os.environ.get(ALL_GPUS, "0").split(",")
STEPS = 300
FEW = 250  # steps of a run that is killed soon after its first checkpoint, at step 100


def command(launcher: list[str], folder: Path, *options: str) -> list[str]:
    """The course's own run, launched so."""
    share = ["-m", "data.scripts.measure.shared_gpu"] if launcher and len(GPUS) < 2 else ["-m"]
    return [sys.executable, *launcher, *share, "qlora_helpers", "run", "--output", str(folder), *options]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(GPUS), "OMP_NUM_THREADS": "4", "HF_HUB_OFFLINE": "1"} | more


def run(launcher: list[str], folder: Path, *options: str, steps: int = STEPS, **variables: str) -> dict:
    """The report of the course's own run, launched so."""
    whole = command(launcher, folder, "--steps", str(steps), *options)
    ended = subprocess.run(
        whole, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4_000:]
    print(ended.stdout[-1_500:])
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def killed(launcher: list[str], folder: Path, *options: str) -> None:
    """Kill all processes of a run soon after its first checkpoint."""
    whole = command(launcher, folder, "--steps", str(FEW), *options)
    process = psutil.Popen(whole, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not (folder.is_dir() and steps_saved(folder)):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    for each in [*process.children(recursive=True), process]:
        each.kill()
    process.wait()
    assert not (folder / "adapter").exists() and steps_saved(folder) < FEW


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run([], tmp_path_factory.mktemp("one") / "run", CUDA_VISIBLE_DEVICES=GPUS[0])


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def accelerate(name: str) -> list[str]:
    config = str(ROOT / "data" / "accelerate" / f"{name}.yaml")
    return ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]  # any free port


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
    sharded = run(accelerate(name), tmp_path / "run")
    assert sharded["settings"]["sharding"] == "fsdp" and sharded["scores"] is None
    for (_, a), (step, b) in zip(one["loss_history"], sharded["loss_history"], strict=True):
        assert a == pytest.approx(b, abs=0.15), step
    assert sharded["loss_history"][-1][1] < one["loss_history"][0][1] / 2


@pytest.mark.parametrize("name", ["two_gpus", "fsdp"])
def test_a_killed_run_goes_on_bit_for_bit_and_on_one_gpu_within_rounding(name, tmp_path):
    launcher = accelerate(name)
    options = ("--optimizer", "adamw_torch") if name == "fsdp" else ()
    whole = run(launcher, tmp_path / "whole", *options, steps=FEW)
    killed(launcher, tmp_path / "again", *options)
    shutil.copytree(tmp_path / "again", tmp_path / "fewer")
    run(launcher, tmp_path / "again", *options, "--resume", steps=FEW)
    assert differing(adapter(tmp_path / "again" / "adapter"), adapter(tmp_path / "whole" / "adapter")) == []
    one = [*launcher, "--num_processes", "1"] if name == "fsdp" else []
    fewer = run(one, tmp_path / "fewer", *options, "--resume", steps=FEW, CUDA_VISIBLE_DEVICES=GPUS[0])
    assert (whole["settings"]["num_gpus"], fewer["settings"]["num_gpus"]) == (2, 1)
    for (_, a), (step, b) in zip(whole["loss_history"], fewer["loss_history"], strict=True):
        assert a == pytest.approx(b, abs=0.15), step


@pytest.mark.skipif(len(GPUS) < 2, reason="needs two GPUs that torch can see")
def test_two_gpus_and_one_process_are_refused_with_the_command_that_uses_both(tmp_path):
    alone = command([], tmp_path / "run")
    ended = subprocess.run(alone, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    count = len(GPUS)
    assert f"{count} GPUs are visible and one process was started: torchrun --nproc-per-node {count}" in ended.stderr
