"""Call the project's scripts in a process that already has the libraries: importing them takes ten seconds."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from notebooks.scripts import forking


def _as_script(main: Callable[[], int | None], arguments: list[str], output: str) -> None:
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["script", *arguments]
    sys.exit(main())


def call(main: Callable[[], int | None], *arguments: str) -> tuple[int, str]:
    """Run a script's `main` as from the command line. Returns its exit code and all that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        process = forking.start(_as_script, main, [str(argument) for argument in arguments], str(output))
        process.join()
        return process.exitcode, output.read_text(errors="replace")
