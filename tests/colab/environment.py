"""Colab's packages that no lesson names, in the environment of `make test-colab`: a library that finds one may behave
differently, or stop.

`colab/looked-for.txt` lists the packages that the course's libraries look for and that Colab has. A package is
installed at Colab's version if it is small, including its requirements; otherwise it gets a stand-in
(tests/colab/stand_in_package.py), which can be found, imported and asked for its version. It cannot do what the real
package does: using it is an error that names it.

    .venv-colab/bin/python -m tests.colab.environment constraints   print Colab's versions, for pip
    .venv-colab/bin/python -m tests.colab.environment list      make colab/looked-for.txt; only new rows query the index
    .venv-colab/bin/python -m tests.colab.environment install   install these packages and stand-ins for this Python,
                                                                also those that a lesson's set-up has removed
"""

import importlib.metadata
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import ROOT
from tests.colab import stand_in_package
from tests.colab.optional_imports import looked_for, required

LIST = ROOT / "colab" / "looked-for.txt"
HEADER = """\
# What the course's libraries look for and Colab has, beside what they require: tests/colab/environment.py made it.
# Package | what it is imported as | MB of its wheel and of all that it needs, or why a stand-in takes its place.
"""
LARGE = 50  # MB; scikit-learn with scipy, which transformers imports if it is installed, is just below this
# Not pinned to Colab's version: torch and its compiler, which are built for CUDA there; the packages that set up and
# test this environment; and what colab/requirements.txt replaces there (tests/colab/test_setup.py shows it).
MOVES = {"torch", "triton", "pip", "setuptools", "pytest", "datasets", "pyarrow", "huggingface-hub"}
STAND_IN = "stand-in"  # in a stand-in's INSTALLER, instead of pip
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]


def colab_rows() -> list[tuple[str, str, list[Requirement]]]:
    """Colab's packages: name, version and, if listed, the version's requirements."""
    rows = [line.split(" | ") for line in (ROOT / "colab" / "runtime-packages.txt").read_text().splitlines()]
    rows = [row for row in rows if not row[0].startswith("#")]
    return [(*row[0].split("=="), [Requirement(need) for need in row[1:]]) for row in rows]


COLAB = {canonicalize_name(name): version for name, version, _ in colab_rows()}


def libraries() -> list[str]:
    """The libraries that the course requires; their sources are searched."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return [Requirement(line).name for line in tomllib.load(file)["project"]["dependencies"]]


def optional() -> dict[str, set[str]]:
    """Colab's packages that the installed libraries look for but do not require, with the names that they use."""
    always = required(libraries()) | MOVES
    return {name: names for name, names in sorted(looked_for(libraries(), COLAB).items()) if name not in always}


@dataclass(frozen=True)
class Row:
    """A line of the list."""

    package: str
    imports: tuple[str, ...]
    how: str

    @property
    def stands_in(self) -> bool:
        return self.how.startswith("stand-in")

    def __str__(self) -> str:
        return f"{self.package} | {' '.join(self.imports)} | {self.how}"


def listed() -> list[Row]:
    """The committed list."""
    lines = LIST.read_text().splitlines() if LIST.exists() else []
    parts = [line.split(" | ") for line in lines if not line.startswith("#")]
    return [Row(package, tuple(imports.split()), how) for package, imports, how in parts]


# Making the list


def constraints(folder: Path) -> Path:
    """A constraints file: Colab's version of everything, but the installed version of packages in MOVES."""
    here = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
    here = {name: version for name, version in here.items() if name in MOVES or name not in COLAB}
    path = folder / "constraints.txt"
    path.write_text(lines_of_versions() + "".join(f"{name}=={version}\n" for name, version in here.items()))
    return path


def lines_of_versions() -> str:
    """Colab's versions, as pip takes them."""
    return "".join(f"{name}=={version}\n" for name, version in COLAB.items() if name not in MOVES)


def size_of(address: str) -> int:
    """The size in bytes of a file on a package index, without downloading it."""
    if address.startswith("file://"):
        return Path(urllib.request.url2pathname(address.removeprefix("file://"))).stat().st_size
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    head = urllib.request.Request(address, method="HEAD")
    with urllib.request.urlopen(head, context=context, timeout=30) as reply:
        return int(reply.headers["Content-Length"])


