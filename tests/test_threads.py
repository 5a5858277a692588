"""The package tells OpenMP how to wait, torch's runtime obeys, and a message says if it came too late."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qlora_helpers import threads
from tests import ROOT

TORCH = Path(importlib.util.find_spec("torch").origin).parent
RUNTIMES = [*TORCH.glob("lib/libgomp*.so*"), *TORCH.parent.glob("torch.libs/libgomp*.so*")]


def loads_openmp(before, **environment):
    """What torch's OpenMP reports about itself when loaded after some code; torch itself would take seconds more."""
    clean = {name: value for name, value in os.environ.items() if name not in (threads.VARIABLE, "GOMP_SPINCOUNT")}
    code = f"{before}; import ctypes; ctypes.CDLL({str(RUNTIMES[0])!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


@pytest.mark.skipif(not RUNTIMES, reason="this torch does not use GNU's OpenMP, which tells how it waits")
def test_torch_s_runtime_obeys_the_setting():
    """OMP_WAIT_POLICY is printed as PASSIVE even if it is not set: the spin count shows what is in force."""
    assert "GOMP_SPINCOUNT = '0'" in loads_openmp("import qlora_helpers")
    assert "GOMP_SPINCOUNT = '0'" not in loads_openmp("pass")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in loads_openmp("import qlora_helpers", OMP_WAIT_POLICY="active")


def imports_of(path):
    """The packages that a script imports at its top level, in order."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_the_scripts_import_the_package_before_any_library():
    """Their own package does so: Python runs its `__init__` before each of them."""
    assert list(imports_of(ROOT / "data" / "scripts" / "__init__.py")) == ["pathlib", "qlora_helpers"]


def test_importing_the_package_loads_no_library():
    code = "import sys; before = set(sys.modules); import qlora_helpers; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names]
    assert loaded == ["qlora_helpers", "qlora_helpers.library_messages", "qlora_helpers.threads"]


@pytest.fixture
def unset(monkeypatch):
    for name in (threads.VARIABLE, "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "too_late", False)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)


@pytest.mark.parametrize(
    ("torch_first", "percent", "computing", "said"),
    [(True, 50.0, 2, True), (True, 10.0, 2, False), (True, 100.0, 1, False), (False, 100.0, 2, False)],
)
def test_a_message_says_if_torch_came_first_and_another_program_needs_a_core(
    torch_first, percent, computing, said, unset, monkeypatch, capsys
):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    if torch_first:
        monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: percent)
    threads.wait_passively()
    threads.say_if_slowed(computing)
    assert os.environ[threads.VARIABLE] == "passive"
    text = capsys.readouterr().out
    assert ("1.0 of 2 cores busy" in text and "import qlora_helpers first" in text) if said else text == ""


def test_the_user_s_own_setting_is_kept(unset, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    threads.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "active" and not threads.too_late
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    threads.wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ and not threads.too_late
