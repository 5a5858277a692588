"""The command that runs: its report, and what it refuses."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from qlora_helpers import evaluation
from qlora_helpers.__main__ import main
from qlora_helpers.commands import run_data


def call(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "qlora_helpers", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_run_reports_its_figures_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    first = call("run", "--steps", 2, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    report = json.loads((tmp_path / "runs" / "latest" / "report.json").read_text())
    assert report["trainable_parameters"] == 262_144
    before, after = (report["scores"][when] for when in ("before", "after"))
    assert after["loss"] < before["loss"] and before["short_rows"] == report["test_rows"] == 500
    assert report["forgetting"]["facts"] == 500 and report["forgetting"]["verdict"]
    assert report["model"] == "tiny-llama" and report["data_rows"] == 4_800
    assert 0 < report["train_seconds"] < report["total_seconds"]
    assert report["peak_memory_bytes"] > 2**28
    assert (tmp_path / report["adapter_path"] / "adapter_model.safetensors").exists()
    shortened = "Training for 2 steps, all of them warm-up (15 in a longer run) …"
    for words in (shortened, "4-bit weights", "exact match", "peak memory", report["adapter_path"]):
        assert words in first.stdout
    assert len(report["scores"]["first"]) == 3
    card = (tmp_path / report["adapter_path"] / "README.md").read_text(encoding="utf-8")
    assert "tiny-llama, tuned" in card and "| optimizer steps | 2 |" in card
    # the only thing on stderr is the progress bar
    assert all("step" in line for line in first.stderr.replace("\r", "\n").splitlines() if line.strip())

    # the next two run in this process, which has the libraries loaded, and without asking the questions
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--resume"]) == 2
    assert "finished. Leave out --resume" in capsys.readouterr().err

    # killed after the adapter was saved and before the report was: the report is made, and tells what it can
    (tmp_path / "runs" / "latest" / "report.json").unlink()
    assert main(["run", "--resume"]) == 0
    assert "training              not known: the run was stopped before its report" in capsys.readouterr().out
    remade = json.loads((tmp_path / "runs" / "latest" / "report.json").read_text())
    again = copy.deepcopy(remade)
    assert again.keys() == report.keys()
    for found in (report, again):
        del found["scores"]["before"]["seconds"], found["scores"]["after"]["seconds"]
    assert {name for name in report if report[name] != again[name]} == {
        "train_seconds", "peak_memory_bytes", "total_seconds",
    }  # fmt: skip

    read = run_data.read_run_data
    monkeypatch.setattr(run_data, "read_run_data", lambda *args: replace(data := read(*args), asked=data.asked[:3]))
    assert main(["run", "--steps", "1", "--warmup-steps", "0"]) == 0
    assert "Training for 1 steps …" in capsys.readouterr().out
    kept = [path for path in (tmp_path / "runs").iterdir() if path.name != "latest"]
    assert len(kept) == 1
    assert json.loads((kept[0] / "report.json").read_text()) == remade


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--steps", "0", "error: --steps=0: must be a whole number, 1 or more"),
        ("--steps", "abc", "error: --steps='abc': must be a whole number, 1 or more"),
        ("--steps", "1.5", "error: --steps=1.5: must be a whole number, 1 or more"),
        ("--warmup-steps", "0.5", "error: --warmup-steps=0.5: must be a whole number, 0 to 300, or None for 15"),
        ("--warmup-steps", "301", "error: --warmup-steps=301: must be a whole number, 0 to 300, or None for 15"),
        ("--rank", "-1", "error: --rank=-1: must be a whole number, 1 or more"),
        ("--schedule", "steep", "error: --schedule='steep': choose one of linear, cosine, constant"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_loaded(option, value, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("qlora_helpers.commands.run._load_and_run")
    assert main(["run", "--output", str(tmp_path / "new"), option, value]) == 2
    assert capsys.readouterr().err.strip().startswith(said)
    assert not (tmp_path / "new").exists()


# ---- memory: run in this process, which is quicker; the command runs main()


def report(capsys, *arguments):
    """Exit status, standard output and standard error of `python -m qlora_helpers memory`."""
    status = main(["memory", *map(str, arguments)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--optimizer", "adam_of_mine", "error: --optimizer='adam_of_mine': choose one of adamw_torch, "),
        (
            "--target-modules",
            "q_proj,foo",
            "error: --target-modules=q_proj,foo: 'foo' is no linear layer. There are q_proj, ",
        ),
        ("--max-length", "8", "error: --max-length=8: the longest training chat has "),
    ],
)
def test_what_training_would_refuse_is_refused_before_anything_is_asked_or_moved(
    option, value, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluation, "score", None)  # asking would fail
    old = tmp_path / "old"
    old.mkdir()
    (old / "run.json").write_text(json.dumps({"steps": 6, "chats": "0", "model": "tiny-llama", "compute_dtype": "x"}))
    for output in (tmp_path / "new", old):
        assert main(["run", "--output", str(output), option, value]) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (old / "run.json").exists()


def test_an_empty_name_of_a_folder_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--output", ""])
    assert "'' is not a folder: name one, such as runs/latest" in capsys.readouterr().err