def megabytes(package: str, *, alone: bool) -> float | None:
    """The size of a package at Colab's version, alone or with missing requirements; None if pip cannot install it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [*PIP, "install", "--dry-run", "--only-binary=:all:", "--report", report]
        command += ["--no-deps"] if alone else ["--constraint", constraints(Path(folder))]
        if subprocess.run([*command, f"{package}=={COLAB[package]}"], capture_output=True).returncode:
            return None
        files = [item["download_info"]["url"] for item in json.loads(report.read_text())["install"]]
        return sum(map(size_of, files)) / 1e6


def how(package: str) -> str:
    """Whether a package is installed or gets a stand-in, and why."""
    if "+" in COLAB[package]:
        return "stand-in: built for Colab's torch"
    own = megabytes(package, alone=True)
    if own is None:
        return "stand-in: no wheel for this Python"
    if own > LARGE:
        return f"stand-in: {own:.0f} MB"
    size = megabytes(package, alone=False)
    if size is None:
        return "stand-in: what it needs does not fit in here"
    return f"{'stand-in: ' if size > LARGE else ''}{size:.1f} MB"


def top_level(package: str) -> set[str]:
    """The names under which a package is imported, from its wheel; empty if there is no wheel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*PIP, "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        if subprocess.run([*command, f"{package}=={COLAB[package]}"], capture_output=True).returncode:
            return set()
        files = zipfile.ZipFile(next(Path(folder).iterdir())).namelist()
    return {file.partition("/")[0] for file in files if re.fullmatch(r"\w+/__init__\.py", file)}


def make_list() -> None:
    known = {row.package: row for row in listed()}
    rows = []
    for package, names in optional().items():
        row = known.get(package)
        if row is None:
            kind = how(package)
            imports = {name for name in names if name.isidentifier() and canonicalize_name(name) == package}
            if not imports and kind.startswith("stand-in"):
                imports = top_level(package)
            row = Row(package, tuple(sorted(imports)), kind)
            print(row, flush=True)
        rows.append(row)
        LIST.write_text(HEADER + "".join(f"{row}\n" for row in sorted(rows, key=lambda row: row.package)))


# Making the environment


def stand_in(site: Path, package: str, version: str, needs=(), imports=()) -> None:
    """Make a package of only metadata and importable modules; pip lists and removes it like any other.

    Args:
        site: the folder of the packages.
        package, version: what the metadata says.
        needs: requirements that the metadata lists.
        imports: names of modules.
    """
    folder = site / f"{package.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    files = [folder / name for name in ("METADATA", "INSTALLER", "top_level.txt", "RECORD")]
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {package}",
        f"Version: {version}",
        *(f"Requires-Dist: {n}" for n in needs),
    ]
    for file, text in zip(files, ("\n".join(lines) + "\n", f"{STAND_IN}\n", "\n".join(imports), ""), strict=True):
        file.write_text(text)
    if imports:
        shutil.copy(stand_in_package.__file__, site)
    for name in imports:
        module = site / name / "__init__.py"
        module.parent.mkdir()
        module.write_text(f'import stand_in_package\n\nstand_in_package.become(__name__, "{version}")\n')
        files.append(module)
    (folder / "RECORD").write_text("".join(f"{file.relative_to(site).as_posix()},,\n" for file in files))


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def remove_stand_ins(site: Path) -> None:
    """Remove the stand-ins, and what an uninstall has left of one."""
    for installer in site.glob("*.dist-info/INSTALLER"):
        if installer.read_text().strip() == STAND_IN:
            for module in installer.with_name("top_level.txt").read_text().split():
                shutil.rmtree(site / module)
            shutil.rmtree(installer.parent)
    for row in listed():
        if row.stands_in and installed(row.package) is None:
            for module in row.imports:
                shutil.rmtree(site / module, ignore_errors=True)  # a __pycache__ that pip does not know


def install(site: Path) -> None:
    """Install the small packages, and stand-ins for the rest; quick if everything is installed already."""
    remove_stand_ins(site)  # otherwise pip takes them for the real packages
    rows = listed()
    missing = [row.package for row in rows if not row.stands_in and not same(row.package, installed(row.package))]
    with tempfile.TemporaryDirectory() as folder:
        if missing:
            command = [*PIP, "install", "--only-binary=:all:", "--constraint", str(constraints(Path(folder)))]
            subprocess.run([*command, *(f"{package}=={COLAB[package]}" for package in missing)], check=True)
    for row in rows:
        if row.stands_in:
            stand_in(site, row.package, COLAB[row.package], imports=row.imports)
    stand_ins = sum(row.stands_in for row in rows)
    print(
        f"Other packages on Colab that the libraries look for: {len(rows) - stand_ins} packages, {stand_ins} stand-ins."
    )


def same(package: str, version: str | None) -> bool:
    """Whether an installed version is Colab's; a stand-in's includes the local part."""
    return version is not None and Version(version) == Version(COLAB[package])


if __name__ == "__main__":
    site = Path(sysconfig.get_path("purelib"))
    commands = {
        "constraints": lambda: print(lines_of_versions()),
        "list": make_list,
        "install": lambda: install(site),
    }
    commands[sys.argv[1]]()
