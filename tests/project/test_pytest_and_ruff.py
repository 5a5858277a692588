"""The settings of pytest and ruff in pyproject.toml: each is needed, and works."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import warnings
from types import SimpleNamespace

import pytest
import torch

from qlora_helpers.training.trainer import SFTConfig
from tests import ROOT

TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
RUFF = TOOL["ruff"]


# pytest


OVER_IN_SILENCE = {
    "@pytest.mark.parametrize('name', [])\ndef test(name): pass\n": "Empty parameter set in 'test'",
    "@pytest.mark.everthing\ndef test(): pass\n": "'everthing' not found in `markers`",
    "@pytest.mark.xfail(reason='x')\ndef test(): pass\n": "XPASS(strict)",
}


def test_an_empty_list_a_misspelt_marker_and_a_mended_fault_are_red(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for number, source in enumerate(OVER_IN_SILENCE):
        (tmp_path / f"test_{number}.py").write_text(f"import pytest\n\n{source}")
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", f"import pytest; pytest.main({options})"],
        cwd=tmp_path,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    for says in OVER_IN_SILENCE.values():
        assert says in done.stdout, done.stdout + done.stderr
    assert "1 failed, 2 errors" in done.stdout


def method(self):
    return self


LIBRARIES_NOTES = {
    "gradient_checkpointing": lambda: SFTConfig(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False),
    "script_method": lambda: torch.jit.script_method(method),
}


@pytest.mark.parametrize("line", TOOL["pytest"]["ini_options"]["filterwarnings"])
def test_each_filter_of_warnings_meets_one_of_the_installed_libraries(line):
    action, message, category = line.split(":")
    (provoke,) = (call for word, call in LIBRARIES_NOTES.items() if word in message)
    kind = getattr(__import__("builtins"), category)

    def given(filtered: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if filtered:
                warnings.filterwarnings(action, message, kind)
            provoke()
        return [str(warning.message) for warning in seen if re.match(message, str(warning.message))]

    assert given(filtered=False) and not given(filtered=True)


@pytest.fixture
def conftest(request):
    """The module with the hooks, as loaded by pytest."""
    return request.config.pluginmanager.get_plugin(str(ROOT / "conftest.py"))


def test_each_name_of_what_comes_first_begins_a_test_file_or_a_lesson(conftest):
    files = {path.name for folder in ("tests", "notebooks") for path in (ROOT / folder).rglob("*.*")}
    names = conftest.FIRST
    assert names and [name for name in names if not any(file.startswith(name) for file in files)] == []


def test_the_file_and_not_the_test_says_what_comes_first(conftest, request):
    def item(path: str, test: str):
        return SimpleNamespace(path=ROOT / path, nodeid=f"{path}::{test}", get_closest_marker=lambda name: None)

    longest, later = conftest.FIRST[0], conftest.FIRST[1]
    items = [
        item("tests/notebooks/test_exactness.py", f"test_a_lesson[{longest}]"),
        item("tests/training/test_spikes.py", f"{conftest.FIRST[-3]}pping"),
        item(f"tests/{later}.py", "test_a"),
        item(f"notebooks/solutions/{longest}.ipynb", "Cell 1"),
    ]
    wanted = [items[3], items[2], items[0], items[1]]
    conftest.pytest_collection_modifyitems(request.config, items)
    assert items == wanted


# ruff


def found(*rules: str, files: list[str]) -> set[str]:
    """Which of the rules find something, without this project's exceptions."""
    settings = [f"line-length={RUFF['line-length']}"]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--output-format", "json"]
    command += [f"--extend-exclude={pattern}" for pattern in RUFF["extend-exclude"]]
    command += [part for setting in settings for part in ("--config", setting)]
    done = subprocess.run(
        [*command, "--select", ",".join(rules), *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return {row["code"] for row in json.loads(done.stdout)}


def test_each_rule_that_is_ignored_would_find_something():
    ignored = RUFF["lint"]["ignore"]
    assert found(*ignored, files=["."]) == set(ignored)
    for pattern, rules in RUFF["lint"]["per-file-ignores"].items():
        files = [path.as_posix() for path in ROOT.glob(pattern)]
        assert files and found(*rules, files=files) == set(rules), pattern


def test_each_file_that_is_not_formatted_would_be_changed():
    for pattern in RUFF["format"]["exclude"]:
        files = [path.as_posix() for path in ROOT.glob(pattern) if path.suffix == ".py"]
        command = [sys.executable, "-m", "ruff", "format", "--isolated", "--no-cache", "--check", "--quiet"]
        command += ["--line-length", str(RUFF["line-length"])]
        assert files
        assert subprocess.run([*command, *files], cwd=ROOT, capture_output=True, check=False).returncode == 1, pattern
