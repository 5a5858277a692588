"""Install what Colab or Kaggle lacks for the course, remove packages that its libraries refuse to work beside, use one
GPU, and say in which gear the lessons run.

The first cell of each Colab edition runs this file. A second run finds everything in place, unless something was
installed, removed or uploaded since. No restart is needed if this is the first thing that a session runs.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

COURSE = Path(__file__).resolve().parents[1]
# Colab's image has COLAB_ variables, and Kaggle's image is made from it, so check for Kaggle first.
KAGGLE = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
COLAB = any(name.startswith("COLAB_") for name in os.environ)
# pip must not replace these. torch matches the runtime's CUDA; a session may have imported the others already.
KEPT = ("torch", "numpy", "pandas", "transformers", "ipykernel", "ipython", "tornado", "ipywidgets")
# Libraries that refuse to work beside an optional package of the wrong version, and the file with their own checks: if
# is_x_available raises ImportError although package x is installed, x is in the way.
CHECKS = {"peft": "peft/import_utils.py"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


class SetUpStopped(RuntimeError):
    """Something that the learner can fix: a notebook shows only the sentence, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"The set-up stopped: {self}"]


def installed(name: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def fulfilled(requirement: Requirement) -> bool:
    version = installed(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def known_ranges() -> list[Requirement]:
    """The versions that the course is known to work with."""
    with (COURSE / "pyproject.toml").open("rb") as file:
        return [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]


def missing() -> list[Requirement]:
    """What must be installed: pinned packages with another version, and others that are missing."""
    lines = (COURSE / "colab" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = {pin.name: pin for pin in map(Requirement, [line for line in lines if line and not line.startswith("#")])}
    others = [known for known in known_ranges() if known.name not in pins and installed(known.name) is None]
    for known in others:
        if known.name in ("torch", "numpy", "transformers"):
            raise SetUpStopped(
                f"{known.name} is not installed, and this cell leaves it to Colab or Kaggle. "
                "On your own machine, run  make run  in the course's folder, and choose its .venv as the kernel."
            )
    return [pin for pin in pins.values() if not fulfilled(pin)] + others


def imported() -> dict[str, str]:
    """The packages that this session has imported, and their versions."""
    modules = {name.partition(".")[0] for name in sys.modules}
    return {name: version for name in modules if name and (version := installed(name))}


def told(output: str) -> str:
    """The reason that pip gives: its first error, or its last line."""
    lines = [line for line in output.splitlines() if line.strip()] or ["nothing"]
    return next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR: ")


def restart_if_changed(before: dict[str, str]) -> None:
    """Stop if imported packages have changed: Python may keep using the old code, or mix it with the new.

    Raises:
        SetUpStopped: a package that was already imported has been replaced or removed.
    """
    importlib.invalidate_caches()  # else Python may look for packages in an old listing
    changed = sorted(name for name, version in before.items() if installed(name) != version)
    if changed:
        raise SetUpStopped(
            f"this session had imported {', '.join(changed)} before it was removed or replaced. Restart the session "
            f"({'Run' if KAGGLE else 'Runtime'} → Restart session), and run the cells from the top."
        )


def install(requirements: list[Requirement]) -> None:
    """Install these beside the runtime's packages.

    Raises:
        SetUpStopped: pip failed.
    """
    names = ", ".join(str(requirement).replace("==", " ") for requirement in requirements)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept.txt")
        kept.write_text("".join(f"{name}=={installed(name)}\n" for name in KEPT if installed(name)), encoding="utf-8")
        command = [*PIP, "install", "--quiet", "--constraint", str(kept), *map(str, requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if "ResolutionImpossible" in done.stderr:
            cure = "they do not fit this runtime's packages; take the newest runtime"
        elif KAGGLE:
            cure = "switch the Internet on (Settings → Turn on internet), and run this cell again"
        else:
            cure = "make sure that this machine reaches the Internet, and run this cell again"
        raise SetUpStopped(f"pip could not install {names}: {cure}. pip says: {told(done.stderr)}")
    print(f"Installed {names}.")


def refused() -> dict[str, str]:
    """The installed packages that a library refuses to work beside, and the library that refuses.

    The libraries' own checks decide, so the answer fits the installed versions. Only the checks are run: importing all
    of PEFT takes longer than the rest of the set-up.
    """
    found = {}
    for library, file in CHECKS.items():
        path = Path(importlib.metadata.distribution(library).locate_file(file))
        for name, check in runpy.run_path(str(path)).items() if path.is_file() else ():
            package = re.fullmatch(r"is_(\w+)_available", name)
            if package and installed(package[1]):
                try:
                    check()
                except ImportError:
                    found[package[1]] = library
    return found


def remove(packages: dict[str, str]) -> None:
    """Remove what a library refuses to work beside. That is quick, works offline, and needs no version that fits the
    runtime's torch. Of Colab's packages, torchtune needs its torchao; the next session has it again.

    Args:
        packages: the packages, and the library that refuses each.

    Raises:
        SetUpStopped: this is not Colab or Kaggle, where packages come back with the next session, or pip failed.
    """
    for name, library in packages.items():
        what = f"{name} {installed(name)}, which {library} {installed(library)} refuses to work beside"
        if not (COLAB or KAGGLE):
            raise SetUpStopped(
                f"there is {what}. Upgrade it (pip install --upgrade {name}), or remove it (pip uninstall {name}), "
                "then restart the kernel, and run this cell again."
            )
        done = subprocess.run([*PIP, "uninstall", "--yes", name], capture_output=True, text=True)
        importlib.invalidate_caches()
        if done.returncode or installed(name):
            reason = told(done.stderr) if done.returncode else f"it is still there. {told(done.stdout)}"
            raise SetUpStopped(
                f"pip could not remove {what}. In a new cell run  %pip install --upgrade {name}  "
                f"then restart the session, and run the cells from the top. pip says: {reason}"
            )
        print(f"Removed {what}; no lesson uses it.")


def warn_of_other_versions() -> None:
    """Name the packages whose versions the course has not been tried with; they may well work."""
    others = [f"{r.name} {installed(r.name)} (known: {r.specifier})" for r in known_ranges() if not fulfilled(r)]
    if others:
        print(f"Not tried with the course: {', '.join(others)}. If a lesson fails, take the newest runtime.")


def warn_of_other_courses(found: list[Path], notebook_version: str | None) -> None:
    """Say which course is used if there are several, or if the notebook was made with another version of it.

    Args:
        found: the courses that the set-up cell has found.
        notebook_version: the version of the course that the notebook comes from; None if it does not say.
    """
    others = [str(place) for place in dict.fromkeys(place.resolve() for place in found) if place != COURSE]
    if others:
        print(f"The course in {COURSE} is used, and not the one in {' or '.join(others)}.")
    with (COURSE / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    if notebook_version not in (None, version):
        print(f"This notebook is of version {notebook_version}, but the course in {COURSE} is version {version}.")
        print("If a lesson fails, take both from the same version.")


def use_this_course() -> None:
    """Let `import qlora_helpers` find the package of this course, also if another one is installed.

    Raises:
        SetUpStopped: this session has already imported the package of another course.
    """
    importlib.invalidate_caches()  # this folder may be new
    package = importlib.util.find_spec("qlora_helpers")
    if package and package.origin and Path(package.origin).resolve().parents[1] == COURSE:
        return
    if "qlora_helpers" in sys.modules:
        raise SetUpStopped(
            f"this session has imported another course than the one in {COURSE}. Restart the session "
            f"({'Run' if KAGGLE else 'Runtime'} → Restart session), and run the cells from the top."
        )
    sys.path.insert(0, str(COURSE))


def use_one_gpu() -> None:
    """Hide all GPUs but the first: with more, the Trainer uses DataParallel, which TRL refuses. Before torch starts."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:  # no driver, so no GPU
        return
    gpus = sum(line.startswith("GPU ") for line in listed.splitlines())
    if gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        print(f"There are {gpus} GPUs. The course uses the first: CUDA_VISIBLE_DEVICES=0.")


def report() -> None:
    """Say in which gear the lessons run, and how to get a GPU if there is none."""
    from qlora_helpers.hardware import detect  # imports torch, so only after the choice of the GPU

    hardware = detect()
    if hardware.gpu_name:
        print(f"Set-up is complete: {hardware.gpu_name}, {hardware.gear} gear.")
        return
    print("Set-up is complete. There is no GPU: the lesson runs in the cpu gear.")
    if KAGGLE:
        print("To switch one on: Settings → Accelerator → GPU T4 x2, then run this cell again.")
    elif COLAB:
        print("To switch one on: Runtime → Change runtime type → T4 GPU, then run this cell again.")


def main() -> None:
    if KAGGLE:  # the course may be among the inputs, which are read-only
        os.environ.setdefault("QLORA_RUNS", str(Path.cwd() / "runs"))
    # the set-up cell passes both as globals
    warn_of_other_courses(globals().get("found", []), globals().get("notebook_version"))
    use_this_course()
    before = imported()
    requirements = missing()
    if requirements:
        install(requirements)
        restart_if_changed(before)
    warn_of_other_versions()
    use_one_gpu()
    in_the_way = refused()  # imports torch, so only after the choice of the GPU
    if in_the_way:
        remove(in_the_way)
        restart_if_changed(before)
    report()


if __name__ == "__main__":
    main()
