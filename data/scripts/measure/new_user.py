"""What a new user waits for without a GPU: each command from the example of a shop's questions to a file for llama.cpp.

    python -m data.scripts.measure.new_user

The commands are those of the README, in a cache and a folder of their own, which are then deleted. The result is
`data/measured/new_user.json`. The time on the clock depends on what else the machine does; the processor's, which sums
over cores, does so less.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from data.scripts import ROOT
from data.scripts.measure.commands import processor

TABLE = ROOT / "data" / "measured" / "new_user.json"
MODEL, FILE = "smollm2-135m", "data/examples/shop.csv"
QUESTION = "Are you open on Saturdays?"
TO_CHAT = ("fetch", "data", "run", "chat")  # from the file to a chat
COMMANDS = (
    f"fetch {MODEL}",
    f"data {FILE} --model {MODEL} --on-bad drop",
    f"run --model {MODEL} --data {FILE} --on-bad drop --output OUT/shop",
    "chat OUT/shop",
    "effect OUT/shop",
    "merge OUT/shop OUT/merged",
    f"export OUT/shop OUT/shop.gguf --type q8_0 --modelfile --check {FILE}",
)


def measured(command: str, folder: Path) -> dict:
    """Run one command to its end. A chat is asked one question."""
    words = [sys.executable, "-m", "qlora_helpers", *command.replace("OUT", str(folder)).split()]
    environment = os.environ | {"QLORA_CACHE": str(folder / "cache")}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, env=environment, input=f"{QUESTION}\n", stdout=subprocess.PIPE, text=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": command, "seconds": round(seconds), "processor_seconds": round(used)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [measured(command, Path(folder)) for command in COMMANDS]
    result = {
        "rows": rows,
        "processor": processor(),
        "cores": os.cpu_count(),
        "busy_cores": round(os.getloadavg()[2], 1),  # of the last 15 minutes, these commands among them
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        "python": platform.python_version(),
        "date": str(date.today()),
    }
    TABLE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
