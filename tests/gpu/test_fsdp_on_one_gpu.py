"""A sharded run of one process, which needs one GPU: nothing is split, and all else is as on several."""

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT


def run(folder, *launcher: str, options: tuple[str, ...] = ()) -> dict:
    command = [
        sys.executable,
        *launcher,
        "-m",
        "qlora_helpers",
        "run",
        "--steps",
        "60",
        "--output",
        str(folder),
        *options,
    ]
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "4", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4_000:]
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["fsdp", "fsdp_offload"])
def test_a_sharded_run_of_one_process_learns_what_a_plain_one_learns(name, tmp_path):
    config = str(ROOT / "data" / "accelerate" / f"{name}.yaml")
    plain = run(tmp_path / "plain", options=("--optimizer", "adamw_torch"))
    launcher = ("-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "1")
    sharded = run(tmp_path / "sharded", *launcher, options=("--optimizer", "adamw_torch"))
    assert sharded["settings"]["sharding"] == "fsdp"
    assert sharded["settings"]["cpu_offload"] is (name == "fsdp_offload")
    assert sharded["trainable_parameters"] == plain["trainable_parameters"]
    assert sharded["all_parameters"] == plain["all_parameters"]
    for (_, a), (step, b) in zip(plain["loss_history"], sharded["loss_history"], strict=True):
        assert a == pytest.approx(b, abs=0.1), step  # bfloat16, without autocast's float32 parts
    from safetensors.torch import load_file

    one, other = (
        load_file(tmp_path / which / "adapter" / "adapter_model.safetensors") for which in ("plain", "sharded")
    )
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    assert all(value.isfinite().all() for value in other.values())
