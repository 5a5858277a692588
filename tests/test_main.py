"""The command line as a whole."""

import os
import subprocess
import sys

import pytest

from qlora_helpers.__main__ import main


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error on Windows")
def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "qlora_helpers", "memory", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        started.stdout.close()  # as head does, and long before the first line is written
        assert started.stderr.read() == ""
    assert started.returncode == 0


def test_what_a_command_does_not_take_is_refused_with_its_own_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "faq.csv"])
    err = capsys.readouterr().err
    assert err.startswith("usage: python -m qlora_helpers run ") and "[--data FILE]" in err
    assert err.endswith("run: error: unrecognized arguments: faq.csv\n")
