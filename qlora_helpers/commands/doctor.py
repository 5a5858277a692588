"""`python -m qlora_helpers doctor`: what this machine has, what stands in the way of the lessons, and the cure.

Each probe looks at one thing. A probe that fails is itself a finding, so that the doctor answers even on a machine where
much is broken; torch is imported in a separate process, which may crash. Nothing here needs an installed package.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from qlora_helpers.commands.doctor_model import examine_model
from qlora_helpers.course import troubleshooting
from qlora_helpers.paths import COURSE, data_path
from qlora_helpers.safe_folders import probe_writing
from qlora_helpers.training.run_folder import runs_folder
from qlora_helpers.units import GB, GIB

__all__ = ["Finding", "Report", "add_arguments", "command", "examine"]

RUNS_BYTES = 10**9  # lesson 4 writes 18 MB with the shipped model, and 0.3 GB with one of 1.5B on a GPU
HUB_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"  # what lesson 4 downloads on a GPU
TOOLS = {  # needed by some commands only, and not by the package
    "jupyterlab": "the lessons cannot be opened in JupyterLab (`make lab`)",
    "ipykernel": "no notebook can run in this environment",
    "nbval": "`make test` cannot check the lessons",
    "pytest": "`make test` cannot run",
    "jupytext": "`make notebooks` cannot build the lessons",
}
SECONDS = 180  # for importing torch, which is slow from a cold disk


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the course needs it.

    Attributes:
        kind: "problem" if it stands in the way of a lesson, else "notice".
        text: what was found, with its value.
        cure: what to do about it; "" if nothing need be done.
    """

    kind: str
    text: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{'✗' if self.kind == 'problem' else '·'} {self.text}{': ' + self.cure if self.cure else ''}"


@dataclass
class Report:
    """What was found.

    Attributes:
        facts: what this machine has: (name, value), in the order in which it was looked at.
        findings: what is not as the course needs it.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == "problem"]

    def fact(self, name: str, value: str) -> None:
        self.facts.append((name, value))

    def problem(self, text: str, cure: str) -> None:
        self.findings.append(Finding("problem", text, cure))

    def notice(self, text: str, cure: str = "") -> None:
        self.findings.append(Finding("notice", text, cure))


def examine(torch: bool = True) -> Report:
    """Look at this machine; errors on the way are reported, not raised.

    Args:
        torch: also import torch, for the GPU and the gear, which takes seconds. Everything else takes half a second.
    """
    report = Report()
    for probe in (_python, _packages, _tools, _kernel, _course, _runs, _memory, *[_torch] * torch):
        try:
            probe(report)
        except Exception as error:  # whatever it is, it is reported, and the other probes still run
            report.problem(
                f"{probe.__doc__.split(':')[0]} could not be examined: {type(error).__name__}: {error}",
                "repair what this names, and run the doctor again",
            )
    return report


def _pip(*arguments: str) -> str:
    """A command line of pip for this Python."""
    words = [_here(Path(sys.executable)), "-m", "pip", "install", *arguments]
    return "run  " + " ".join(f'"{word}"' if re.search(r"[<>\s]", word) else word for word in words)


def _here(path: Path) -> str:
    """A path as one would type it in the working folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _lessons(needs: dict[str, float], have: float) -> str:
    """The lessons that need more memory than there is, such as "lessons 4 (0.9 GB) and 7 (0.9 GB)"."""
    short = [f"{int(name[:2])} ({need} GB)" for name, need in needs.items() if need > have]
    return f"lesson{'s' * (len(short) > 1)} {' and '.join([', '.join(short[:-1])] * (len(short) > 1) + short[-1:])}"


