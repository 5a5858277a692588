"""A folder appears complete or not at all."""

import signal
import subprocess
import sys

import pytest

from qlora_helpers import safe_folders
from qlora_helpers.safe_folders import settle, whole_folder


def filled(folder, content):
    folder.mkdir()
    (folder / "weights").write_text(content)
    return folder


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    with whole_folder(tmp_path / "adapter") as part:
        (part / "weights").write_text("new")
        assert not (tmp_path / "adapter").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "weights").read_text() == "new"


def test_an_existing_folder_is_kept_unless_overwrite_is_set(tmp_path):
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


def test_an_error_while_writing_leaves_the_old_folder_intact(tmp_path):
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


def test_a_link_is_kept_and_its_target_replaced(tmp_path):
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
from qlora_helpers import safe_folders
rename, folder, at = pathlib.Path.rename, pathlib.Path(sys.argv[1]), int(sys.argv[2])
renamed = []
def killing(self, target):
    if len(renamed) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    renamed.append(target)
    return rename(self, target)
pathlib.Path.rename = killing
with safe_folders.whole_folder(folder, overwrite=True) as part:
    (part / "weights").write_text("new")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("at", [0, 1])
def test_a_kill_while_a_folder_is_replaced_loses_nothing(tmp_path, at):
    folder = filled(tmp_path / "adapter", "old")
    killed = subprocess.run([sys.executable, "-c", KILL, str(folder), str(at)])
    assert killed.returncode == -signal.SIGKILL
    assert folder.exists() is (at == 0)  # between the two renames the name does not exist
    assert (settle(folder) / "weights").read_text() == "old"
    with whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_kill_after_both_renames_leaves_the_new_folder(tmp_path):
    folder, _ = filled(tmp_path / "adapter", "new"), filled(tmp_path / f"adapter{safe_folders.OLD}", "old")
    assert (settle(folder) / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
