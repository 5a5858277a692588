"""Command lines that a reader can paste."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_helpers.commands import command_line as module
from qlora_helpers.commands.command_line import command_line


@pytest.mark.parametrize(("system", "quoted"), [("posix", "'my faq.csv'"), ("nt", '"my faq.csv"')])
def test_words_are_quoted_as_the_shell_of_the_system_wants_it(system, quoted, monkeypatch):
    monkeypatch.setattr(module, "os", SimpleNamespace(name=system))
    assert command_line("run", "--data", Path("my faq.csv")).endswith(f" -m qlora_helpers run --data {quoted}")


def test_the_python_is_that_which_is_running_by_its_shortest_name(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "the venv" / "python"))
    assert shlex.split(command_line("run"))[0] == str(tmp_path / "the venv" / "python")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(command_line("run"))[0] == "the venv/python"