def _ranges() -> tuple[str, list[str]]:
    """The Python and the packages that the course needs, from pyproject.toml, or from the installed package's own data."""
    if (COURSE / "pyproject.toml").is_file():
        project = tomllib.loads((COURSE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]
    installed = importlib.metadata.metadata("qlora-helpers")
    return installed["Requires-Python"], installed.get_all("Requires-Dist") or []


def _python(report: Report) -> None:
    """The Python: its version, and where it is."""
    version = platform.python_version()
    report.fact("Python", f"{version} on {platform.system()} {platform.machine()}, {sys.executable}")
    oldest = re.search(r">=\s*(\d+)\.(\d+)", _ranges()[0])
    if oldest and sys.version_info < tuple(map(int, oldest.groups())):
        report.problem(
            f"Python {version} is too old: the course needs {_ranges()[0]}",
            "make PYTHON=python3.12 in the course's folder",
        )


def _packages(report: Report) -> None:
    """The packages: whether each is there, in a version that the course works with."""
    missing = []
    for line in _ranges()[1]:
        name, wanted = re.match(r"[\w.-]+", line)[0], line.replace(" ", "")
        version = _version(name)
        report.fact(name, version or "missing")
        if version is None:
            missing.append(wanted)
            continue
        specifier = _requirement(line).specifier
        try:
            fits = specifier.contains(version, prereleases=True)
        except ValueError:  # not a version
            fits = False
        if not fits:
            report.problem(f"{name} {version} is not in the range {specifier}", _pip(wanted))
    if missing:
        names = ", ".join(re.match(r"[\w.-]+", line)[0] for line in missing)
        pins = COURSE / "requirements.txt"
        many = len(missing) > 3 and pins.is_file()
        cure = _pip("-r", _here(pins)) if many else _pip(*missing)
        report.problem(f"not installed: {names}", cure)


def _version(name: str) -> str | None:
    """The version of an installed package; None if it is not there, or its metadata is damaged."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _requirement(line: str):
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with other packages, and may be missing; pip has a copy
        from pip._vendor.packaging.requirements import Requirement
    return Requirement(line)


def _tools(report: Report) -> None:
    """The tools: what opens and checks the notebooks."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ or any(name.startswith("COLAB_") for name in os.environ):
        return  # they have notebooks of their own
    for name, without in TOOLS.items():
        version = _version(name)
        report.fact(name, version or "missing")
        if version is None:
            report.notice(f"{name} is not installed, so {without}", _pip("jupyterlab" if name == "ipykernel" else name))


def _kernel(report: Report) -> None:
    """The Jupyter kernel: whether a notebook opened in this environment runs in this Python, and finds the course."""
    try:
        origin = importlib.metadata.distribution("qlora-helpers").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        report.notice(
            "the course's package is not installed in this environment: notebooks outside the course's folder will not find it",
            _pip("--no-deps", "-e", _here(COURSE)),
        )
    else:
        url = json.loads(origin or "{}").get("url", "")
        if url.startswith("file:") and Path(_path_of(url)).resolve() != COURSE:
            report.notice(
                f"this is the course in {COURSE}, and notebooks use the one in {_path_of(url)}",
                f"work there, or {_pip('--no-deps', '-e', _here(COURSE))}",
            )
    if importlib.util.find_spec("ipykernel") is None or importlib.util.find_spec("jupyter_client") is None:
        return  # reported by the probe of the tools
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    cure = f"{_here(Path(sys.executable))} -m ipykernel install --sys-prefix"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        report.problem("Jupyter has no kernel `python3`, which the lessons need", cure)
        return
    program = spec.argv[0]
    report.fact("kernel", f"python3 starts {program}")
    if re.fullmatch(r"python(3(\.\d+)?)?", program):
        return  # Jupyter uses the Python that it runs in itself
    found = shutil.which(program)
    if found is None:
        report.problem(
            f"the kernel `python3` starts {program}, which is not there", f"remove {spec.resource_dir}, then {cure}"
        )
    elif Path(found).parent.resolve() != Path(sys.executable).parent.resolve():
        report.problem(
            f"the kernel `python3` starts {found}, and not this Python: lessons will not find what is installed here",
            f"remove {spec.resource_dir}, or choose another kernel in the notebook; then {cure}",
        )


def _path_of(url: str) -> str:
    from urllib.request import url2pathname

    return url2pathname(url.removeprefix("file://"))


def _course(report: Report) -> None:
    """The course's files: the small model and the chats."""
    for parts in (("tiny-llama", "model.safetensors"), ("chats", "train.jsonl"), ("chats", "test.jsonl")):
        try:
            path = data_path(*parts)
        except FileNotFoundError as error:
            report.problem(str(error), "get the whole repository again")
            return
        if path.stat().st_size < 1000:
            report.problem(
                f"{path} has {path.stat().st_size} bytes, so its download is not complete", "get the repository again"
            )


def _runs(report: Report) -> None:
    """The folders for runs: whether they can be written, and whether their disk has room."""
    named = "QLORA_RUNS" if os.environ.get("QLORA_RUNS") else None
    for what, folder, cure in (
        ("the lessons' runs", runs_folder(), "set QLORA_RUNS to a folder of your own"),
        ("`run`", Path("runs/latest").absolute(), "name a folder of your own with --output"),
    ):
        parent = next((path for path in (folder, *folder.parents) if path.exists()), folder.anchor)
        try:
            probe_writing(parent)
        except OSError as error:
            report.problem(
                f"{what} cannot write to {_here(folder)}{f' ({named})' if named and what != '`run`' else ''}: "
                f"{error.strerror or error}",
                cure,
            )
            continue
        free = shutil.disk_usage(parent).free
        if what != "`run`":
            report.fact("runs", f"{_here(folder)}, {free / GB:.1f} GB free")
        needed = RUNS_BYTES if what != "`run`" else RUNS_BYTES // 10
        if free < needed:
            report.problem(
                f"{what} need {needed / GB:g} GB of disk, and {_here(folder)} has {free / GB:.2f} GB free".replace(
                    "`run` need", "`run` needs"
                ),
                f"free some, or {cure}",
            )


def _memory(report: Report) -> None:
    """The main memory: what there is, and what each lesson needs."""
    if importlib.util.find_spec("psutil") is None:
        return  # reported by the probe of the packages
    total, available = _memory_bytes()
    report.fact("memory", f"{total / GB:.1f} GB, {available / GB:.1f} GB of it free, {os.cpu_count()} cores")
    timings = COURSE / "notebooks" / "scripts" / "timings.json"
    if not timings.is_file():
        report.notice("the lessons are not next to the package", "work in a copy of the course's repository")
        return
    needs = {name: lesson["gigabytes"] for name, lesson in json.loads(timings.read_text(encoding="utf-8")).items()}
    most = max(needs.values())
    if most > total / GB:
        report.problem(
            f"{total / GB:.1f} GB of main memory is too little for {_lessons(needs, total / GB)}",
            "use a larger machine",
        )
    elif most > available / GB:
        report.notice(
            f"{available / GB:.1f} GB of main memory is free, too little for {_lessons(needs, available / GB)}",
            "close other programs, and shut down the kernels of other notebooks",
        )


def _memory_bytes() -> tuple[int, int]:
    """Main memory of this machine or container, and how much of it is free, in bytes."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's, which psutil does not see
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdecimal():
        used = Path("/sys/fs/cgroup/memory.current")
        total = min(total, int(text))
        available = min(available, int(text) - int(used.read_text(encoding="utf-8")) if used.is_file() else total)
    return total, available


ASK_TORCH = """
import json
import torch
from qlora_helpers.hardware import detect
found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
try:
    hardware = detect()
except ValueError as error:
    found["refused"] = str(error)
else:
    found |= {name: getattr(hardware, name) for name in
              ("gear", "chosen_by", "gpu_name", "gpu_bytes", "capability", "native_bfloat16")}
    found["dtype"] = str(hardware.compute_dtype)
    if hardware.gpu_name:
        torch.ones(1, device="cuda") * 2  # a GPU that torch was not built for is found, and fails here
print("found", json.dumps(found))
"""


def _torch(report: Report) -> None:
    """torch and the GPU: whether torch can be imported, and what it finds. In a separate process, which may crash."""
    if importlib.util.find_spec("torch") is None:
        return  # reported by the probe of the packages
    cure = "install torch again: " + _pip(
        "--force-reinstall", next(line for line in _ranges()[1] if line.startswith("torch>"))
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_TORCH],
            cwd=COURSE,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},  # not that of the doctor's own output
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        report.problem(f"torch was not imported within {SECONDS} s", "try again when the disk is not busy, or " + cure)
        return
    answer = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    if not answer:
        if done.returncode < 0:
            why = f"the process was killed by {signal.Signals(-done.returncode).name}"
        else:
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if "no kernel image" in done.stderr:
            cure = "set QLORA_GEAR=cpu; this torch was not built for the GPU"
        report.problem(f"torch does not work: {why}", cure)
        return
    found = json.loads(answer[-1].removeprefix("found "))
    if "refused" in found:
        report.problem(found["refused"], "set QLORA_GEAR accordingly, or unset it")
        return
    if found["gpu_name"]:
        major, minor = found["capability"]
        report.fact(
            "GPU", f"{found['gpu_name']}, {found['gpu_bytes'] / GIB:.1f} GiB, compute capability {major}.{minor}"
        )
        native = found["native_bfloat16"]
        report.fact("bfloat16", "native" if native else "emulated only, so slow: the course uses float16")
        if (major, minor) < (7, 5):
            report.problem(f"{found['gpu_name']} has a compute capability below 7.5", "set QLORA_GEAR=cpu")
    else:
        report.fact("GPU", f"none that torch {found['torch']} can see")
    report.fact("gear", f"{found['gear']} (by {found['chosen_by']}), matrix products in {found['dtype']}")
    if found["gear"] == "cpu":
        report.notice(
            "the lessons run in the cpu gear, with the shipped model; lesson 4's last part, a model of 1.5B, is left out"
            if not found["gpu_name"]
            else "the GPU is not used: the lessons run in the cpu gear"
        )
    else:
        _hub(report)


def _hub(report: Report) -> None:
    """The Hub's cache: room for the model that lesson 4 downloads on a GPU."""
    from qlora_helpers.memory import find_shape

    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    parent = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    needed, free = 2 * find_shape("Qwen/Qwen2.5-1.5B").parameters, shutil.disk_usage(parent).free
    if free < needed and not any(cache.glob(f"hub/models--{HUB_MODEL.replace('/', '--')}/snapshots/*")):
        report.notice(
            f"lesson 4's last part downloads {needed / GB:.1f} GB into {cache}, which has {free / GB:.1f} GB free",
            "set HF_HOME to a folder on another disk",
        )


# ---- The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--model",
        metavar="FOLDER_OR_NAME",
        help="say what of a model would really be in 4 bits, from its config alone: tiny-llama, a folder, a config.json or a "
        "name of `memory --list`",
    )
    one.add_argument(
        "--error",
        metavar="TEXT",
        help=f"look up an error in {troubleshooting.PAGE}: its message or a whole traceback; - reads it from standard input",
    )


def command(args: argparse.Namespace) -> int:
    """Print what this machine has, or what of a model would be in 4 bits, or the entry for a pasted error.

    Returns 1 if something stands in the way of the lessons, most of the model would not be in 4 bits, or there is no entry.
    """
    if args.model is not None:
        return examine_model(args.model)
    if args.error is not None:
        answer = troubleshooting.search(sys.stdin.read() if args.error == "-" else args.error)
        print(troubleshooting.report(answer))
        return 0 if answer.entry else 1
    report = examine()
    for name, value in report.facts:
        print(f"{name:15} {value}")
    print()
    for finding in sorted(report.findings, key=lambda finding: finding.kind == "problem"):
        print(finding)
    if not report.problems:
        print("✓ nothing stands in the way of the lessons")
    return 1 if report.problems else 0
