"""Several processes make one run: it learns what one process learns, one of them prints and writes, and a fault ends all."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from qlora_helpers.hardware import Hardware
from qlora_helpers.launch import Launch
from qlora_helpers.training import together as module
from qlora_helpers.training.together import ALONE, Together, check_launch, silent_unless_first
from tests.support.launched import STEPS, a_run, found, launch, work
from tests.support.short_runs import CPU, adapter, differing

GPU = Hardware("ampere", "gear", "a GPU", 24 * 2**30, (8, 0), True, 8, 2**36)
MOST = 2e-3  # by which adapters may differ, as a share of their norm


def assert_alike(one: dict, other: dict, losses: float = 1e-4) -> None:
    """The same chats in the same order: the losses of all steps and evaluations agree within rounding, and the adapters."""
    for name in ("step_losses", "validation_history", "history", "gradient_norms"):
        assert [step for step, _ in one[name]] == [step for step, _ in other[name]], name
        for (_, a), (step, b) in zip(one[name], other[name], strict=True):
            assert a == pytest.approx(b, rel=losses), (name, step)
    for name in ("best_step", "stopped_early", "trainable_parameters", "all_parameters"):
        assert one[name] == other[name]
    first, second = (adapter(Path(run["saved"])) for run in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= MOST * tensor.norm(), name


def test_two_processes_learn_what_one_learns_and_the_first_prints_and_writes(tmp_path):
    code, out, err = work(2, tmp_path, "two")
    assert code == 0, err
    assert out.count("The validation loss was lowest at step") == 1
    assert out.count("validation chats begin with a question that is trained on") == 1
    one, two = a_run(tmp_path / "one", {}), found(tmp_path, "two")
    assert_alike(one, two)
    assert len(one["step_losses"]) == STEPS
    first, second = two.pop("launch"), found(tmp_path, "two", rank=1)
    assert (first["processes"], first["rank"]) == (2, 0)
    assert second.pop("launch")["rank"] == 1 and second == two  # all of them know all of it
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    checkpoint = tmp_path / "two" / f"checkpoint-{STEPS}"
    assert {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    said = json.loads((checkpoint / "checksums.json").read_text(encoding="utf-8"))
    assert said["processes"] == 2 and {"rng_state_0.pth", "rng_state_1.pth"} <= said["files"].keys()
    record = json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))
    assert record["environment"]["processes"] == 2
    alone = json.loads((tmp_path / "one" / "run.json").read_text(encoding="utf-8"))
    assert "processes" not in alone["environment"]  # as it was before there were several
    assert {**record, "environment": None} == {**alone, "environment": None}


# A second process that computes nothing, or a mean over its own tokens, shows in each of these.
WAYS = {
    "packed": {"packing": True},
    "accumulated": {"accumulation": 2, "steps": 4},
    "packed_in_parts": {"packing": True, "accumulation": 2, "steps": 4, "max_length": 48},
    "checkpointed": {"gradient_checkpointing": True},
    "best": {"learning_rate": 1e-2, "eval_steps": 1, "patience": 2, "steps": 12},
}


@pytest.mark.everything
def test_in_each_way_two_processes_learn_what_one_learns(tmp_path):
    code, _, err = work(2, tmp_path, *(f"{name}:{json.dumps(changed)}" for name, changed in WAYS.items()))
    assert code == 0, err
    for name, changed in WAYS.items():
        assert_alike(a_run(tmp_path / f"one-{name}", dict(changed)), found(tmp_path, name), losses=1e-3)


@pytest.mark.everything
def test_the_processes_drop_out_different_inputs(tmp_path):
    """With the same chats in both shares, equal dropout would give equal losses in both."""
    code, _, err = work(2, tmp_path, 'dropped:{"dropout": 0.3}', 'again:{"dropout": 0.3}')
    assert code == 0, err
    dropped, again = found(tmp_path, "dropped"), found(tmp_path, "again")
    assert dropped["step_losses"] == again["step_losses"]
    states = [
        torch.load(tmp_path / "dropped" / f"checkpoint-{STEPS}" / f"rng_state_{rank}.pth", weights_only=False)["cpu"]
        for rank in (0, 1)
    ]
    assert not torch.equal(*states)


@pytest.mark.everything
@pytest.mark.parametrize("killed", [1, -1], ids=["one", "both"])
def test_a_killed_run_is_resumed_bit_for_bit_and_on_one_process_within_rounding(killed, tmp_path):
    drop = {"dropout": 0.1}
    code, _, err = work(2, tmp_path, f"whole:{json.dumps(drop)}")
    assert code == 0, err
    begun = time.monotonic()
    code, _, _ = work(2, tmp_path, f"cut:{json.dumps(drop | {'dies': [killed, 4]})}")
    assert code != 0 and time.monotonic() - begun < 120
    assert not (tmp_path / "cut" / "adapter").exists() and (tmp_path / "cut" / "checkpoint-3").is_dir()
    code, out, err = work(2, tmp_path, f"cut:{json.dumps(drop | {'resume': True})}")
    assert code == 0, err
    assert "another environment" not in out
    assert differing(adapter(tmp_path / "cut" / "adapter"), adapter(tmp_path / "whole" / "adapter")) == []


@pytest.mark.everything
def test_a_run_of_two_processes_is_resumed_by_one_and_the_other_way_round(tmp_path, capsys):
    for name, killed in (("two", 1), ("one", 0)):
        code, _, _ = work(2 if name == "two" else 1, tmp_path, f'{name}:{{"dies": [{killed}, 4]}}')
        assert code != 0 and (tmp_path / name / "checkpoint-3").is_dir()
    whole = a_run(tmp_path / "whole", {})
    resumed = a_run(tmp_path / "two", {}, resume=True)
    assert "processes was 2 and is now 1" in capsys.readouterr().out
    code, out, err = work(2, tmp_path, 'one:{"resume": true}')
    assert code == 0, err
    assert "processes was 1 and is now 2" in out
    for other in (resumed, found(tmp_path, "one")):
        assert other["step_losses"][0][0] > 3  # the rest alone
        assert_alike(whole | {"step_losses": whole["step_losses"][-len(other["step_losses"]) :]}, other)


@pytest.mark.everything
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    code, _, err = work(2, tmp_path, 'stopped:{"stops": 1}')
    assert code == 0, err
    for rank in (0, 1):
        said = found(tmp_path, "stopped", rank)
        assert said["interrupted"] == f"after step 2 of {STEPS}, which is saved", rank
        assert said["signal"] == signal.SIGTERM
    assert (tmp_path / "stopped" / "checkpoint-2" / "checksums.json").is_file()
    assert "Stopping at the end of this step" not in err  # the first process got no signal


@pytest.mark.everything
def test_a_fault_of_the_folder_is_raised_in_all_processes(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").write_text("mine", encoding="utf-8")
    code, _, err = work(2, tmp_path, "foreign")
    assert code == 0, err
    said = [found(tmp_path, "foreign", rank)["error"] for rank in (0, 1)]
    assert said[0] == said[1] and "holds 'mine.txt' but no run of this course" in said[0]


@pytest.mark.everything
def test_ctrl_c_at_the_launcher_stops_the_command_after_a_step_and_it_can_be_continued(tmp_path):
    folder = tmp_path / "run"
    options = ["--steps", "40", "--batch-size", "4", "--rank", "4", "--output", str(folder)]
    process = launch(2, "qlora_helpers", "run", *options)
    for line in process.stderr:  # the progress bar, a line for each step
        if re.search(r"\b[1-9]\d*/40\b", line):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    saved = re.findall(r"Stopped after step (\d+) of 40, which is saved\.", err)
    assert len(saved) == 1, err
    assert (folder / f"checkpoint-{saved[0]}" / "checksums.json").is_file()
    assert "To continue:" in err and "run --resume --output" in err


# ---- Without a launch


def test_alone_nothing_is_exchanged():
    assert (ALONE.largest(3), ALONE.from_first(lambda: "made")) == (3, "made")
    values = torch.ones(2)
    assert ALONE.summed(values) is values
    ALONE.wait()


def test_an_error_that_cannot_be_sent_is_sent_in_words():
    class Odd(ValueError):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    assert str(module._sendable(Odd(1, 2))) == "Odd: 1 and 2"
    assert type(module._sendable(FileExistsError("there"))) is FileExistsError


def test_only_the_first_process_prints(capsys):
    for rank in (0, 1):
        with silent_unless_first(Launch(2, rank, rank)):
            print(f"from {rank}")
    assert capsys.readouterr().out == "from 0\n"


REFUSED = [
    (Launch(), CPU, 0, {}, None),
    (Launch(4, 1, 1), CPU, 0, {"LOCAL_RANK": "1"}, None),
    (Launch(2, 0, 0, "fsdp"), CPU, 0, {"LOCAL_RANK": "0"}, "sharding='fsdp': accelerate shards on GPUs alone, and this run is on a CPU"),
    (Launch(), GPU, 1, {}, None),
    (Launch(2, 0, 0), GPU, 2, {"LOCAL_RANK": "0"}, None),
    (Launch(1, 0, 0), GPU, 2, {"LOCAL_RANK": "0"}, None),  # launched, so on purpose
    (Launch(3, 0, 0), GPU, 2, {"LOCAL_RANK": "0"}, "3 processes were launched, and 2 GPUs can be seen"),
    (Launch(), GPU, 2, {}, "2 GPUs are visible and one process was started: torchrun --nproc-per-node 2 -m qlora_helpers run … uses all "
     "of them, CUDA_VISIBLE_DEVICES=0 before the command one"),
]  # fmt: skip


@pytest.mark.parametrize(("launched", "hardware", "gpus", "environment", "said"), REFUSED)
def test_a_launch_that_does_not_do_what_it_says_is_refused(launched, hardware, gpus, environment, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if said is None:
        check_launch(launched, hardware)
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        check_launch(launched, hardware)


def test_in_a_notebook_with_two_gpus_the_first_is_used_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    check_launch(Launch(), GPU)
    assert (
        "2 GPUs are visible and one process was started, this notebook's. The run uses the first GPU"
        in capsys.readouterr().out
    )


def test_a_group_says_which_process_it_is_of():
    assert Together(Launch(2, 1, 1)).launch.leads is False
