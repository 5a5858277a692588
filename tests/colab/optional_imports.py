"""Which optional packages the installed libraries look for, found in their sources.

A library looks for a package if it imports it anywhere, even in a function or a `try`, or queries it by name:
`find_spec("x")`, `is_package_available("x")`, `importlib.metadata.version("x")`, `"x" in sys.modules`, "pip install x".
Nothing is imported here, so nothing needs to work.
"""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

IMPORTS = re.compile(r"import_module|__import__|importorskip")
CHECKS = re.compile(r"find_spec|package_available|_get_version")
NAME = re.compile(r"[A-Za-z_][\w.-]*")
ADVICE = re.compile(r"pip3? install ((?:[\w.\[\]=<>~-]+ ?)+)")  # what an error tells a user to install
# What can name a package in a source: words in import lines, and quoted names. Much faster than parsing it.
HINTS = re.compile(r"""^\s*(?:>>> )?(?:import|from)\s(.*)|["']([A-Za-z_][\w.-]*)["']|pip3? install (.*)""", re.M)


def names_in(source: str) -> set[str]:
    """The packages and modules that a module imports or queries, as written; relative imports are left out."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # for a newer Python, or a broken sample: this Python cannot import it either
        return set()
    names: set[str] = set()
    strings: set[str] = set()
    checks_a_variable = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Compare) and "sys.modules" in map(ast.unparse, node.comparators):
            names |= {node.left.value} if isinstance(node.left, ast.Constant) else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings |= {node.value} if NAME.fullmatch(node.value) else set()
            for advice in ADVICE.findall(node.value):
                names |= {match.group() for word in advice.split() if (match := NAME.match(word))}
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            check = bool(CHECKS.search(function)) or re.search(r"metadata\.(version|metadata|distribution)$", function)
            if check or IMPORTS.search(function):
                asked = {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
                names |= {name for name in asked if NAME.fullmatch(name)}
                checks_a_variable |= bool(check and node.args and not asked)
    # The module's checks go through its own table: any of its strings may be a package's name.
    return names | strings if checks_a_variable else names


def prefixes(name: str) -> Iterator[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def sources(distribution: str) -> Iterator[Path]:
    """The Python files of an installed distribution."""
    installed = importlib.metadata.distribution(distribution)
    return (Path(installed.locate_file(f)) for f in installed.files or () if f.suffix == ".py" and ".." not in f.parts)


def required(distributions: Iterable[str]) -> set[str]:
    """These distributions and everything that they require, by canonical name."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in distributions]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            try:
                needs = map(Requirement, importlib.metadata.requires(name) or [])
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [canonicalize_name(n.name) for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]
    return found


def looked_for(libraries: Iterable[str], packages: Iterable[str]) -> dict[str, set[str]]:
    """Which of the packages the libraries look for, and under which names.

    The metadata of installed packages gives an import name's distribution; otherwise both have the same name. If a
    distribution that is not installed has another import name, the libraries' own extras and advice ("pip install
    opencv-python") name it.

    Args:
        libraries: installed distributions, whose sources are read.
        packages: distributions of another machine, such as Colab; they need not be installed here.

    Returns:
        For each distribution, by canonical name, the names used in the sources.
    """
    wanted = {canonicalize_name(name) for name in packages}
    provided = {
        name: {canonicalize_name(d) for d in owners} & wanted
        for name, owners in importlib.metadata.packages_distributions().items()
    }

    def owners(name: str) -> set[str]:
        if name.partition(".")[0] in sys.stdlib_module_names:
            return set()
        return provided.get(name, set()) | ({canonicalize_name(name)} & wanted)  # both: google is also a namespace

    found: dict[str, set[str]] = {}
    known: set[str] = set()  # names that are already found
    for library in libraries:
        for need in map(Requirement, importlib.metadata.requires(library) or []):
            for owner in {canonicalize_name(need.name)} & wanted:
                found.setdefault(owner, set()).add(need.name)
        for path in sources(library):
            text = path.read_text(encoding="utf-8", errors="replace")
            hints = {word for hint in HINTS.findall(text) for word in NAME.findall(" ".join(hint))}
            hints = {name for hint in hints for name in prefixes(hint)}
            if any(owners(hint) for hint in hints - known):
                names = {prefix for name in names_in(text) for prefix in prefixes(name)}
                for name in names - known:
                    for owner in owners(name):
                        found.setdefault(owner, set()).add(name)
                        known.add(name)
    return found
