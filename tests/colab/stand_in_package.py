"""What a stand-in imports: a package that can be found, imported and asked for its version and its names, and does nothing.

Libraries import names from what they find, and pass them around, before anything uses them: so a stand-in has every name
and every submodule. What is done with a name is an error, and of a kind that no library takes for "not installed", else it
would go another way than on the machine that the stand-in is for. A stand-in cannot show which names the real one has.

This file is copied beside the stand-ins, which are too large for a test environment, or built for another torch.
"""

import importlib.abc
import importlib.machinery
import sys

VERSIONS: dict[str, str] = {}


class StandInUsed(RuntimeError):
    """Something of a package was used that is only stood in for."""

    def __init__(self, name: str):
        package = name.partition(".")[0]
        super().__init__(
            f"{name} was used, but {package} {VERSIONS[package]} is a stand-in here, which does nothing. "
            "If a lesson needs it, this environment needs the real one: see colab/looked-for.txt."
        )


class Name:
    """Something of a stand-in. It can be named, also in a type, but not called, subclassed, read or counted."""

    def __init__(self, name: str):
        self.__name__ = name

    def __repr__(self):
        return f"<{self.__name__}, of a stand-in>"

    def __getattr__(self, attribute: str):
        return attribute_of(self.__name__, attribute)

    def __or__(self, other):  # Image | None, in a signature
        return self

    __ror__ = __or__

    def __instancecheck__(self, instance):
        return False  # nothing can have made one

    __subclasscheck__ = __instancecheck__

    def _refuse(self, *arguments, **options):
        raise StandInUsed(self.__name__)

    __call__ = __mro_entries__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __enter__ = _refuse
    __add__ = __radd__ = __sub__ = __mul__ = __truediv__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


def attribute_of(owner: str, attribute: str) -> Name:
    if attribute.startswith("__"):  # Python asks everything for such, and takes no for an answer
        raise AttributeError(f"{owner} has no attribute {attribute!r}")
    return Name(f"{owner}.{attribute}")


class Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `import tensorflow.python` work as `import tensorflow` does."""

    def find_spec(self, fullname, path=None, target=None):
        package, dot, _ = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if dot and package in VERSIONS else None

    def exec_module(self, module):
        module.__getattr__ = lambda attribute: attribute_of(module.__name__, attribute)


def become(name: str, version: str) -> None:
    """Make the module of this name a stand-in."""
    VERSIONS[name] = version
    sys.modules[name].__version__ = version
    sys.modules[name].__getattr__ = lambda attribute: attribute_of(name, attribute)
    if not any(isinstance(finder, Submodules) for finder in sys.meta_path):
        sys.meta_path.append(Submodules())
