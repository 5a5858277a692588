"""`python -m qlora_helpers`: the run with its report, and the doctor."""

import json
import os
import subprocess
import sys


def call(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "qlora_helpers", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_run_reports_its_figures_and_overwrites_nothing(tmp_path):
    first = call("run", "--steps", 2, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    report = json.loads((tmp_path / "runs" / "latest" / "report.json").read_text())
    wanted = {
        "exact_match_before", "exact_match_after", "loss_before", "loss_after", "trainable_parameters",
        "train_seconds", "total_seconds", "peak_memory_bytes", "adapter_path",
    }  # fmt: skip
    assert wanted <= set(report)
    assert report["trainable_parameters"] == 262_144
    assert report["loss_after"] < report["loss_before"]
    assert 0 < report["train_seconds"] < report["total_seconds"]
    assert report["peak_memory_bytes"] > 2**28
    assert (tmp_path / report["adapter_path"] / "adapter_model.safetensors").exists()
    for words in ("4-bit weights", "exact match", "peak memory", report["adapter_path"]):
        assert words in first.stdout
    assert len(report["examples"]) == 3
    # the only thing on stderr is the progress bar
    assert all("step" in line for line in first.stderr.replace("\r", "\n").splitlines() if line.strip())

    finished = call("run", "--steps", 2, "--resume", cwd=tmp_path)
    assert finished.returncode == 2
    assert "finished" in finished.stderr

    second = call("run", "--steps", 1, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    kept = [path for path in (tmp_path / "runs").iterdir() if path.name != "latest"]
    assert len(kept) == 1
    assert json.loads((kept[0] / "report.json").read_text()) == report


def test_doctor_finds_nothing_wrong_here(tmp_path):
    done = call("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gear" in done.stdout
    assert "nothing stands in the way" in done.stdout


def test_doctor_names_what_is_wrong_and_the_cure(tmp_path):
    done = call("doctor", cwd=tmp_path, QLORA_GEAR="warp")
    assert done.returncode == 1
    assert "QLORA_GEAR='warp'" in done.stdout
    assert "cpu, t4, ampere" in done.stdout
