"""What a stand-in imports: it can be found, imported and asked for its version and its names, but does nothing.

Libraries import names from the packages they find, and pass them around, before anything uses them: so a stand-in has
every name and every submodule. Using a name is an error, of a kind that no library takes for "not installed": otherwise
the library would behave differently from the real machine. A stand-in cannot show which names the real package has.

This file is copied beside the stand-ins. They replace packages that are too large for a test environment, or built for
another torch.
"""

import importlib.abc
import importlib.machinery
import sys

VERSIONS: dict[str, str] = {}


class StandInUsed(RuntimeError):
    """Something in a stand-in was used."""

    def __init__(self, name: str):
        package = name.partition(".")[0]
        super().__init__(
            f"{name} was used, but {package} {VERSIONS[package]} is a stand-in here, which does nothing. "
            "If a lesson needs it, this environment needs the real one: see colab/looked-for.txt."
        )


class Name:
    """Something in a stand-in. It can be named, also in a type, but not called, subclassed, indexed or counted."""

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
        return False  # no instance can exist

    __subclasscheck__ = __instancecheck__

    def _refuse(self, *arguments, **options):
        raise StandInUsed(self.__name__)

    __call__ = __mro_entries__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __enter__ = _refuse
    __add__ = __radd__ = __sub__ = __mul__ = __truediv__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


def attribute_of(owner: str, attribute: str) -> Name:
    if attribute.startswith("__"):  # Python looks these up on every object, and copes if they are missing
        raise AttributeError(f"{owner} has no attribute {attribute!r}")
    return Name(f"{owner}.{attribute}")


class Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `import tensorflow.python` work like `import tensorflow`."""

    def find_spec(self, fullname, path=None, target=None):
        package, dot, _ = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if dot and package in VERSIONS else None

    def exec_module(self, module):
        module.__getattr__ = lambda attribute: attribute_of(module.__name__, attribute)


def become(name: str, version: str) -> None:
    """Make the module with this name a stand-in."""
    VERSIONS[name] = version
    sys.modules[name].__version__ = version
    sys.modules[name].__getattr__ = lambda attribute: attribute_of(name, attribute)
    if not any(isinstance(finder, Submodules) for finder in sys.meta_path):
        sys.meta_path.append(Submodules())
