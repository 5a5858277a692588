"""The Colab editions: what their set-up cell does on Colab, Kaggle and elsewhere, and what it would install on Colab.

The cell runs in its own Python, in a folder that represents the runtime: packages that are only metadata, and a pip, an
nvidia-smi and a course that only report what they are given. Only the test with the package index needs a network.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import venv
import warnings
import zipfile
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from notebooks.scripts import build
from tests import ROOT
from tests.colab.environment import COLAB, colab_rows, size_of, stand_in

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CELL = (ROOT / "colab" / "setup_cell.py").read_text().replace("COURSE_VERSION", VERSION)


def requirements(path: Path) -> dict[str, str]:
    """The pins of a requirements file: name, version."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.M))


PINS = requirements(ROOT / "colab" / "requirements.txt")
INSTALLED = "Installed bitsandbytes {bitsandbytes}, datasets {datasets}, gguf {gguf}, sacrebleu {sacrebleu}, trl {trl}.\n".format(
    **PINS
)
NO_GPU = "Set-up is complete. There is no GPU: the lesson runs in the cpu gear.\n"


PIP = """
    import os, pathlib, re, shutil, sys
    site = pathlib.Path(__file__).parents[1]
    if "uninstall" in sys.argv:
        with (site / "pip.log").open("a") as log:
            log.write("uninstall " + sys.argv[-1] + "\\n")
        if "PIP_SAYS" in os.environ:
            sys.exit(os.environ["PIP_SAYS"])
        for old in [*site.glob(sys.argv[-1] + "-*.dist-info"), site / sys.argv[-1]]:
            shutil.rmtree(old)
        sys.exit()
    asked = [argument for argument in sys.argv[2:] if re.match(r"[a-z]+[=>]=", argument)]
    kept = pathlib.Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text().split()
    with (site / "pip.log").open("a") as log:
        log.write(" ".join(asked) + " | " + " ".join(kept) + "\\n")
    if "PIP_SAYS" in os.environ:
        sys.exit(os.environ["PIP_SAYS"])
    for name, version in (re.split("[=>]=", argument) for argument in asked):
        for old in site.glob(f"{name}-*.dist-info"):
            shutil.rmtree(old)
        new = site / f"{name}-{version}.dist-info"
        new.mkdir()
        (new / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        (site / f"{name}.py").write_text(f"__version__ = {version!r}\\n")
"""
HARDWARE = """
    import os, types
    def detect():
        print("GPUs that torch may see:", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        print("runs go to", os.environ.get("QLORA_RUNS", "the course"))
        name = os.environ.get("GPU_NAME")
        return types.SimpleNamespace(gpu_name=name, gear="t4" if name else "cpu")
"""
TELLS = re.compile(r"^(GPUs that torch may see|runs go to).*\n", re.M)


def make_course(folder: Path) -> Path:
    """A course with the real set-up and requirements, whose package only reports what it is given."""
    (folder / "qlora_helpers").mkdir(parents=True)
    (folder / "qlora_helpers" / "__init__.py").write_text("")
    (folder / "qlora_helpers" / "hardware.py").write_text(textwrap.dedent(HARDWARE))
    (folder / "data").mkdir()
    (folder / "data" / "text.txt").write_text("some text, or a text that is some\n" * 9)
    (folder / "colab").mkdir()
    for name in ("colab/setup.py", "colab/requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def zipped(course: Path, archive: Path) -> Path:
    """The course in one folder of a zip, as from `make zip`; the course itself is removed."""
    shutil.make_archive(str(archive.with_suffix("")), "zip", course.parent, course.name)
    shutil.rmtree(course)
    return archive


def bare_python(folder: Path) -> tuple[Path, Path]:
    """A Python without packages, not even pip, so that no mistake can affect the tests' own; and its package folder."""
    venv.create(folder, symlinks=os.name != "nt")
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python", next(folder.glob("[lL]ib/**/site-packages"))


def make_pip(site: Path) -> None:
    (site / "pip").mkdir()
    (site / "pip" / "__init__.py").write_text("")
    (site / "pip" / "__main__.py").write_text(textwrap.dedent(PIP))


class Runtime:
    """A machine in a folder: the notebook runs in `here`, `site` has the packages, `bin` the programs."""

    def __init__(self, root: Path):
        self.here, self.bin = root / "content", root / "bin"
        for folder in (self.here, self.bin):
            folder.mkdir(parents=True)
        self.python, self.site = bare_python(root / "python")
        ranges = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        for requirement in map(Requirement, ranges):
            name = requirement.name
            if name not in PINS or canonicalize_name(name) in COLAB:
                stand_in(self.site, name, COLAB[canonicalize_name(name)])
        shutil.copytree(Path(packaging.__file__).parent, self.site / "packaging")
        make_pip(self.site)
        (self.bin / "git").symlink_to(shutil.which("git"))

    def gpus(self, count: int) -> None:
        lines = "\n".join(f"echo 'GPU {number}: Tesla T4 (UUID: GPU-{number})'" for number in range(count))
        (self.bin / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}\n")
        (self.bin / "nvidia-smi").chmod(0o755)

    def run(self, cell: str = CELL, repository: str = "", **environment: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.bin), "HOME": str(self.here), **environment}
        command = [self.python, "-c", cell.replace("GITHUB_REPOSITORY", repository)]
        done = subprocess.run(command, cwd=self.here, env=environment, capture_output=True, text=True)
        self.told = done.stdout
        done.stdout = TELLS.sub("", done.stdout)
        return done

    @property
    def pip_calls(self) -> list[str]:
        log = self.site / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def runtime(tmp_path) -> Runtime:
    return Runtime(tmp_path)


