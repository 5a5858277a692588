"""Folders that are written while processes are killed, meet, or lie beside folders of confusing names."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.folder_locks import FolderInUse
from qlora_helpers.safe_folders import put_back, whole_folder

NAME = "adapter"
FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def write(folder: Path, text: str, overwrite: bool = True) -> None:
    with whole_folder(folder, overwrite=overwrite) as part:
        for name in FILES:
            (part / name).write_text(text)


def texts(folder: Path) -> set[str]:
    """What is in a folder, which must be all of its files."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {path.read_text() for path in folder.iterdir()}


def killed_at(event: int, what, *args) -> bool:
    """Do something in a process that kills itself at its nth event that Python audits. Returns whether it died."""
    child = os.fork()
    if child == 0:
        seen = 0

        def die(name, arguments):
            nonlocal seen
            if name.startswith(("os.", "open", "shutil.", "fcntl.", "tempfile.")):
                seen += 1
                if seen == event + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        try:
            what(*args)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before", ["nothing", "an old folder", "an old folder that lost its name"])
def attack_every_moment_of_writing(before, tmp_path, tries):
    """Kills at each file operation of whole_folder."""
    event, died = 0, True
    while died:
        top = tmp_path / str(event)
        folder = top / NAME
        top.mkdir()
        (top / "adapter.old").mkdir()
        (top / "adapter.old" / "thesis.txt").write_text("years of work")
        if before != "nothing":
            write(folder, "old")
        if before == "an old folder that lost its name":
            folder.rename(top / f".{NAME}.0123abcd.qlora-old")
        died = killed_at(event, write, folder, "new")
        found = texts(folder) if put_back(folder).exists() else set()
        allowed = [{"new"}] if not died else [{"new"}, set() if before == "nothing" else {"old"}]
        assert found in allowed, f"killed at event {event}: {found}"
        write(folder, "newer")
        assert texts(folder) == {"newer"}
        assert (top / "adapter.old" / "thesis.txt").read_text() == "years of work"
        assert sorted(path.name for path in top.iterdir()) == ["adapter", "adapter.old"]
        tries["killed" if died else "not reached"] += 1
        event += 1
    assert event > 15


confusing = st.from_regex(
    r"\.?adapter(\.[0-9a-f]{0,9})?(\.(old|part|new|lock|qlora-old|qlora-new|being-replaced))?", fullmatch=True
)
OURS = r"\.adapter\.[0-9a-f]{8}\.qlora-(old|new)"


@given(names=st.lists(confusing, min_size=1, max_size=6, unique=True), there=st.booleans())
def attack_confusing_names(names, there, tmp_path, tries):
    """Folders of confusing names beside one that is written."""
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    foreign = [name for name in names if name != NAME and not re.fullmatch(OURS, name) and name != f".{NAME}.lock"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text(name)
    if there:
        write(tmp_path / NAME, "old")
    put_back(tmp_path / NAME)
    write(tmp_path / NAME, "new")
    assert texts(tmp_path / NAME) == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NAME, *foreign])
    assert all((tmp_path / name / "thesis.txt").read_text() == name for name in foreign)
    tries["left alone"] += len(foreign)


def attack_writers_that_meet(tmp_path, tries):
    """Three processes that write one folder for ten seconds."""
    folder, until = tmp_path / NAME, time.monotonic() + 10

    def keep_writing(mine: str) -> int:
        wrote = 0
        while time.monotonic() < until:
            try:
                write(folder, mine)
                wrote += 1
            except FolderInUse:
                time.sleep(0.0005)
        return min(wrote, 255)

    children = []
    for mine in ("one", "two", "three"):
        child = os.fork()
        if child == 0:
            code = 0
            try:
                code = keep_writing(mine)
            finally:
                os._exit(code)
        children.append(child)
    while time.monotonic() < until:
        try:
            there = put_back(folder).exists()
        except FolderInUse:
            continue
        tries["looks that found it" if there else "looks before the first write"] += 1
        time.sleep(0.001)
    assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) > 0 for child in children)  # each got its turn
    assert len(texts(folder)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
