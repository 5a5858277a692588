"""Command lines of this package as a reader can paste them into a shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["command_line"]


def command_line(*words: object) -> str:
    """`python -m qlora_helpers` with these words, quoted for the shell, with the Python that is running."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    line = [str(python), "-m", "qlora_helpers", *map(str, words)]
    return subprocess.list2cmdline(line) if os.name == "nt" else shlex.join(line)
