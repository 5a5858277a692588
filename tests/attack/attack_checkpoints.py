"""Runs that are resumed from checkpoints that somebody or something has changed, or whose disk was full."""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_helpers.training.checksums import CHECKSUMS
from tests.support.short_runs import adapter, differing, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps, with checkpoints at three and six."""
    return run(tmp_path_factory.mktemp("finished")).saved_path.parent


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def harms(file: Path, other: Path, marker: Path, chance: random.Random):
    """(name, function) for each way to damage a file; `other` is the same file of another checkpoint."""
    content = file.read_bytes()

    def flipped() -> bytes:
        changed = bytearray(content)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)

    yield "gone", file.unlink
    yield "empty", lambda: file.write_bytes(b"")
    yield "cut off", lambda: file.write_bytes(content[: chance.randrange(1, len(content))])
    yield "a byte longer", lambda: file.write_bytes(content + b"\0")
    for number in range(3):
        yield f"bit flipped {number + 1}", lambda: file.write_bytes(flipped())
    yield "noise", lambda: file.write_bytes(chance.randbytes(len(content)))
    yield "of another step", lambda: shutil.copyfile(other, file)
    yield "a folder", lambda: (file.unlink(), file.mkdir())
    yield "a link to nowhere", lambda: (file.unlink(), file.symlink_to("nowhere"))
    yield "deep JSON", lambda: file.write_text("[" * 100_000)
    yield "other JSON", lambda: file.write_text(json.dumps({"files": 3, "global_step": "six"}))
    yield "code", lambda: file.write_bytes(pickle.dumps(Bomb(marker)))


def attack_tampered_checkpoints(finished, tmp_path, tries, chance):
    """Tampered checkpoints, one file each."""
    marker, wanted = tmp_path / "code ran", adapter(finished / "adapter")
    names = sorted(path.name for path in (finished / "checkpoint-3").iterdir())
    assert CHECKSUMS in names and len(names) > 6
    for name in names:
        kinds = [kind for kind, _ in harms(finished / "checkpoint-3" / name, finished, marker, chance)]
        for number, kind in enumerate(kinds):
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            shutil.copy(finished / "run.json", folder)
            shutil.copytree(finished / "checkpoint-3", folder / "checkpoint-3")
            file, other = folder / "checkpoint-3" / name, finished / "checkpoint-6" / name
            next(harm for which, harm in harms(file, other, marker, chance) if which == kind)()
            try:
                ended = run(folder, resume=True)
            except ValueError as error:
                assert name in str(error) and "checkpoint-3" in str(error), f"{name}, {kind}: {error}"
                assert (folder / "checkpoint-3").is_dir()
                tries["refused, with the file's name"] += 1
            else:
                assert differing(adapter(ended.saved_path), wanted) == [], f"{name}, {kind}"
                tries["ended bit-identical"] += 1
            assert not marker.exists(), f"{name}, {kind}: code ran"
            shutil.rmtree(folder)


@contextlib.contextmanager
def no_file_larger_than(size: int):
    """As on a disk that is full: writing more fails. Works for everybody, but one file at a time."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def ends_after_a_failed_write(folder: Path, limited, wanted, tries) -> None:
    """A run that cannot write all says so in a sentence; with room again it ends as if nothing had happened."""
    with limited:
        try:
            run(folder, resume=True)
            tries["had room enough"] += 1
        except OSError as error:
            said = str(error)
            assert "\n" not in said and any(cure in said for cure in ("Free some", "name a folder of your own")), said
            tries["a sentence"] += 1
    if not (folder / "adapter").exists():
        run(folder, resume=True)
    assert differing(adapter(folder / "adapter"), wanted) == []


def attack_files_that_cannot_grow(finished, tmp_path, tries):
    """Runs in which no file may be larger than some size."""
    wanted = adapter(finished / "adapter")
    sizes = sorted({path.stat().st_size for path in finished.rglob("*") if path.is_file()})
    for size in [4096, *(size - 1 for size in sizes if size > 4096), sizes[-1]]:
        ends_after_a_failed_write(tmp_path / str(size), no_file_larger_than(size), wanted, tries)


def attack_full_disks(finished, tmp_path, tries):
    """Runs on a small disk of its own."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs Linux and root")
    wanted = adapter(finished / "adapter")
    whole = sum(path.stat().st_size for path in finished.rglob("*") if path.is_file())

    def mount(folder: Path, size: int, *options: str) -> None:
        how = ",".join((f"size={size}", *options))
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], check=True)

    @contextlib.contextmanager
    def full(disk: Path):
        yield
        mount(disk, 100 * 2**20, "remount")

    try:
        mount(tmp_path, 2**20)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine lets nobody mount a disk: {error}")
    subprocess.run(["umount", str(tmp_path)], check=True)
    for part in range(1, 17):
        disk = tmp_path / str(part)
        disk.mkdir()
        mount(disk, whole * part // 16)
        try:
            ends_after_a_failed_write(disk / "run", full(disk), wanted, tries)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
