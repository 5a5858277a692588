"""Install what Colab or Kaggle lacks for the course, use one GPU, and say in which gear the lessons run.

The first cell of each Colab edition runs this file. A second run installs nothing, and no run needs a restart as long
as it is the first thing that a session does.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

COURSE = Path(__file__).resolve().parents[1]
# Colab's image has COLAB_ variables, and Kaggle's image is made from it: Kaggle is asked first.
KAGGLE = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
COLAB = any(name.startswith("COLAB_") for name in os.environ)
# pip may not replace these. torch fits the runtime's CUDA; the others, a session may have imported before.
KEPT = ("torch", "numpy", "pandas", "transformers", "ipykernel", "ipython", "tornado", "ipywidgets")


class SetUpStopped(RuntimeError):
    """Something that the learner can cure: a notebook shows the sentence alone, without a traceback."""

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
    """What must be installed: pinned packages at another version, and others that are not there at all."""
    lines = (COURSE / "colab" / "requirements.txt").read_text().splitlines()
    pins = {pin.name: pin for pin in map(Requirement, [line for line in lines if line and not line.startswith("#")])}
    others = [known for known in known_ranges() if known.name not in pins and installed(known.name) is None]
    for known in others:
        if known.name in ("torch", "numpy", "transformers"):
            raise SetUpStopped(
                f"{known.name} is not installed, and this cell leaves it to Colab or Kaggle. "
                "On a machine of your own, run  make run  in the course's folder, and choose its .venv as the kernel."
            )
    return [pin for pin in pins.values() if not fulfilled(pin)] + others


def install(requirements: list[Requirement]) -> None:
    """Install them beside what the runtime has.

    Raises:
        SetUpStopped: pip failed, or the session had imported a package before pip replaced it.
    """
    names = ", ".join(str(requirement).replace("==", " ") for requirement in requirements)
    modules = {name.partition(".")[0] for name in sys.modules}
    imported = {name: installed(name) for name in modules if name and installed(name)}
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept.txt")
        kept.write_text("".join(f"{name}=={installed(name)}\n" for name in KEPT if installed(name)))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        done = subprocess.run(
            [*pip, "--constraint", str(kept), *map(str, requirements)], capture_output=True, text=True
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])  # the first error says most
        if "ResolutionImpossible" in done.stderr:
            cure = "they do not fit this runtime's packages; take the newest runtime"
        elif KAGGLE:
            cure = "switch the Internet on (Settings → Turn on internet), and run this cell again"
        else:
            cure = "make sure that this machine reaches the Internet, and run this cell again"
        raise SetUpStopped(f"pip could not install {names}: {cure}. pip says: {reason.removeprefix('ERROR: ')}")
    importlib.invalidate_caches()  # else Python may look for the new packages in a listing from before
    print(f"Installed {names}.")
    replaced = sorted(name for name, version in imported.items() if installed(name) != version)
    if replaced:
        raise SetUpStopped(
            f"this session had imported {', '.join(replaced)} before it was replaced. Restart the session "
            f"({'Run' if KAGGLE else 'Runtime'} → Restart session), and run the cells from the top."
        )


def warn_of_other_versions() -> None:
    """Name what the runtime has in versions that the course does not know; it may well work."""
    others = [f"{r.name} {installed(r.name)} (known: {r.specifier})" for r in known_ranges() if not fulfilled(r)]
    if others:
        print(f"Not tried with the course: {', '.join(others)}. If a lesson fails, take the newest runtime.")


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
    """Say in which gear the lessons run, and without a GPU how to get one."""
    from qlora_helpers.hardware import detect  # imports torch: after the choice of the GPU

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
    if KAGGLE:  # the course may lie among the inputs, which are read-only
        os.environ.setdefault("QLORA_RUNS", str(Path.cwd() / "runs"))
    requirements = missing()
    if requirements:
        install(requirements)
    warn_of_other_versions()
    use_one_gpu()
    if importlib.util.find_spec("qlora_helpers") is None:
        sys.path.insert(0, str(COURSE))
    report()


if __name__ == "__main__":
    main()
