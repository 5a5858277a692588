"""How long the project's commands take on this machine, each run alone.

    python -m data.scripts.measure.commands test preflight --runs 3

Each run becomes one row in `data/measured/commands.json` and replaces the old rows of its command; README.md shows
them. Use an idle machine: the script refuses to start while the cores are busy.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import psutil

from data.scripts import ROOT

TABLE = ROOT / "data" / "measured" / "commands.json"
BUSY = 10  # per cent of all cores


def processor() -> str:
    """The processor's name, which tells which kernels run."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8") if info.exists() else ""
    name = re.search(r"^model name\s*: (.*)$", lines, re.M)
    return name[1] if name else platform.processor() or platform.machine()


def measured(command: str) -> dict:
    """Run `make command` once."""
    busy = psutil.cpu_percent(interval=5)
    if busy > BUSY:
        sys.exit(f"the cores are {busy:.0f} % busy with something else: wait, or stop it")
    started = time.perf_counter()
    done = subprocess.run(["make", *command.split()], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    lines = done.stdout.strip().splitlines() or [""]
    said = [line for line in lines if re.search(r"\d+ passed|✓ ready|bit-identical|killed", line)]
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}make {command} failed after {seconds:.0f} s")
    return {
        "command": command,
        "seconds": round(seconds),
        "said": [line.strip("= ") for line in said][:3],
        "date": str(date.today()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", help="targets of the Makefile, such as test or 'notebooks LESSON=03'")
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"rows": []}
    found: dict[str, list[dict]] = {command: [] for command in args.commands}
    for command, rows in found.items():
        for _ in range(args.runs):
            rows.append(measured(command))
            print(rows[-1], flush=True)
    for command, rows in found.items():  # not earlier: the tests compare README.md with this table
        others = [row for row in table["rows"] if row["command"] != command]
        table = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "rows": sorted([*others, *rows], key=lambda r: r["command"]),
        }
        TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
