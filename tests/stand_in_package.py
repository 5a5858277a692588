"""What a stand-in imports: a package that can be found, imported and asked for its version, and for nothing else.

It is copied beside the stand-ins, which are too large for a test environment, or built for another torch. An error of
any other kind would do: libraries take an ImportError or an AttributeError for "not installed", and would go another way
than on the machine that the stand-in is for.
"""

import importlib.abc
import sys

VERSIONS: dict[str, str] = {}


class StandInUsed(RuntimeError):
    """Something of a package was used that is only stood in for."""

    def __init__(self, name: str):
        package = name.partition(".")[0]
        super().__init__(
            f"{name} was used, but {package} {VERSIONS[package]} is a stand-in here, which has a version and nothing "
            "else. If a lesson needs it, this environment needs the real one: see looked-for.txt."
        )


class NoSubmodules(importlib.abc.MetaPathFinder):
    """Stops `import tensorflow.python` as `tensorflow.python` itself is stopped."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in VERSIONS:
            raise StandInUsed(fullname)


def become(name: str, version: str) -> None:
    """Make the module of this name a stand-in."""

    def refuse(attribute: str):
        if attribute.startswith("__"):  # Python asks every module for such, and takes no for an answer
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        raise StandInUsed(f"{name}.{attribute}")

    VERSIONS[name] = version
    sys.modules[name].__version__ = version
    sys.modules[name].__getattr__ = refuse
    if not any(isinstance(finder, NoSubmodules) for finder in sys.meta_path):
        sys.meta_path.append(NoSubmodules())
