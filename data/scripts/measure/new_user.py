"""What a new user waits for without a GPU: each command from the example of a shop's questions to a file for llama.cpp.

    python -m data.scripts.measure.new_user FOLDER             # a new folder, for the model and all that is made
    python -m data.scripts.measure.new_user FOLDER merge export  # some of the commands, in the folder of the others

The result is `data/measured/new_user.json`. The time on the clock depends on what else the machine does; the processor's,
which sums over cores, does so less, and is what an idle machine needs at most, but for the download.
"""

import json
import os
import platform
import resource
import subprocess
import sys
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
    row = {"command": command, "seconds": round(seconds), "processor_seconds": round(used)}
    return row | {"busy_cores": round(os.getloadavg()[1], 1)}  # how many others wanted them, this command among them


def main() -> None:
    folder, only = Path(sys.argv[1]).absolute(), sys.argv[2:]
    folder.mkdir(exist_ok=True)
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"rows": []}
    rows = {row["command"]: row for row in table["rows"]}
    for command in COMMANDS:
        if not only or command.split()[0] in only:
            rows[command] = measured(command, folder)
            write([rows[one] for one in COMMANDS if one in rows])


def write(rows: list[dict]) -> None:
    result = {
        "rows": rows,
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        "python": platform.python_version(),
        "date": str(date.today()),
    }
    TABLE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
