"""The search for Colab's packages that the libraries look for; the environment of `make test-colab` has them."""

import ast
import importlib.metadata
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.colab.environment import COLAB, MOVES, ROOT, Row, installed, libraries, listed, optional, same, stand_in
from tests.colab.optional_imports import looked_for, names_in, required, sources

SET_UP = runpy.run_path(str(ROOT / "colab" / "setup.py"))
in_colab_s_environment = pytest.mark.skipif(
    not Path(sys.prefix, "constraints.txt").is_file(),
    reason="only the environment of `make test-colab` has Colab's packages",
)


# What a library looks for


@pytest.mark.parametrize(
    "source",
    [
        "import wanted",
        "import first, wanted.sub as other",
        "from wanted.sub import thing",
        "def later():\n    try:\n        import wanted\n    except ImportError:\n        pass",
        "importlib.util.find_spec('wanted')",
        "if is_wanted := _is_package_available('wanted', return_version=True): ...",
        "importlib.metadata.version('wanted')",
        "module = importlib.import_module('wanted')",
        "'wanted' in sys.modules",
        "TABLE = {'any': ('wanted',)}\ndef check(name):\n    return importlib.metadata.version(name)",
        "raise ImportError('It is missing. Run `pip install wanted`.')",
    ],
)
def test_all_ways_to_look_for_a_package_are_seen(source):
    assert any(name.partition(".")[0] == "wanted" for name in names_in(source))


@pytest.mark.parametrize(
    "source", ["from .wanted import x", "print('wanted')", "# import wanted", "a.version('wanted')"]
)
def test_what_does_not_look_for_a_package_is_not_taken_for_it(source):
    assert "wanted" not in names_in(source)


def make_library(site: Path, name: str, source: str, needs: tuple[str, ...] = ()) -> None:
    stand_in(site, name, "1.0", needs=needs)
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(source)
    (site / f"{name}-1.0.dist-info" / "RECORD").write_text(f"{name}/__init__.py,,\n")


def test_names_lead_to_the_packages_of_the_other_machine(tmp_path, monkeypatch):
    """By their own name, by installed packages, and by the library's extras and advice; requirements are separate."""
    source = "import needed, Some_Thing, yaml, absent\nADVICE = 'pip install other-name'\nimport importlib.metadata\n"
    make_library(tmp_path, "a_library", source, ("needed", "more; extra == 'x'"))
    stand_in(tmp_path, "needed", "1.0", needs=["deeper"])
    monkeypatch.syspath_prepend(tmp_path)
    colab = ["needed", "some-thing", "PyYAML", "Other.Name", "more", "importlib_metadata", "unrelated"]
    found = looked_for(["a_library"], colab)
    assert set(found) == {"needed", "some-thing", "pyyaml", "other-name", "more"}
    assert found["some-thing"] == {"Some_Thing"}
    assert required(["a_library"]) == {"a-library", "needed", "deeper"}


# A stand-in


def in_python(site: Path, script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stand_in_is_found_and_has_its_version(tmp_path):
    stand_in(tmp_path, "a-large-one", "2.20.0+x", imports=["a_large_one"])
    told = in_python(
        tmp_path,
        """
        import importlib.metadata, importlib.util
        print(importlib.util.find_spec("a_large_one") is not None, importlib.metadata.version("a-large-one"))
        print(importlib.metadata.packages_distributions()["a_large_one"])
        import a_large_one
        print(a_large_one.__version__, hasattr(a_large_one, "__wrapped__"), a_large_one.__file__.endswith("__init__.py"))
        """,
    )
    assert told == "True 2.20.0+x\n['a-large-one']\n2.20.0+x False True\n"


@pytest.mark.parametrize(
    "use",
    [
        "import big; big.zeros(1)",
        "from big.nn import Layer\n    class Mine(Layer): pass",
        "import big.python.x as x; x.a.b.c()",
        "from big import sizes\n    for size in sizes: pass",
        "import big\n    if big.is_on: pass",
        "import big; big.one + 1",
    ],
)
def test_the_use_of_a_stand_in_is_an_error_that_no_library_takes_for_not_installed(tmp_path, use):
    stand_in(tmp_path, "big", "3.1", imports=["big"])
    told = in_python(
        tmp_path,
        f"""
try:
    {use}
except (ImportError, AttributeError, TypeError):
    print("taken for not installed, or not understood")
except RuntimeError as error:
    print(error)
        """,
    )
    assert told.startswith("big.") and "was used, but big 3.1 is a stand-in here" in told


def test_the_names_of_a_stand_in_can_be_passed_around(tmp_path):
    stand_in(tmp_path, "big", "3.1", imports=["big"])
    told = in_python(
        tmp_path,
        """
        import typing
        from big.transforms.v2 import functional as F, InterpolationMode
        modes = {0: InterpolationMode.NEAREST, F: 1}
        def resize(image: "Image", mode: InterpolationMode | None = None, other: typing.Optional[F] = None): ...
        print(isinstance(1, InterpolationMode), modes[0])
        """,
    )
    assert told == "False <big.transforms.v2.InterpolationMode.NEAREST, of a stand-in>\n"


# The list and the environment


def test_the_list_is_of_colab_s_packages_and_says_why():
    rows = listed()
    assert [row.package for row in rows] == sorted({canonicalize_name(row.package) for row in rows})
    assert {row.package for row in rows} <= COLAB.keys() - MOVES
    for row in rows:
        assert row.how.endswith(" MB") or row.how.startswith("stand-in: "), row
    assert Row("torchao", ("torchao",), "stand-in: no wheel").stands_in


def checks_that_raise(path: Path) -> list[str]:
    """The functions `is_x_available` of a file that raise ImportError instead of saying no."""
    text = path.read_bytes()
    if b"_available" not in text or b"raise ImportError" not in text:
        return []
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    raising = [
        function.name
        for function in functions
        if any(isinstance(n, ast.Raise) and "ImportError" in ast.unparse(n) for n in ast.walk(function))
    ]
    return [name for name in raising if name.startswith("is_") and name.endswith("_available")]


def test_the_set_up_asks_every_library_that_stops_beside_an_optional_package():
    found = set()
    for library in libraries():
        package = Path(importlib.metadata.distribution(library).locate_file(""))
        found |= {path.relative_to(package).as_posix() for path in sources(library) if checks_that_raise(path)}
    assert found == set(SET_UP["CHECKS"].values())


@in_colab_s_environment
def test_the_list_is_what_the_libraries_look_for():
    """Fails when an upgraded library looks for something new, or no longer for something."""
    advice = f"run: {sys.executable} -m tests.colab.environment list"
    assert [row.package for row in listed()] == list(optional()), advice


@in_colab_s_environment
def test_the_environment_has_colab_s_versions_of_what_the_libraries_require_or_look_for():
    pins = {canonicalize_name(name) for name in ("bitsandbytes", "datasets", "trl")}
    names = (required(libraries()) & COLAB.keys()) - MOVES - pins | {row.package for row in listed()}
    others = {name: installed(name) for name in names if not same(name, installed(name))}
    assert not others, f"run make test-colab again; not as on Colab: {others}"
    for row in listed():
        if row.stands_in:
            assert importlib.metadata.distribution(row.package).read_text("top_level.txt").split() == list(row.imports)


@in_colab_s_environment
def test_of_what_colab_has_the_libraries_refuse_torchao_alone():
    assert SET_UP["refused"]() == {"torchao": "peft"}
