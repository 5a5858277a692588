"""Where runs go, that none is overwritten, and that a folder is there in whole or not at all."""

import signal
import subprocess
import sys

import pytest

from qlora_helpers import files
from qlora_helpers.files import data_path, new_run_folder, settle, unfinished_run_folder, whole_folder


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
    assert files.runs_folder() == data_path().parent / "runs"
    (tmp_path / "MyDrive").mkdir()
    assert new_run_folder("a") == tmp_path / "MyDrive" / "qlora-runs" / "a-1"


def test_qlora_runs_comes_first(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DRIVE", tmp_path)
    assert new_run_folder("a") == runs / "a-1"


# Folders that appear in whole


def filled(folder, content):
    folder.mkdir()
    (folder / "weights").write_text(content)
    return folder


def test_a_new_folder_appears_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "adapter") as part:
        (part / "weights").write_text("new")
        assert not (tmp_path / "adapter").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "weights").read_text() == "new"


def test_a_folder_that_is_there_is_kept_unless_one_says_otherwise(tmp_path):
    folder = filled(tmp_path / "adapter", "old")
    with pytest.raises(
        FileExistsError, match=r"folder='.*adapter' is there already: name a new one, or pass overwrite=True"
    ):
        whole_folder(folder).__enter__()
    assert (folder / "weights").read_text() == "old"
    with whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("new")
        assert (folder / "weights").read_text() == "old"
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_error_while_writing_leaves_the_old_folder_whole(tmp_path):
    folder = filled(tmp_path / "adapter", "old")
    with pytest.raises(OSError, match="disk full"), whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("ne")
        raise OSError("disk full")
    assert (folder / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


KILL = """
import os, pathlib, signal, sys
from qlora_helpers import files
rename, folder, at = pathlib.Path.rename, pathlib.Path(sys.argv[1]), int(sys.argv[2])
renamed = []
def killing(self, target):
    if len(renamed) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    renamed.append(target)
    return rename(self, target)
pathlib.Path.rename = killing
with files.whole_folder(folder, overwrite=True) as part:
    (part / "weights").write_text("new")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("at", [0, 1])
def test_a_kill_while_a_folder_is_replaced_loses_nothing(tmp_path, at):
    folder = filled(tmp_path / "adapter", "old")
    killed = subprocess.run([sys.executable, "-c", KILL, str(folder), str(at)])
    assert killed.returncode == -signal.SIGKILL
    assert folder.exists() is (at == 0)  # between the two renames the name is free for a moment
    assert (settle(folder) / "weights").read_text() == "old"
    with whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_kill_behind_both_renames_leaves_the_new_folder(tmp_path):
    folder, _ = filled(tmp_path / "adapter", "new"), filled(tmp_path / "adapter.old", "old")
    assert (settle(folder) / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
