"""Where runs go, and that none is overwritten."""

import pytest

from qlora_helpers import files
from qlora_helpers.files import data_path, new_run_folder, unfinished_run_folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_each_new_folder_has_the_next_number(runs):
    assert [new_run_folder("a"), new_run_folder("a"), new_run_folder("b")] == [runs / "a-1", runs / "a-2", runs / "b-1"]


def test_an_unfinished_run_is_found_again_and_a_finished_one_is_not(runs):
    first = unfinished_run_folder("a")
    assert first == runs / "a-1"
    assert unfinished_run_folder("a") == runs / "a-2"  # nothing was begun in the first
    (first / "run.json").touch()
    assert unfinished_run_folder("a") == first
    (first / "adapter").mkdir()
    assert unfinished_run_folder("a") == first  # empty: what was in it was lost
    (first / "adapter" / "adapter_config.json").touch()
    assert unfinished_run_folder("a") == runs / "a-3"


def test_of_several_unfinished_runs_the_newest_is_taken_by_number(runs):
    for number in (2, 10, 9):
        (runs / f"a-{number}").mkdir(parents=True)
        (runs / f"a-{number}" / "run.json").touch()
    (runs / "a-b-11").mkdir()
    (runs / "a-b-11" / "run.json").touch()
    assert unfinished_run_folder("a") == runs / "a-10"


def test_google_drive_is_used_when_it_is_mounted(tmp_path, monkeypatch):
    monkeypatch.delenv("QLORA_RUNS")
    monkeypatch.setattr(files, "DRIVE", tmp_path / "MyDrive")
    assert files._runs() == data_path().parent / "runs"
    (tmp_path / "MyDrive").mkdir()
    assert new_run_folder("a") == tmp_path / "MyDrive" / "qlora-runs" / "a-1"


def test_qlora_runs_comes_first(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DRIVE", tmp_path)
    assert new_run_folder("a") == runs / "a-1"
