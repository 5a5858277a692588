"""Ctrl-C during a run: its step is saved, a message says how to continue, and the run ends as if uninterrupted."""

import os
import shlex
import signal
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from trl import SFTTrainer

from qlora_helpers import evaluation
from qlora_helpers.__main__ import main
from qlora_helpers.commands import run_data
from qlora_helpers.models import loading as models
from qlora_helpers.settings import Settings
from qlora_helpers.training.interrupts import Interrupted, StopWhenAsked
from qlora_helpers.training.run_folder import steps_saved
from tests.support.short_runs import CHATS, SHORT, adapter, differing, run

WITHOUT_CHECKPOINTS = Settings(**{**vars(SHORT), "save_steps": None})


def interrupting(monkeypatch, at, times=1, number=signal.SIGINT):
    """During the step after `at` finished ones, this process gets a signal `times` times."""
    step, came = SFTTrainer.training_step, []

    def interrupted(self, *args, **options):
        while self.state.global_step == at and len(came) < times:
            came.append(number)
            signal.raise_signal(number)
        return step(self, *args, **options)

    monkeypatch.setattr(SFTTrainer, "training_step", interrupted)
    return came


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished"), WITHOUT_CHECKPOINTS)


# ---- train()


def test_an_interrupted_step_is_saved_and_the_run_ends_as_if_nothing_had_happened(
    finished, tmp_path, monkeypatch, capsys
):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupting(monkeypatch, at=1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path, WITHOUT_CHECKPOINTS)
    assert type(stopped.value) is Interrupted and stopped.value.signal == signal.SIGINT
    assert "stopped after step 2 of 6, which is saved. To continue, load" in str(stopped.value)
    assert f"call train with {str(tmp_path)!r} and resume=True" in str(stopped.value)
    assert stopped.value._render_traceback_() == [f"KeyboardInterrupt: {stopped.value}"]
    assert "Stopping at the end of this step" in capsys.readouterr().err
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert steps_saved(tmp_path) == 2
    assert not (tmp_path / "adapter").exists()
    resumed = run(tmp_path, WITHOUT_CHECKPOINTS, resume=True)
    assert differing(adapter(resumed.saved_path), adapter(finished.saved_path)) == []
    assert resumed.history == finished.history


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    came = interrupting(monkeypatch, at=4, times=2)
    with pytest.raises(
        Interrupted, match=r"stopped in step 5 of 6; the last checkpoint is that of step 3. To continue, "
    ):
        run(tmp_path)
    assert len(came) == 2 and steps_saved(tmp_path) == 3


def test_a_second_interrupt_before_anything_was_saved_says_so(tmp_path, monkeypatch):
    interrupting(monkeypatch, at=0, times=2)
    with pytest.raises(Interrupted, match=r"stopped in step 1 of 6; nothing was saved"):
        run(tmp_path, progress_bar=True)


def test_an_interrupt_in_the_last_step_lets_the_run_end(finished, tmp_path, monkeypatch):
    interrupting(monkeypatch, at=5, number=signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"after the last of 6 steps; what was trained is in .*adapter") as stopped:
        run(tmp_path, WITHOUT_CHECKPOINTS)
    assert stopped.value.finished and stopped.value.signal == signal.SIGTERM
    assert differing(adapter(tmp_path / "adapter"), adapter(finished.saved_path)) == []


def test_a_process_that_ignores_interrupts_is_left_alone(monkeypatch):
    """Such as a background job of a script, which Ctrl-C must not reach."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopWhenAsked() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_trains_without_signals():
    kept = []

    def work():
        with StopWhenAsked() as stop:
            kept.append((stop.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert kept == [(None, signal.default_int_handler)]


# ---- python -m qlora_helpers run, in this process


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """With few chats, and without the questions, which take the most time."""
    read = run_data.read_run_data
    monkeypatch.setattr(
        run_data, "read_run_data", lambda *args: replace(data := read(*args), training=CHATS, asked=data.asked[:3])
    )
    monkeypatch.setattr(evaluation, "measure_knowledge", lambda *args: None)
    monkeypatch.setattr(evaluation, "forgetting", lambda *args: SimpleNamespace(as_dict=dict, verdict="kept"))
    monkeypatch.chdir(tmp_path)


def test_the_printed_command_continues_to_the_same_end(quick, tmp_path, monkeypatch, capsys):
    assert main(["run", "--output", "whole", "--steps", "4"]) == 0
    with monkeypatch.context() as patch:
        interrupting(patch, at=1)
        assert main(["run", "--output", "a run", "--steps", "4"]) == 130
    told = capsys.readouterr().err
    said, command = told[told.index("Stopped") :].splitlines()
    assert said == "Stopped after step 2 of 4, which is saved. To continue:"
    python, *words = shlex.split(command)
    assert words == ["-m", "qlora_helpers", "run", "--resume", "--output", "a run"]  # the run's record has the steps
    assert os.path.samefile(python, sys.executable)
    assert main(words[2:]) == 0
    assert "after step 2 of 4" in capsys.readouterr().out
    assert differing(adapter(tmp_path / "a run" / "adapter"), adapter(tmp_path / "whole" / "adapter")) == []


def stop(*args, **options):
    raise KeyboardInterrupt


def test_an_interrupt_before_the_training_is_a_sentence_and_the_command(quick, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_tokenizer", stop)
    assert main(["run", "--output", "new"]) == 130
    said, command = capsys.readouterr().err.strip().splitlines()
    assert said == "Stopped before the first step of training. To continue:"
    assert command.endswith("-m qlora_helpers run --output new")


def test_an_interrupt_after_the_training_says_where_the_adapter_is(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "forgetting", stop)
    assert main(["run", "--output", "new", "--steps", "1"]) == 130
    said = capsys.readouterr().err
    assert "\nStopped after the training; what was trained is in new. To continue:\n" in said
    assert said.endswith("run --resume --output new\n")


def test_an_interrupt_of_another_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("qlora_helpers.commands.doctor.examine", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\nStopped by Ctrl-C.\n"
