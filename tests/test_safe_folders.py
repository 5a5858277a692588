"""A folder appears complete or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_helpers import safe_folders
from qlora_helpers.folder_locks import FolderInUse
from qlora_helpers.safe_folders import put_back, whole_folder
from tests.support.holding import held_by_another


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


def test_overwrite_is_a_switch(tmp_path):
    folder = filled(tmp_path / "adapter", "old")
    with pytest.raises(ValueError, match="overwrite='no': must be True or False"):
        whole_folder(folder, overwrite="no").__enter__()


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
    assert put_back(folder).resolve() == (tmp_path / "here" / folder).resolve()  # to read from


def test_a_link_is_kept_and_its_target_replaced(tmp_path):
    folder = filled(tmp_path / "adapter", "old")
    (tmp_path / "link").symlink_to(folder)
    with whole_folder(tmp_path / "link", overwrite=True) as part:
        (part / "weights").write_text("new")
    assert (tmp_path / "link").is_symlink() and (folder / "weights").read_text() == "new"


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
    assert (put_back(folder) / "weights").read_text() == "old"
    with whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_kill_after_both_renames_leaves_the_new_folder(tmp_path):
    folder, left = filled(tmp_path / "adapter", "new"), filled(tmp_path / f".adapter.0a1b2c3d{safe_folders.OLD}", "old")
    assert (put_back(folder) / "weights").read_text() == "new"
    assert left.exists()  # reading deletes nothing
    with whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_was_replaced_does_not_come_back(tmp_path, monkeypatch):
    """A kill while the old one is removed leaves it; then the user deletes the new one."""
    folder, remove = filled(tmp_path / "adapter", "old"), safe_folders.shutil.rmtree
    monkeypatch.setattr(safe_folders, "_remove", lambda left: None)
    with whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("new")
    remove(folder)
    assert not put_back(folder).exists()


def test_a_reader_waits_for_a_writer_and_then_says_who_it_is(tmp_path, monkeypatch):
    filled(tmp_path / f".adapter.0123abcd{safe_folders.OLD}", "old")
    monkeypatch.setattr(safe_folders, "PATIENCE", 0.1)
    with (
        held_by_another(tmp_path / "adapter") as process,
        pytest.raises(FolderInUse, match=f"adapter' is being written by process {process.pid} on "),
    ):
        put_back(tmp_path / "adapter")
    assert (put_back(tmp_path / "adapter") / "weights").read_text() == "old"


@pytest.mark.parametrize(
    "name",
    ["adapter.old", "adapter.part", "adapter.being-replaced", ".adapter.old", ".adapter.mine.qlora-old", "adapter-2"],
)
def test_folders_of_other_names_are_left_alone(name, tmp_path):
    folder, backup = filled(tmp_path / "adapter", "old"), filled(tmp_path / name, "older")
    put_back(folder)
    with whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("new")
    put_back(tmp_path / "missing")
    assert (backup / "weights").read_text() == "older"
    assert (folder / "weights").read_text() == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_a_folder_is_written_is_kept(overwrite, tmp_path):
    folder = tmp_path / "merged"
    with (
        pytest.raises(FileExistsError, match=r"is there already|holds the folder 'thesis'"),
        whole_folder(folder, overwrite) as part,
    ):
        (part / "weights").write_text("new")
        (folder / "thesis").mkdir(parents=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["merged", "thesis"]


def test_a_full_disk_is_a_sentence(tmp_path):
    with (
        pytest.raises(
            OSError, match=r"adapter' could not be written: its disk is full, with \d+ MB left\. Free some space"
        ),
        whole_folder(tmp_path / "adapter"),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_read_under_the_name_that_was_given(tmp_path):
    """A model is known by the name of its folder, also if that is a link."""
    filled(tmp_path / "real", "base")
    (tmp_path / "mybase").symlink_to("real")
    assert put_back(tmp_path / "mybase") == tmp_path / "mybase"


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"folder='.*thesis.txt' is a file: name a new folder"):
        whole_folder(tmp_path / "thesis.txt", overwrite=True).__enter__()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_with_folders_in_it_is_not_replaced(tmp_path):
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "run" / ".ipynb_checkpoints").mkdir()  # of JupyterLab, which does not count
    with pytest.raises(
        FileExistsError, match=r"run' holds the folder 'checkpoint-5', as no saved model or adapter does, so it is not"
    ):
        whole_folder(tmp_path / "run", overwrite=True).__enter__()
    assert (tmp_path / "run" / "checkpoint-5").is_dir()


def test_the_old_folder_gets_its_name_back_if_the_new_one_cannot_have_it(tmp_path, monkeypatch):
    folder, rename = filled(tmp_path / "adapter", "old"), Path.rename

    def refused(self, target):
        if self.name.endswith(safe_folders.NEW):
            raise PermissionError("a scanner has it open")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError, match="scanner"), whole_folder(folder, overwrite=True) as part:
        (part / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_cannot_be_removed_is_named_and_does_not_undo_the_writing(tmp_path, monkeypatch):
    folder = filled(tmp_path / "adapter", "old")

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(safe_folders.shutil, "rmtree", refused)
    with (
        pytest.warns(UserWarning, match=r"qlora-new is no longer needed but cannot be removed \(Permission denied\)"),
        whole_folder(folder, overwrite=True) as part,
    ):
        (part / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"


WRITER = """
import pathlib, sys, time
from qlora_helpers.safe_folders import FolderInUse, whole_folder
folder, mine = sys.argv[1:]
wrote = 0
while wrote < 20:
    try:
        with whole_folder(folder, overwrite=True) as part:
            for number in range(20):
                (part / str(number)).write_text(mine)
    except FolderInUse:
        time.sleep(0.002)
    else:
        wrote += 1
"""


def test_two_processes_that_write_one_folder_never_mix_their_files(tmp_path):
    folder = tmp_path / "adapter"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), mine]) for mine in ("one", "two")]
    looks = 0
    while any(writer.poll() is None for writer in writers):
        try:
            texts = [path.read_text() for path in folder.iterdir()]
        except FileNotFoundError:  # replaced just now
            continue
        assert len(texts) in (0, 20) or not folder.exists()
        looks += 1
    assert all(writer.returncode == 0 for writer in writers) and looks
    texts = [path.read_text() for path in folder.iterdir()]
    assert len(texts) == 20 and len(set(texts)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
