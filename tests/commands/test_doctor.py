"""What the doctor finds on a machine where something is wrong; it never fails itself, and is quick without torch."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.commands import doctor
from qlora_helpers.commands.doctor import COURSE, GB, Finding, Report, examine

NEEDS = {
    name: lesson["gigabytes"]
    for name, lesson in json.loads((COURSE / "notebooks/scripts/timings.json").read_text()).items()
}


def found(probe):
    """The findings of one probe, as (kind, text, cure)."""
    report = Report()
    probe(report)
    return [(finding.kind, finding.text, finding.cure) for finding in report.findings]


@pytest.fixture
def versions(monkeypatch):
    """Versions to pretend instead of the installed ones; None for a package that is not installed."""
    other, installed = {}, importlib.metadata.version

    def version(name):
        if other.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return other.get(name) or installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return other


# ---- The whole


def test_the_doctor_finds_nothing_wrong_here(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^gear +\w+ \(by \w+\), matrix products in torch\.\w+$", text, re.M)
    assert re.search(r"^peft +\d+\.\d+", text, re.M) and re.search(r"^runs +.* GB free$", text, re.M)
    assert text.endswith("✓ nothing stands in the way of the lessons\n") and "✗" not in text


def test_the_doctor_names_what_is_wrong_and_the_cure(versions, monkeypatch, capsys):
    versions["peft"] = "0.10.0"
    monkeypatch.setenv("QLORA_GEAR", "warp")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert re.search(
        r'^✗ peft 0\.10\.0 is not in the range >=0\.20: run  .*python.* -m pip install "peft>=0\.20"$', text, re.M
    )
    assert "✗ QLORA_GEAR='warp': choose one of cpu, t4, ampere" in text
    assert "✓" not in text


def test_a_probe_that_fails_is_a_finding_and_the_others_go_on(monkeypatch):
    def damaged():
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(doctor, "_ranges", damaged)
    monkeypatch.setattr(doctor, "_memory_bytes", damaged)
    monkeypatch.setattr(doctor, "runs_folder", damaged)
    texts = [finding.text for finding in examine(torch=False).problems]
    assert [text.partition(" could not be examined: ")[2] for text in texts] == [
        "RuntimeError: the disk is on fire"
    ] * 4
    assert texts[0].startswith("The Python could not") and texts[3].startswith("The main memory could not")


def test_without_torch_it_is_quick():
    started = time.perf_counter()
    report = examine(torch=False)
    assert time.perf_counter() - started < 3  # a tenth of a second on a quiet machine
    assert {"Python", "torch", "runs", "memory"} <= dict(report.facts).keys()


def test_a_finding_is_one_line():
    assert str(Finding("problem", "it is broken", "mend it")) == "✗ it is broken: mend it"
    assert str(Finding("notice", "it is small")) == "· it is small"


# ---- Packages


def test_what_is_missing_is_named_with_its_range(versions):
    versions["trl"] = versions["peft"] = None
    ((kind, text, cure),) = found(doctor._packages)
    assert (kind, text) == ("problem", "not installed: peft, trl")
    assert cure.endswith(' -m pip install "peft>=0.20" "trl>=1.16,<2"')


def test_where_much_is_missing_one_command_installs_all(versions):
    versions |= dict.fromkeys(("torch", "transformers", "peft", "trl"))
    ((_, _, cure),) = found(doctor._packages)
    assert cure.endswith("requirements.txt") and " -r " in cure


@pytest.mark.parametrize("version", ["6.0.0", "not a version"])
def test_a_version_that_is_too_new_or_none_is_no_fit(version, versions):
    versions["transformers"] = version
    ((kind, text, _),) = found(doctor._packages)
    assert kind == "problem" and text.startswith(f"transformers {version} is not in the range ") and ">=5.15" in text


def test_without_the_course_s_folder_the_ranges_are_those_of_the_installed_package(tmp_path, monkeypatch):
    with_it = doctor._ranges()
    monkeypatch.setattr(doctor, "COURSE", tmp_path)
    python, packages = doctor._ranges()
    assert python == with_it[0]
    assert {str(doctor._requirement(line)) for line in packages} == {
        str(doctor._requirement(line)) for line in with_it[1]
    }


def test_a_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.4")
    ((kind, text, cure),) = found(doctor._python)
    assert (kind, text) == ("problem", "Python 3.10.4 is too old: the course needs >=3.11") and "make PYTHON=" in cure


def test_a_tool_that_is_missing_is_a_notice_of_what_it_is_for(versions):
    versions["jupyterlab"] = None
    ((kind, text, cure),) = found(doctor._tools)
    assert kind == "notice" and "`make lab`" in text and cure.endswith("pip install jupyterlab")


def test_colab_needs_no_jupyterlab(versions, monkeypatch):
    versions["jupyterlab"] = None
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert found(doctor._tools) == []


# ---- The kernel


def of_kernel():
    return [finding for finding in found(doctor._kernel) if "kernel" in finding[1]]


def kernel_that_starts(program, tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = [str(program), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    return folder


@pytest.mark.parametrize("program", ["python", sys.executable])
def test_a_kernel_of_this_python_is_no_finding(program, tmp_path, monkeypatch):
    kernel_that_starts(program, tmp_path, monkeypatch)
    assert of_kernel() == []


def test_a_kernel_of_another_python_is_a_problem(tmp_path, monkeypatch):
    other = tmp_path / "other" / "bin" / "python"
    other.parent.mkdir(parents=True)
    shutil.copy(Path(sys.executable).resolve(), other)
    folder = kernel_that_starts(other, tmp_path, monkeypatch)
    ((kind, text, cure),) = of_kernel()
    assert kind == "problem" and text.startswith(f"the kernel `python3` starts {other}, and not this Python")
    assert f"remove {folder}" in cure and "ipykernel install --sys-prefix" in cure
    other.unlink()
    ((_, text, _),) = of_kernel()
    assert text == f"the kernel `python3` starts {other}, which is not there"


def test_another_copy_of_the_course_that_notebooks_use_is_named(tmp_path, monkeypatch):
    installed = namedtuple("distribution", "read_text")(lambda name: json.dumps({"url": tmp_path.as_uri()}))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    ((kind, text, _),) = [finding for finding in found(doctor._kernel) if "course" in finding[1]]
    assert (kind, text) == ("notice", f"this is the course in {COURSE}, and notebooks use the one in {tmp_path}")


# ---- Disk, folders, memory


def test_runs_that_cannot_be_written_are_a_problem(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_RUNS", "file/runs")
    ((kind, text, cure),) = found(doctor._runs)
    assert kind == "problem" and "the lessons' runs cannot write to file/runs (QLORA_RUNS): Not a directory" in text
    assert cure == "set QLORA_RUNS to a folder of your own"


def test_a_read_only_checkout_is_a_problem(monkeypatch):
    def read_only(folder):
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(doctor, "probe_writing", read_only)
    one, two = found(doctor._runs)
    assert one[0] == two[0] == "problem" and one[1].endswith("Read-only file system")
    assert "QLORA_RUNS" in one[2] and "--output" in two[2]


def test_a_full_disk_is_a_problem(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(3 * 10**6))
    one, two = found(doctor._runs)
    assert one[0] == "problem" and "0.00 GB free" in one[1] and "free some, or set QLORA_RUNS" in one[2]
    assert two[0] == "problem" and "--output" in two[2]


def test_too_little_memory_names_the_lessons_that_need_more(monkeypatch):
    few = sorted(set(NEEDS.values()))[-2]  # enough for all but those that need the most
    short = [int(name[:2]) for name, need in NEEDS.items() if need > few]
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: (int(few * GB), int(few * GB)))
    ((kind, text, _),) = found(doctor._memory)
    assert kind == "problem" and [int(number) for number in re.findall(r"\b(\d+) \(", text)] == short
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: (10 * GB, int(few * GB)))
    ((kind, text, cure),) = found(doctor._memory)
    assert kind == "notice" and "close other programs" in cure


# ---- torch


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "torch does not work: the process was killed by SIGILL",
        ),
        ("raise ImportError('libcudart.so.13: cannot open')", "ImportError: libcudart.so.13: cannot open"),
        ("import time; time.sleep(9)", "torch was not imported within 0.2 s"),
    ],
)
def test_a_broken_torch_is_a_problem(program, said, monkeypatch):
    monkeypatch.setattr(doctor, "ASK_TORCH", program)
    if "sleep" in program:
        monkeypatch.setattr(doctor, "SECONDS", 0.2)
    ((kind, text, cure),) = found(doctor._torch)
    assert kind == "problem" and said in text and '--force-reinstall "torch>=' in cure


ANSWER = {"torch": "2.13.0", "threads": 2, "gear": "t4", "chosen_by": "detection", "gpu_name": "Tesla P100", "gpu_bytes": 2**34,
          "capability": [6, 0], "native_bfloat16": False, "dtype": "torch.float16"}  # fmt: skip


@pytest.mark.parametrize(("capability", "wrong"), [([6, 0], True), ([7, 5], False)])
def test_a_gpu_that_is_too_old_is_a_problem(capability, wrong, monkeypatch):
    answer = json.dumps(ANSWER | {"capability": capability})
    monkeypatch.setattr(doctor, "ASK_TORCH", f"print('found', {answer!r})")
    problems = [text for kind, text, _ in found(doctor._torch) if kind == "problem"]
    assert problems == ["Tesla P100 has a compute capability below 7.5"] * wrong


def test_a_disk_without_room_for_the_model_of_lesson_4_is_a_notice(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(2 * GB))
    ((kind, text, cure),) = found(doctor._hub)
    assert kind == "notice" and text.startswith("lesson 4's last part downloads 3.1 GB") and "HF_HOME" in cure


def test_the_hub_s_cache_is_in_the_home_folder_unless_hf_home_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(2 * GB))
    ((_, text, _),) = found(doctor._hub)
    assert f"into {tmp_path / '.cache' / 'huggingface'}, which has 2.0 GB free" in text
    (tmp_path / ".cache/huggingface/hub" / f"models--{doctor.HUB_MODEL.replace('/', '--')}" / "snapshots/1").mkdir(
        parents=True
    )
    assert found(doctor._hub) == []  # it has been downloaded already


# ---- The command


def test_a_dash_reads_the_error_from_standard_input_and_a_text_does_not(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sys, "stdin", namedtuple("stdin", "read")(lambda: asked.append("read") or "CUDA out of memory"))
    assert main(["doctor", "--error", "CUDA out of memory"]) == 0
    said = capsys.readouterr().out
    assert asked == [] and "out of memory" in said
    assert main(["doctor", "--error", "-"]) == 0
    assert asked == ["read"] and capsys.readouterr().out == said
    assert main(["doctor", "--error", "no such thing"]) == 1


def test_problems_are_printed_after_notices(monkeypatch, capsys):
    report = Report()
    report.fact("Python", "3.12")
    report.problem("broken", "mend it")
    report.notice("small")
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == ["Python          3.12", "", "· small", "✗ broken: mend it"]


def test_the_doctor_starts_where_nothing_is_installed(tmp_path):
    """-S: without the folder of installed packages, as in an environment that is yet to be made, or is an old one."""
    environment = os.environ | {"PYTHONPATH": str(COURSE)}

    def call(*arguments):
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = call("-c", "from qlora_helpers.commands import doctor, preflight")
    assert done.returncode == 0, done.stderr
    done = call("-m", "qlora_helpers", "doctor")  # with all other commands, which are parsed beside it
    assert done.returncode == 1 and "torch" in done.stdout and not done.stderr
    for command in (["run"], ["data", str(COURSE / "data" / "examples" / "people.csv")]):
        done = call("-m", "qlora_helpers", *command)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and " has no package " in done.stderr
        assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
