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


@pytest.mark.parametrize("find", [new_run_folder, unfinished_run_folder])
def test_runs_that_cannot_be_written_name_the_variable_and_the_cure(find, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"QLORA_RUNS='.*file' cannot be written to \(.+\): set QLORA_RUNS to a folder of your"
    ):
        find("a")
    monkeypatch.delenv("QLORA_RUNS")
    monkeypatch.setattr(files, "runs_folder", lambda: tmp_path / "file" / "runs")
    with pytest.raises(OSError, match=r"runs, where runs go, cannot be written to \(.+\): set QLORA_RUNS"):
        new_run_folder("a")


@pytest.mark.parametrize("find", [new_run_folder, unfinished_run_folder])
@pytest.mark.parametrize("name", ["", "a/b", "/"])
def test_a_run_has_a_plain_name(find, name, runs):
    with pytest.raises(ValueError, match=f"name='{name}': pass the plain name of a folder"):
        find(name)
    assert not runs.exists()


def test_data_that_are_not_there_name_the_variable_that_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"data/chats/no\.jsonl is not in QLORA_DATA='.*': set it to .*, or unset it"
    ):
        data_path("chats", "no.jsonl")


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


@pytest.mark.parametrize("folder", [".", "..", "/", "here/..", "../here"])
def test_the_working_folder_is_not_replaced(folder, tmp_path, monkeypatch):
    (tmp_path / "here" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        ValueError, match=rf"folder='{folder}' is the folder you are in, or one above it: name one below it"
    ):
        whole_folder(folder, overwrite=True).__enter__()
    assert settle(folder).resolve() == (tmp_path / "here" / folder).resolve()  # to read from


def test_a_link_is_kept_and_what_it_leads_to_replaced(tmp_path):
    folder = filled(tmp_path / "adapter", "old")
    (tmp_path / "link").symlink_to(folder)
    with whole_folder(tmp_path / "link", overwrite=True) as part:
        (part / "weights").write_text("new")
    assert (tmp_path / "link").is_symlink() and (folder / "weights").read_text() == "new"


def test_a_user_s_own_old_folder_is_left_alone(tmp_path):
    folder, backup = filled(tmp_path / "adapter", "old"), filled(tmp_path / "adapter.old", "older")
    with whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("new")
    assert (backup / "weights").read_text() == "older"


def test_a_folder_that_cannot_be_written_names_the_argument_and_the_cure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"folder='.*file/adapter' cannot be written to \(.+\): name a folder of your own; set QLORA"
    ):
        whole_folder(tmp_path / "file" / "adapter").__enter__()


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
    folder, _ = filled(tmp_path / "adapter", "new"), filled(tmp_path / f"adapter{files.OLD}", "old")
    assert (settle(folder) / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
