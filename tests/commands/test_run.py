"""The command that runs: its report, and what it refuses."""

import json
import os
import re
import subprocess
import sys

import pytest

from qlora_helpers import evaluation
from qlora_helpers.__main__ import main
from qlora_helpers.commands.run import _print_report


def call(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "qlora_helpers", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_run_reports_its_figures_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
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
    shortened = "Training for 2 steps, all of them warm-up (15 in a longer run) …"
    for words in (shortened, "4-bit weights", "exact match", "peak memory", report["adapter_path"]):
        assert words in first.stdout
    assert len(report["examples"]) == 3
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
    again = json.loads((tmp_path / "runs" / "latest" / "report.json").read_text())
    assert again.keys() == report.keys()
    assert {name for name in report if report[name] != again[name]} == {
        "train_seconds", "peak_memory_bytes", "total_seconds",
    }  # fmt: skip
    report = again

    monkeypatch.setattr(evaluation, "exact_match", lambda *args: 0.5)
    monkeypatch.setattr(evaluation, "loss", lambda *args: 1.0)
    assert main(["run", "--steps", "1", "--warmup-steps", "0"]) == 0
    assert "Training for 1 steps …" in capsys.readouterr().out
    kept = [path for path in (tmp_path / "runs").iterdir() if path.name != "latest"]
    assert len(kept) == 1
    assert json.loads((kept[0] / "report.json").read_text()) == report


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--steps", "0", "error: steps=0: must be a whole number, 1 or more"),
        ("--steps", "abc", "error: steps='abc': must be a whole number, 1 or more"),
        ("--steps", "1.5", "error: steps=1.5: must be a whole number, 1 or more"),
        ("--warmup-steps", "0.5", "error: warmup_steps=0.5: must be a whole number, 0 to 300, or None for 15"),
        ("--warmup-steps", "301", "error: warmup_steps=301: must be a whole number, 0 to 300, or None for 15"),
        ("--rank", "-1", "error: rank=-1: must be a whole number, 1 or more"),
        ("--schedule", "steep", "error: schedule='steep': choose one of linear, cosine, constant"),
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
        ("--optimizer", "adam_of_mine", "error: optimizer='adam_of_mine': choose one of adamw_torch, "),
        (
            "--target-modules",
            "q_proj,foo",
            "error: target_modules=['q_proj', 'foo']: 'foo' is no linear layer. There are q_proj, ",
        ),
        ("--max-length", "8", "error: max_length=8: the longest training chat has "),
    ],
)
def test_what_training_would_refuse_is_refused_before_anything_is_asked_or_moved(
    option, value, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluation, "exact_match", None)  # asking would fail
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


def test_the_printed_report_has_every_number_and_says_which_answers_are_right(tmp_path, capsys):
    example = {"question": "Where is the key?", "before": "nowhere", "right": "under the mat"}
    _print_report(
        {
            "trainable_parameters": 262_144, "all_parameters": 10_000_000, "exact_match_before": 0.0,
            "exact_match_after": 0.95, "test_chats": 500, "commonest_answer_rate": 0.014, "loss_before": 4.5,
            "loss_after": 0.1234, "train_seconds": 61.4, "total_seconds": 99.6, "peak_memory_bytes": 3 * 2**29,
            "adapter_path": "runs/latest/adapter",
            "examples": [example | {"after": "under the mat"}, example | {"after": "in the tree"}],
        },
        tmp_path / "report.json",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "262,144 of 10,000,000 (2.62%)" in said
    assert re.search(r"exact match +0\.0% +95\.0% +\(500 questions; always the commonest answer: 1\.4%\)", said)
    assert re.search(r"loss +4\.500 +0\.123 ", said) and "61 s of 100 s in all" in said and "1.50 GiB" in said
    assert re.findall(r"after +(.*)\n   (.*)", said) == [
        ("under the mat", "right"),
        ("in the tree", "wrong: under the mat"),
    ]
    assert f"report                {(tmp_path / 'report.json').as_posix()}" in said