def completed(done: subprocess.CompletedProcess, stdout: str) -> bool:
    return (done.returncode, done.stderr, done.stdout) == (0, "", stdout)


def last_line(done: subprocess.CompletedProcess) -> str:
    """The sentence of the exception that ended a run."""
    assert done.returncode == 1, done.stdout
    return done.stderr.strip().splitlines()[-1]


NOT_HERE = (
    "SetUpStopped: the course is not here: upload qlora-course.zip beside this notebook (Kaggle: as a dataset), "
    "wait until it is complete, and run this cell again."
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Where the course comes from


@pytest.mark.parametrize("name", ["qlora-course.zip", "qlora-course (1).zip"])
def test_an_uploaded_zip_is_unpacked(runtime, tmp_path, name):
    zipped(make_course(tmp_path / "qlora-course"), runtime.here / name)
    done = runtime.run()
    assert completed(done, INSTALLED + NO_GPU), done
    assert (runtime.here / "qlora-course" / "qlora_helpers").is_dir()


def test_a_zip_without_a_folder_in_it_is_unpacked(runtime, tmp_path):
    make_course(tmp_path / "course")
    shutil.make_archive(str(runtime.here / "qlora-course"), "zip", tmp_path / "course")
    assert completed(runtime.run(), INSTALLED + NO_GPU)
    assert (runtime.here / "qlora-course" / "qlora_helpers").is_dir()


@pytest.mark.parametrize("name", ["photos.zip", "course.zip"])
def test_zips_of_other_names_are_left_alone(runtime, tmp_path, name):
    zipped(make_course(tmp_path / "qlora-course"), runtime.here / name)
    assert last_line(runtime.run()) == NOT_HERE
    assert names_in(runtime.here) == [name]


def test_a_folder_in_a_mounted_drive_is_used_where_it_is(runtime):
    make_course(runtime.here / "drive" / "MyDrive" / "qlora-course")
    assert completed(runtime.run(), INSTALLED + NO_GPU)
    assert [path.name for path in runtime.here.iterdir()] == ["drive"]


def test_a_zip_in_a_mounted_drive_is_unpacked_beside_the_notebook(runtime, tmp_path):
    (runtime.here / "drive" / "MyDrive").mkdir(parents=True)
    zipped(make_course(tmp_path / "qlora-course"), runtime.here / "drive" / "MyDrive" / "qlora-course.zip")
    assert completed(runtime.run(), INSTALLED + NO_GPU)
    assert (runtime.here / "qlora-course" / "qlora_helpers").is_dir()


def test_without_a_course_one_sentence_says_what_to_do(runtime):
    assert last_line(runtime.run()) == NOT_HERE
    assert not runtime.pip_calls


@pytest.mark.parametrize("place", ["", "colab", "notebooks"])
def test_in_a_copy_of_the_repository_its_own_files_are_used(runtime, place):
    course = make_course(runtime.here / "checkout")
    runtime.here = course / place
    runtime.here.mkdir(parents=True, exist_ok=True)
    assert completed(runtime.run(), INSTALLED + NO_GPU)


@pytest.mark.parametrize("place", ["qlora-course", "my-data/qlora-course", "datasets/me/my-data/qlora-course"])
def test_on_kaggle_a_dataset_is_the_course_and_runs_go_to_the_working_folder(tmp_path, place):
    runtime = Runtime(tmp_path / "kaggle")
    runtime.here = runtime.here.rename(tmp_path / "kaggle" / "working")
    make_course(tmp_path / "kaggle" / "input" / place)
    done = runtime.run(KAGGLE_KERNEL_RUN_TYPE="Interactive", COLAB_RELEASE_TAG="x", GPU_NAME="Tesla T4")
    assert completed(done, INSTALLED + "Set-up is complete: Tesla T4, t4 gear.\n"), done
    assert f"runs go to {runtime.here / 'runs'}\n" in runtime.told
    assert runtime.run(KAGGLE_KERNEL_RUN_TYPE="Interactive", QLORA_RUNS="/elsewhere").returncode == 0
    assert "runs go to /elsewhere\n" in runtime.told


# Zips that are damaged, dangerous, or not the course


@pytest.fixture
def upload(runtime, tmp_path) -> Path:
    """A whole zip of the course beside the notebook."""
    return zipped(make_course(tmp_path / "made" / "qlora-course"), runtime.here / "qlora-course.zip")


def flipped(archive: Path, name: str, part: float) -> bytes:
    """The bytes of a zip with one bit of an entry's data flipped."""
    with zipfile.ZipFile(archive) as opened:
        entry = opened.getinfo(name)
    raw = bytearray(archive.read_bytes())
    raw[entry.header_offset + 30 + len(name) + int(part * entry.compress_size)] ^= 1
    return bytes(raw)


DAMAGE = {
    "half an upload": lambda archive: archive.read_bytes()[: archive.stat().st_size // 2],
    "the last byte is missing": lambda archive: archive.read_bytes()[:-1],
    "the first bytes are missing": lambda archive: archive.read_bytes()[archive.stat().st_size // 4 :],
    "empty": lambda archive: b"",
    "a web page": lambda archive: b"<html>Sign in to download</html>",
    "a flipped bit in the package": lambda archive: flipped(archive, "qlora-course/qlora_helpers/hardware.py", 0.5),
    "a flipped bit in the data": lambda archive: flipped(archive, "qlora-course/data/text.txt", 0.9),
    "a flipped bit in an entry's beginning": lambda archive: flipped(archive, "qlora-course/pyproject.toml", 0.1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_zip_leaves_nothing_behind_and_a_good_one_helps(runtime, upload, damage):
    good = upload.read_bytes()
    upload.write_bytes(DAMAGE[damage](upload))
    sentence = last_line(runtime.run())
    assert sentence.startswith(f"SetUpStopped: {upload} cannot be used (")
    assert "delete it, upload qlora-course.zip beside this notebook" in sentence
    assert sentence.endswith("wait until it is complete, and run this cell again.")
    assert names_in(runtime.here) == ["qlora-course.zip"]
    upload.write_bytes(good)
    assert completed(runtime.run(), INSTALLED + NO_GPU)


def with_entry(archive: Path, name: str, content: str = "x", mode: int = 0o100644, count: int = 1) -> None:
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        for number in range(count):
            entry = zipfile.ZipInfo(name.format(number))
            entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            opened.writestr(entry, content)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"name": "../evil.txt"}, "a path to another folder"),
        ({"name": "qlora-course/../../evil.txt"}, "a path to another folder"),
        ({"name": "/evil.txt"}, "a path to another folder"),
        ({"name": "qlora-course/data/link", "content": "/etc", "mode": 0o120777}, "a link"),
        ({"name": "qlora-course/many/{}", "count": 2001}, "more than 2,000 files"),
        ({"name": "qlora-course/large", "content": "0" * 101_000_000}, "more than 100 MB"),
    ],
    ids=["above", "in the middle", "absolute", "link", "many", "large"],
)
def test_a_dangerous_zip_is_refused_as_a_whole(runtime, upload, more, why):
    with_entry(upload, **more)
    sentence = last_line(runtime.run())
    assert f"{upload} cannot be used (it has" in sentence and why in sentence
    assert names_in(runtime.here) == ["qlora-course.zip"]
    assert not (runtime.here.parent / "evil.txt").exists()


def test_a_zip_that_says_it_is_smaller_than_it_is_is_refused(runtime, upload):
    with_entry(upload, "qlora-course/large", "0" * 101_000_000)
    raw = upload.read_bytes()
    assert raw.count((101_000_000).to_bytes(4, "little")) == 2, "in the entry and in the list of entries"
    upload.write_bytes(raw.replace((101_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    assert "cannot be used (Bad CRC-32 for file 'qlora-course/large')" in last_line(runtime.run())
    assert names_in(runtime.here) == ["qlora-course.zip"]


@pytest.mark.parametrize("name", ["colab/requirements.txt", "pyproject.toml", "qlora_helpers", "data"])
def test_a_zip_without_all_of_the_course_is_refused(runtime, tmp_path, name):
    course = make_course(tmp_path / "qlora-course")
    (course / name).rename(tmp_path / "gone")
    zipped(course, runtime.here / "qlora-course.zip")
    assert "cannot be used (files of the course are missing): delete it" in last_line(runtime.run())
    assert names_in(runtime.here) == ["qlora-course.zip"]


def test_a_zip_with_a_password_is_refused(runtime, upload):
    raw = upload.read_bytes()
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # what says that an entry is encrypted
        parts = raw.split(signature)
        raw = signature.join([parts[0], *(part[: flags - 4] + b"\x01" + part[flags - 3 :] for part in parts[1:])])
    upload.write_bytes(raw)
    assert "password required" in last_line(runtime.run())
    assert names_in(runtime.here) == ["qlora-course.zip"]


def test_of_two_zips_that_differ_none_is_chosen(runtime, upload):
    other = shutil.copy(upload, runtime.here / "qlora-course (1).zip")
    with_entry(other, "qlora-course/new.txt")
    sentence = last_line(runtime.run())
    assert "qlora-course.zip" in sentence and "qlora-course (1).zip" in sentence
    assert sentence.endswith("differ: delete all but one, and run this cell again.")
    assert names_in(runtime.here) == ["qlora-course (1).zip", "qlora-course.zip"]
    shutil.copy(upload, other)
    assert completed(runtime.run(), INSTALLED + NO_GPU), "two equal ones are one"


@pytest.mark.parametrize("zips", [True, False])
def test_what_damage_has_left_behind_is_no_course(runtime, upload, zips):
    """An older set-up cell unpacked in place, until it came to the damage."""
    (runtime.here / "qlora-course" / "colab").mkdir(parents=True)
    (runtime.here / "qlora-course" / "colab" / "setup.py").write_text("print('half a course was run')")
    if zips:
        done = runtime.run()
        assert done.returncode == 0 and done.stdout.endswith(INSTALLED + NO_GPU), done
    else:
        upload.unlink()
        assert last_line(runtime.run()) == NOT_HERE


# An older course beside a newer zip


def older_ones(runtime: Runtime) -> list[Path]:
    return sorted(runtime.here.glob("qlora-course-old-*"))


def test_the_same_zip_again_changes_nothing_not_even_edited_files(runtime, upload):
    runtime.run()
    course = runtime.here / "qlora-course"
    (course / "qlora_helpers" / "hardware.py").open("a").write("# mine\n")
    (course / "data" / "text.txt").unlink()
    (course / "runs").mkdir()
    os.utime(upload, (2_000_000_000, 2_000_000_000))
    before = {path: path.stat().st_mtime_ns for path in course.rglob("*") if "__pycache__" not in path.parts}
    assert completed(runtime.run(), NO_GPU)
    assert {path: path.stat().st_mtime_ns for path in course.rglob("*") if "__pycache__" not in path.parts} == before
    assert names_in(runtime.here) == ["qlora-course", "qlora-course.zip"]


@pytest.mark.parametrize("unpacked", ["by the cell", "by hand"])
def test_a_new_zip_wins_over_an_old_folder_which_is_kept_and_named(runtime, upload, tmp_path, unpacked):
    if unpacked == "by the cell":
        runtime.run()
    else:
        runtime.run(f"import zipfile; zipfile.ZipFile({str(upload)!r}).extractall()")
        runtime.run()
        shutil.rmtree(older_ones(runtime)[0])
        (runtime.here / "qlora-course" / "made-from.txt").unlink()
    (runtime.here / "qlora-course" / "mine.txt").write_text("my notes")
    with_entry(upload, "qlora-course/new.txt")
    done = runtime.run()
    [old] = older_ones(runtime)
    said = f"The folder qlora-course is not from {upload}: it is now {old}, with all that you changed.\n"
    assert completed(done, said + NO_GPU), done
    assert (old / "mine.txt").read_text() == "my notes" and not (old / "new.txt").exists()
    assert (runtime.here / "qlora-course" / "new.txt").exists()
    assert completed(runtime.run(), NO_GPU)
    assert older_ones(runtime) == [old]


def test_a_damaged_new_zip_leaves_the_old_folder_where_it_is(runtime, upload):
    runtime.run()
    upload.write_bytes(upload.read_bytes()[:-9])
    assert "cannot be used" in last_line(runtime.run())
    assert names_in(runtime.here) == ["qlora-course", "qlora-course.zip"]
    upload.unlink()
    assert completed(runtime.run(), NO_GPU)


def test_a_cell_that_is_killed_before_the_new_folder_is_in_place_has_lost_nothing(runtime, upload):
    course = runtime.here / "qlora-course"
    course.mkdir()
    (course / "mine.txt").write_text("my notes")
    assert CELL.count("new.rename(course)") == 1
    assert runtime.run(CELL.replace("new.rename(course)", "os._exit(9)")).returncode == 9
    zip_away = upload.rename(runtime.here / "away")
    assert last_line(runtime.run()) == NOT_HERE, "what is left does not count"
    zip_away.rename(upload)
    assert completed(runtime.run(), INSTALLED + NO_GPU)
    assert (older_ones(runtime)[0] / "mine.txt").read_text() == "my notes"


def test_a_folder_that_another_notebook_unpacks_meanwhile_stays(runtime, upload):
    meanwhile = "(new / note).write_text(made_from)\n"
    assert CELL.count(meanwhile) == 1
    done = runtime.run(CELL.replace(meanwhile, meanwhile[:-1] + "; __import__('shutil').copytree(new, course)\n"))
    assert completed(done, INSTALLED + NO_GPU), done
    assert names_in(runtime.here) == ["qlora-course", "qlora-course.zip"]


def test_a_new_zip_waits_until_no_session_has_the_old_course(runtime, upload):
    runtime.run()
    with_entry(upload, "qlora-course/new.txt")
    session, old = "import qlora_helpers\n" + CELL, {"PYTHONPATH": str(runtime.here / "qlora-course")}
    for _ in range(2):
        sentence = last_line(runtime.run(session, **old))
        assert f"{upload} is new" in sentence and "restart the session" in sentence
        assert not older_ones(runtime)
    whole = upload.read_bytes()
    upload.write_bytes(whole[:-9])
    assert "cannot be used" in last_line(runtime.run(session, **old)), "a restart would not help"
    upload.write_bytes(whole)
    assert runtime.run().returncode == 0 and older_ones(runtime)


def test_the_zip_s_package_is_imported_also_if_another_course_is_installed(runtime, upload, tmp_path):
    installed = make_course(tmp_path / "installed")
    (runtime.site / "course.pth").write_text(str(installed))
    done = runtime.run(CELL + "\nimport qlora_helpers\nprint(qlora_helpers.__file__)")
    course = runtime.here / "qlora-course"
    said = f"The course in {course} is used, and not the one in {installed}.\n"
    assert completed(done, f"{said}{INSTALLED}{NO_GPU}{course / 'qlora_helpers' / '__init__.py'}\n"), done


def test_a_session_that_has_imported_another_course_needs_a_restart(runtime, upload, tmp_path):
    runtime.run()
    other = make_course(tmp_path / "other")
    done = runtime.run("import qlora_helpers\n" + CELL, PYTHONPATH=str(other))
    assert "this session has imported another course" in last_line(done)


def test_a_course_in_a_drive_gives_way_to_an_uploaded_zip_and_both_are_named(runtime, upload):
    drive = make_course(runtime.here / "drive" / "MyDrive" / "qlora-course")
    said = f"The course in {runtime.here / 'qlora-course'} is used, and not the one in {drive}.\n"
    assert completed(runtime.run(), said + INSTALLED + NO_GPU)


def test_a_notebook_of_another_version_says_so(runtime, upload):
    done = runtime.run(CELL.replace(f'"{VERSION}"', '"9.0"'))
    said = f"This notebook is of version 9.0, but the course in {runtime.here / 'qlora-course'} is version {VERSION}.\n"
    assert done.returncode == 0 and said in done.stdout, done


# Which folders count


@pytest.mark.parametrize(
    "place", ["..", "../..", "../input/qlora-course", "other", "../other", "drive/MyDrive", "colab/x"]
)
def test_a_course_in_any_other_folder_is_not_run(runtime, place):
    runtime.here = runtime.here / "a" / "b"
    runtime.here.mkdir(parents=True)
    course = Path(os.path.normpath(runtime.here / place))
    course.mkdir(parents=True, exist_ok=True)
    for name in names_in(make_course(course / "x")):
        (course / "x" / name).rename(course / name)
    (course / "colab" / "setup.py").write_text("print('a foreign file was run')")
    assert last_line(runtime.run()) == NOT_HERE


def test_of_two_datasets_on_kaggle_the_one_in_use_is_named(tmp_path):
    runtime = Runtime(tmp_path / "kaggle")
    one, two = (make_course(tmp_path / "kaggle" / "input" / name / "qlora-course") for name in ("one", "two"))
    done = runtime.run(KAGGLE_KERNEL_RUN_TYPE="Interactive", GPU_NAME="Tesla T4")
    assert done.returncode == 0 and done.stdout.startswith(f"The course in {one} is used, and not the one in {two}.\n")


# From GitHub


def git(*arguments: str, folder: Path) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def github(tmp_path) -> dict[str, str]:
    """What makes git take someone/course from this machine; the course is tagged, and the newest commit breaks it."""
    source = make_course(tmp_path / "someone" / "course")
    git("init", folder=source)
    for tag, text in ((f"v{VERSION}", None), ("newest", "raise SystemExit('another version')")):
        if text:
            (source / "colab" / "setup.py").write_text(text)
        git("add", ".", folder=source)
        git("commit", "-m", tag, folder=source)
        git("tag", tag, folder=source)
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
    }


def test_the_course_is_cloned_at_the_notebook_s_version(runtime, github, tmp_path):
    done = runtime.run(repository="someone/course", **github)
    assert completed(done, INSTALLED + NO_GPU), done
    assert (runtime.here / "qlora-course" / ".git").is_dir()
    # the second run finds what the first one fetched
    shutil.rmtree(tmp_path / "someone")
    assert completed(runtime.run(repository="someone/course", **github), NO_GPU)
    assert names_in(runtime.here) == ["qlora-course"]


@pytest.mark.parametrize("fault", ["no such version", "no such repository", "no git", "not the course"])
def test_a_clone_that_fails_says_why_and_leaves_nothing(runtime, github, tmp_path, fault):
    cell, repository = CELL, "someone/course"
    if fault == "no such version":
        cell = CELL.replace(f'"{VERSION}"', '"9.0"')
    elif fault == "no such repository":
        repository = "someone/else"
    elif fault == "no git":
        (runtime.bin / "git").unlink()
    else:
        git("rm", "-r", "data", folder=tmp_path / "someone" / "course")
        git("commit", "-m", "x", folder=tmp_path / "someone" / "course")
        git("tag", "--force", f"v{VERSION}", folder=tmp_path / "someone" / "course")
    sentence = last_line(runtime.run(cell, repository=repository, **github))
    assert f"https://github.com/{repository} cannot be used (" in sentence and "upload qlora-course.zip" in sentence
    assert names_in(runtime.here) == []


def test_a_clone_that_hangs_is_ended(runtime):
    (runtime.bin / "git").unlink()
    (runtime.bin / "git").write_text(
        f"#!{shutil.which('sh')}\nfor folder do :; done\n{shutil.which('mkdir')} -p $folder/colab\nexec {shutil.which('sleep')} 60\n"
    )
    (runtime.bin / "git").chmod(0o755)
    sentence = last_line(runtime.run(CELL.replace("timeout=300", "timeout=1"), repository="someone/course"))
    assert "timed out after" in sentence and "upload qlora-course.zip" in sentence
    assert names_in(runtime.here) == []


# What is installed


@pytest.fixture
def colab(runtime) -> Runtime:
    """A runtime that already has the course."""
    make_course(runtime.here / "qlora-course")
    return runtime


def test_the_second_run_installs_nothing(colab):
    assert completed(colab.run(), INSTALLED + NO_GPU)
    assert completed(colab.run(), NO_GPU)
    assert len(colab.pip_calls) == 1


def test_running_the_cell_twice_in_one_session_installs_nothing_and_the_new_packages_import_at_once(colab):
    session = f"import importlib.util\nassert not importlib.util.find_spec('trl')\n{CELL}\n{CELL}\n"
    session += "import trl, bitsandbytes, qlora_helpers, sys\nassert len(set(sys.path)) == len(sys.path)\n"
    session += "print(trl.__version__, bitsandbytes.__version__)"
    versions = f"{PINS['trl']} {PINS['bitsandbytes']}\n"
    done = colab.run(session)
    assert completed(done, INSTALLED + NO_GPU + NO_GPU + versions), done
    assert len(colab.pip_calls) == 1


def test_only_what_is_missing_or_at_another_version_is_installed(colab):
    for name, version in (("bitsandbytes", PINS["bitsandbytes"]), ("trl", "1.15.0")):
        stand_in(colab.site, name, version)
    shutil.rmtree(next(colab.site.glob("peft-*")))
    done = colab.run()
    installed = f"Installed datasets {PINS['datasets']}, gguf {PINS['gguf']}, sacrebleu {PINS['sacrebleu']}, trl {PINS['trl']}, peft>=0.20.\n"
    assert completed(done, installed + NO_GPU), done
    called = f"datasets=={PINS['datasets']} gguf=={PINS['gguf']} sacrebleu=={PINS['sacrebleu']} trl=={PINS['trl']} peft>=0.20 |"
    assert colab.pip_calls[0].startswith(called)


def test_pip_is_held_to_the_versions_that_the_runtime_has(colab):
    for name in ("pandas", "ipykernel", "tornado"):
        stand_in(colab.site, name, COLAB[name])
    colab.run()
    kept = colab.pip_calls[0].partition(" | ")[2].split()
    assert kept == [
        f"{name}=={COLAB[name]}"
        for name in ("torch", "numpy", "pandas", "transformers", "ipykernel", "tornado", "ipywidgets")
    ]


@pytest.mark.parametrize("name", ["torch", "numpy", "transformers"])
def test_what_the_runtime_must_bring_is_never_installed(colab, name):
    shutil.rmtree(next(colab.site.glob(f"{name}-*")))
    sentence = last_line(colab.run())
    assert f"{name} is not installed" in sentence
    assert "make run" in sentence
    assert not colab.pip_calls


@pytest.mark.parametrize(
    ("kaggle", "says", "cure"),
    [
        (False, "ERROR: No matching distribution found for trl", "make sure that this machine reaches the Internet"),
        (True, "ERROR: No matching distribution found for trl", "switch the Internet on (Settings → Turn on internet)"),
        (False, "ERROR: Cannot install trl\nERROR: ResolutionImpossible: x", "take the newest runtime"),
        (False, "", "pip says: nothing"),
    ],
)
def test_a_failing_pip_gives_a_sentence_that_says_what_to_do(colab, kaggle, says, cure):
    done = colab.run(
        PIP_SAYS=f"WARNING: x\n{says}" if says else "", **{"KAGGLE_KERNEL_RUN_TYPE": "x"} if kaggle else {}
    )
    sentence = last_line(done)
    assert f"pip could not install bitsandbytes {PINS['bitsandbytes']}" in sentence
    assert cure in sentence
    assert sentence.endswith(says.splitlines()[0].removeprefix("ERROR: ") if says else "nothing")
    assert done.stdout == ""


def test_a_package_that_was_imported_before_it_was_replaced_needs_a_restart(colab):
    (colab.site / "datasets.py").write_text("")
    sentence = last_line(colab.run("import datasets\n" + CELL))
    assert (
        "had imported datasets before it was removed or replaced. Restart the session (Runtime → Restart session)"
        in sentence
    )
    assert completed(colab.run("import datasets\n" + CELL), NO_GPU)  # the restarted session


def test_versions_that_the_course_does_not_know_are_named(colab):
    shutil.rmtree(next(colab.site.glob("transformers-*")))
    stand_in(colab.site, "transformers", "4.57.1")
    said = "Not tried with the course: transformers 4.57.1 (known: <6,>=5.15)."
    said += " If a lesson fails, take the newest runtime.\n"
    done = colab.run()
    assert completed(done, INSTALLED + said + NO_GPU), done


@pytest.mark.parametrize("of", ["the cell", "colab/setup.py"])
def test_a_notebook_shows_the_sentence_without_a_traceback(tmp_path, of):
    stopped = CELL.partition("# What is found is run")[0]
    if of == "colab/setup.py":
        stopped = f"import runpy\nSetUpStopped = runpy.run_path({str(ROOT / of)!r})['SetUpStopped']"
    script = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        f"shell.run_cell({stopped!r})\n"
        "shell.run_cell(\"raise SetUpStopped('do this')\")\n"
    )
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "The set-up stopped: do this"


# What is in the way


REFUSES = """
    import importlib.metadata, importlib.util
    def refuse(name, oldest):
        if importlib.util.find_spec(name) is None:
            return False
        version = importlib.metadata.version(name)
        if version < oldest:
            raise ImportError(f"Found an incompatible version of {name}")
        return True
    def is_torchao_available(): return refuse("torchao", "0.16")
    def is_other_available(): return refuse("other", "2.0")
    def is_third_available(): raise ImportError("not asked for, as it is not installed")
"""
GONE = "Removed {}, which peft {} refuses to work beside; no lesson uses it.\n"
GONE = GONE.format("torchao 0.10.0", COLAB["peft"])


@pytest.fixture
def crowded(colab) -> Runtime:
    """A runtime with a PEFT that refuses to work beside old versions of two packages; one of them is installed."""
    (colab.site / "peft").mkdir()
    (colab.site / "peft" / "import_utils.py").write_text(textwrap.dedent(REFUSES))
    stand_in(colab.site, "torchao", COLAB["torchao"], imports=["torchao"])
    return colab


def test_what_a_library_refuses_to_work_beside_is_removed_once(crowded):
    done = crowded.run(COLAB_RELEASE_TAG="x")
    assert done.returncode == 0 and done.stdout.startswith(INSTALLED + GONE + NO_GPU), done
    assert not list(crowded.site.glob("torchao*"))
    done = crowded.run(COLAB_RELEASE_TAG="x")
    assert done.returncode == 0 and done.stdout.startswith(NO_GPU), done
    assert [call for call in crowded.pip_calls if "uninstall" in call] == ["uninstall torchao"]


def test_any_package_that_is_refused_is_removed_and_one_that_is_new_enough_stays(crowded):
    stand_in(crowded.site, "other", "1.0", imports=["other"])
    shutil.rmtree(next(crowded.site.glob("torchao-*")))
    stand_in(crowded.site, "torchao", "0.17.0")
    done = crowded.run(KAGGLE_KERNEL_RUN_TYPE="x")
    assert "Removed other 1.0, which peft" in done.stdout and "torchao" not in done.stdout, done
    assert list(crowded.site.glob("torchao-0.17.0*")) and not list(crowded.site.glob("other*"))


def test_a_package_that_was_imported_before_it_was_removed_needs_a_restart(crowded):
    sentence = last_line(crowded.run("import torchao\n" + CELL, COLAB_RELEASE_TAG="x"))
    assert "had imported torchao before it was removed or replaced. Restart the session (Runtime →" in sentence
    done = crowded.run(CELL, COLAB_RELEASE_TAG="x")
    assert done.returncode == 0 and done.stdout.startswith(NO_GPU), done


def test_what_cannot_be_removed_is_said_with_the_reason_and_the_way_out(crowded):
    crowded.run()  # installs, and stops at torchao
    says = "ERROR: Could not install packages due to an OSError: [Errno 30] Read-only file system"
    sentence = last_line(crowded.run(COLAB_RELEASE_TAG="x", PIP_SAYS=says))
    assert f"pip could not remove torchao 0.10.0, which peft {COLAB['peft']} refuses to work beside" in sentence
    assert "%pip install --upgrade torchao" in sentence
    assert sentence.endswith(f"pip says: {says.removeprefix('ERROR: ')}")


def test_on_a_machine_of_one_s_own_nothing_is_removed(crowded):
    sentence = last_line(crowded.run())
    assert f"there is torchao 0.10.0, which peft {COLAB['peft']} refuses to work beside" in sentence
    assert "pip install --upgrade torchao" in sentence and "pip uninstall torchao" in sentence
    assert list(crowded.site.glob("torchao-*")) and not [call for call in crowded.pip_calls if "uninstall" in call]


FIRST_LORA_OF = {
    1: """
        from qlora_helpers.memory import known_config
        from qlora_helpers.models.meta import meta_model
        lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        peft.get_peft_model(meta_model(known_config("Llama-3.1-8B")), lora)
    """,
    4: """
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    """,
    7: """
        from qlora_helpers.models.loading import load_model
        model = load_model(quantization=None)
        peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    """,
}
LESSONS = """
    import runpy, sys, peft, torch
    def lessons():
        for number, cell in {cells!r}.items():
            try:
                exec(cell, {{"peft": peft, "torch": torch}})
                print("lesson", number, "works")
            except ImportError as error:
                print("lesson", number, error)
    lessons()
    runpy.run_path({set_up!r}, run_name="__main__")
    lessons()
"""


def test_with_colab_s_torchao_the_set_up_makes_lessons_1_4_and_7_work(tmp_path):
    """The real PEFT, pip and set-up in one session, with a stand-in for Colab's torchao.

    Pip removes nothing outside its environment, so this Python has the stand-in, and sees the tests' packages.
    """
    python, site = bare_python(tmp_path)
    (site / "the_tests_own.pth").write_text(str(Path(packaging.__file__).parents[1]))
    stand_in(site, "torchao", COLAB["torchao"], imports=["torchao"])
    cells = {number: textwrap.dedent(cell) for number, cell in FIRST_LORA_OF.items()}
    script = textwrap.dedent(LESSONS).format(cells=cells, set_up=str(ROOT / "colab" / "setup.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLAB_RELEASE_TAG": "x"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([python, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, number in zip(lines[:3], FIRST_LORA_OF, strict=True):
        assert line.startswith(f"lesson {number} Found an incompatible version of torchao. Found version 0.10.0"), lines
    assert lines[3].startswith("Removed torchao 0.10.0, which peft")
    assert lines[-3:] == [f"lesson {number} works" for number in FIRST_LORA_OF], lines
    assert not list(site.glob("torchao-*"))


# The GPU


@pytest.mark.parametrize(
    ("variables", "how"),
    [
        ("COLAB_RELEASE_TAG", "To switch one on: Runtime → Change runtime type → T4 GPU, then run this cell again.\n"),
        (
            "COLAB_RELEASE_TAG KAGGLE_KERNEL_RUN_TYPE",
            "To switch one on: Settings → Accelerator → GPU T4 x2, then run this cell again.\n",
        ),
        ("ELSEWHERE", ""),
    ],
)
def test_without_a_gpu_the_cell_says_how_to_get_one(colab, variables, how):
    assert completed(colab.run(**dict.fromkeys(variables.split(), "x")), INSTALLED + NO_GPU + how)


def test_with_a_gpu_it_says_which_gear(colab):
    colab.gpus(1)
    assert completed(colab.run(GPU_NAME="Tesla T4"), INSTALLED + "Set-up is complete: Tesla T4, t4 gear.\n")
    assert "GPUs that torch may see: all\n" in colab.told


def test_of_two_gpus_the_first_is_used(colab):
    colab.gpus(2)
    said = "There are 2 GPUs. The course uses the first: CUDA_VISIBLE_DEVICES=0.\n"
    done = colab.run(GPU_NAME="Tesla T4")
    assert completed(done, INSTALLED + said + "Set-up is complete: Tesla T4, t4 gear.\n"), done
    assert "GPUs that torch may see: 0\n" in colab.told


def test_the_user_s_own_choice_of_gpus_is_kept(colab):
    colab.gpus(2)
    done = colab.run(GPU_NAME="Tesla T4", CUDA_VISIBLE_DEVICES="0,1")
    assert completed(done, INSTALLED + "Set-up is complete: Tesla T4, t4 gear.\n")
    assert "GPUs that torch may see: 0,1\n" in colab.told


# Our own checkout, and the files


def test_in_this_checkout_the_cell_installs_nothing_and_says_the_same_everywhere(tmp_path):
    """Run it like a notebook, which also shows the last line's value; a pip that only logs hides the real one."""
    make_pip(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COLAB_", "KAGGLE_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    environment["IPYTHONDIR"] = str(tmp_path)
    environment.pop("QLORA_GEAR", None)
    cell = CELL.replace("GITHUB_REPOSITORY", "")
    session = "from IPython.core.interactiveshell import InteractiveShell\n"
    session += f"InteractiveShell.instance().run_cell({cell!r}).raise_error()"
    done = subprocess.run(
        [sys.executable, "-c", session], cwd=ROOT / "colab", env=environment, capture_output=True, text=True
    )
    assert completed(done, NO_GPU), done
    assert not (tmp_path / "pip.log").exists()


def test_the_cell_can_be_read_at_once():
    lines = CELL.splitlines()
    assert len(lines) <= 63
    assert max(map(len, lines)) <= 120
    source = (ROOT / "colab" / "setup_cell.py").read_text()
    assert source.count("GITHUB_REPOSITORY") == source.count("COURSE_VERSION") == 1


def test_the_colab_pins_leave_the_runtime_s_own_alone_and_are_those_of_the_lessons():
    assert not PINS.keys() & {"torch", "numpy", "transformers", "jupyterlab", "nbval"}
    lessons = requirements(ROOT / "requirements.txt")
    assert {name: lessons.get(name) for name in PINS} == PINS


def test_the_rows_of_colab_s_packages_are_complete():
    """A row's requirements are rows, too, with versions that it accepts: otherwise pip would change them on Colab."""
    for name, _, needs in colab_rows():
        for need in needs:
            version = COLAB.get(canonicalize_name(need.name))
            assert version, f"{name} needs {need}"
            assert need.specifier.contains(version, prereleases=True), f"{name} needs {need}, the row has {version}"


@pytest.mark.parametrize("address", ["", "someone/course"])
def test_the_badge_opens_the_lesson_or_the_upload_page(tmp_path, monkeypatch, address):
    shutil.copytree(ROOT / "colab", tmp_path / "colab", ignore=shutil.ignore_patterns("*.ipynb"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "colab" / "repository.json").write_text(json.dumps({"github": address}))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    badge, cell = build.colab_cells("04_qlora_run")
    page = f"github/{address}/blob/main/colab/04_qlora_run.ipynb" if address else "#upload=true"
    assert f"(https://colab.research.google.com/{page})" in badge.source
    assert ("`qlora-course.zip`" in badge.source) == (address == "")
    assert f'repository, version = "{address}", "{VERSION}"' in cell.source


def test_make_zip_makes_a_small_zip_that_the_cell_can_use(tmp_path):
    if not (ROOT / ".git").exists() or not shutil.which("make"):
        pytest.skip("not a git checkout, or no make: the zip is made from the last commit")
    archive = tmp_path / "course.zip"
    subprocess.run(["make", "zip", f"ZIP={archive}"], cwd=ROOT, check=True, capture_output=True)
    assert archive.stat().st_size < 15.6e6
    entries = zipfile.ZipFile(archive).infolist()
    assert 2 * len(entries) < 2000 and 3 * sum(entry.file_size for entry in entries) < 100e6, "the cell's limits"
    assert not any(".." in entry.filename for entry in entries), "the cell takes it for a path to another folder"
    names = [entry.filename for entry in entries]
    for name in ("colab/setup.py", "colab/requirements.txt", "pyproject.toml", "qlora_helpers/paths.py"):
        assert f"qlora-course/{name}" in names, "not in the last commit"
    assert any(name.startswith("qlora-course/data/") and name.endswith(".safetensors") for name in names)


# What pip would do on Colab


def test_on_colab_the_requirements_fit_beside_what_is_there(tmp_path, record_property):
    """Ask Colab's own pip, in an environment with Colab's packages as stand-ins, for Colab's Python.

    A dry run with `--python-version` looks at the installed packages like a real run, and their metadata has their
    requirements: pip keeps what it would keep on Colab, and changes what it would change there. Only markers on the
    Python version are evaluated for the running Python. The same call under Python 3.13 gave the same result.

    Measured in November 2026: bitsandbytes 0.50.2, trl 1.16.0, gguf 0.19.0 and sacrebleu 2.6.0 (with colorama and portalocker) are new; datasets 4.0.0 -> 5.2.0, pyarrow 18.1.0 ->
    26.0.1 and huggingface_hub 1.27.0 -> 1.33.0 move; 101 MB in all. torch 2.11.0, numpy 2.1.3, pandas 2.2.3,
    transformers 5.15.0, tokenizers 0.22.2, accelerate 1.14.0 and peft 0.20.0 stay.
    """
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--timeout", "15"]
    fetch += ["--disable-pip-version-check", "--dest", str(tmp_path), f"pip=={COLAB['pip']}"]
    fetched = subprocess.run(fetch, capture_output=True, text=True)
    if fetched.returncode:
        reason = f"no package index can be reached: {(fetched.stderr.strip() or 'pip said nothing').splitlines()[-1]}"
        warnings.warn(reason, stacklevel=1)  # a quiet run shows warnings, but not why a test is skipped
        pytest.skip(reason)

    python, site = bare_python(tmp_path / "colab")
    for row in colab_rows():
        stand_in(site, *row)
    report = tmp_path / "report.json"
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check"]
    command += ["--report", report, "--requirement", ROOT / "colab" / "requirements.txt"]
    command += ["--python-version", "3.13", "--only-binary=:all:"]
    for glibc in (
        "2_35",
        "2_34",
        "2_31",
        "2_28",
        "2_27",
        "2_24",
        "2_17",
    ):  # Ubuntu 22.04, and everything that runs on it
        command += ["--platform", f"manylinux_{glibc}_x86_64"]
    environment = {**os.environ, "PYTHONPATH": str(next(tmp_path.glob("pip-*.whl")))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    moved = {canonicalize_name(item["metadata"]["name"]): item for item in json.loads(report.read_text())["install"]}
    versions = {name: f"{COLAB.get(name, 'new')} -> {item['metadata']['version']}" for name, item in moved.items()}
    megabytes = sum(size_of(item["download_info"]["url"]) for item in moved.values()) / 1e6
    print(f"{megabytes:.0f} MB:", ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    record_property("moved", versions)
    assert PINS.keys() <= moved.keys()
    stay = {"torch", "numpy", "pandas", "transformers", "ipykernel", "ipython", "tornado", "ipywidgets"}
    assert not stay & moved.keys(), versions
    assert 50 < megabytes < 150, f"{megabytes:.0f} MB: {versions}"
