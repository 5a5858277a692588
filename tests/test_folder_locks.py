"""One writer per folder, who can be named, and whose lock ends with it."""

import errno
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from qlora_helpers import folder_locks
from qlora_helpers.folder_locks import FolderInUse, in_use, locked
from tests.support.holding import held_by_another


def test_the_second_process_is_told_who_has_the_folder(tmp_path):
    with held_by_another(tmp_path / "run") as process:
        assert in_use(tmp_path / "run") and not in_use(tmp_path / "run-2")
        with pytest.raises(FolderInUse) as error:
            locked(tmp_path / "run", "output_dir").__enter__()
    said = str(error.value)
    assert said.startswith(f"output_dir={str(tmp_path / 'run')!r} is being written by process {process.pid} on ")
    assert " since 2" in said and said.endswith("wait until that has ended, or name another folder")
    assert not in_use(tmp_path / "run")


def test_a_lock_leaves_no_file(tmp_path):
    with locked(tmp_path / "run"):
        assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
    assert not list(tmp_path.iterdir())


def test_the_holder_may_take_the_lock_again(tmp_path):
    with locked(tmp_path / "run"):
        with locked(tmp_path / "run"):
            pass
        assert (tmp_path / ".run.lock").exists()  # the inner one gives nothing back


def test_another_thread_is_refused(tmp_path):
    found = []
    with locked(tmp_path / "run"):
        thread = threading.Thread(target=lambda: found.append(in_use(tmp_path / "run")))
        thread.start()
        thread.join()
    assert found == [True]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_kill_gives_the_lock_back(tmp_path):
    with held_by_another(tmp_path / "run") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with locked(tmp_path / "run"):
            assert f'"process": {os.getpid()}' in (tmp_path / ".run.lock").read_text()
    assert not list(tmp_path.iterdir())


def test_a_link_and_its_target_have_one_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with held_by_another(tmp_path / "run"):
        assert in_use(tmp_path / "link") and in_use(tmp_path / "run" / ".." / "run")


def test_where_nothing_can_be_written_beside_the_folder_the_lock_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(folder_locks.os, "access", lambda path, mode: Path(path) != tmp_path)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_a_file_system_without_locks_gets_filelock_s_own_notes(tmp_path, monkeypatch):
    import fcntl

    def missing(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    found = []
    with locked(tmp_path / "run"):
        notes = (tmp_path / ".run.lock").read_text()  # not ours to write over
        assert str(os.getpid()) in notes and not notes.startswith("{")
        thread = threading.Thread(target=lambda: found.append(in_use(tmp_path / "run")))
        thread.start()
        thread.join()
    assert found == [True] and not in_use(tmp_path / "run")
    assert not list(tmp_path.iterdir())
