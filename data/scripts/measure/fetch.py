"""What fetching the real model from the package index takes on this machine: a fresh cache, one process.

    python -m data.scripts.measure.fetch

The result is `data/measured/fetch.json`. The processor's time is of one thread, and does not depend on what else the
machine does; the time on the clock, and that of the download, do.
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
from pathlib import Path

from data.scripts import ROOT
from data.scripts.measure.commands import processor
from qlora_helpers.models.fetched import FETCHABLE

TABLE = ROOT / "data" / "measured" / "fetch.json"


def measured(name: str) -> dict:
    """Fetch a model into a cache of its own, which is then deleted."""
    model = FETCHABLE[name]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"QLORA_CACHE": cache, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        command = [sys.executable, "-m", "qlora_helpers", "fetch", name, "--from", "index"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(cache, name).iterdir())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "model": name,
        "parameters": model.parameters,
        "wheel_bytes": model.wheel_bytes,
        "hub_bytes": model.hub_bytes,
        "folder_bytes": size,
        "processor_seconds": round(used.ru_utime + used.ru_stime),
        "seconds": round(seconds),
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "processor": processor(),
        "python": platform.python_version(),
        "busy_cores": round(os.getloadavg()[0], 1),
        "date": str(date.today()),
    }


def main() -> None:
    result = measured("smollm2-135m")
    TABLE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
