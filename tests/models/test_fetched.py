"""Where fetched models lie, what is seen of them, and what is said where they are not there."""

import json
import sys
from pathlib import Path

import pytest

from qlora_helpers.models import fetched
from qlora_helpers.models.fetched import FETCHABLE, MADE, NotFetched, cache_folder, fetched_folder, is_fetched, look

NAME = "smollm2-135m"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache, **changes):
    """A folder as `fetch` leaves it, as far as this module looks."""
    folder = cache / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"1234")
    made = {"source": "index", "files": {"config.json": 2, "model.safetensors": 4}} | changes
    (folder / MADE).write_text(json.dumps(made), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("platform", "variables", "wanted"),
    [
        ("linux", {}, "home/.cache/qlora-course"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/qlora-course"),
        ("darwin", {"XDG_CACHE_HOME": "/elsewhere"}, "home/Library/Caches/qlora-course"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/qlora-course"),
        ("win32", {}, "home/AppData/Local/qlora-course"),
        ("linux", {"QLORA_CACHE": " /mine ", "XDG_CACHE_HOME": "/elsewhere"}, "/mine"),
        ("win32", {"QLORA_CACHE": "~/mine"}, "home/mine"),
    ],
)
def test_the_cache_is_where_the_system_has_caches_unless_a_variable_names_it(platform, variables, wanted, monkeypatch):
    for name in ("QLORA_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "home")
    monkeypatch.setattr(fetched.Path, "home", lambda: Path("home"))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder().as_posix() == wanted


def test_what_is_not_there_is_said_with_the_command_that_gets_it(cache):
    assert look(NAME) is None and not is_fetched(NAME)
    with pytest.raises(
        NotFetched, match=rf"^{NAME} is not on this disk: fetch it with  python -m qlora_helpers fetch {NAME}$"
    ):
        fetched_folder(NAME)
    (cache / NAME).mkdir(parents=True)  # empty, as somebody's mkdir leaves it
    assert look(NAME) is None


def test_what_is_there_is_found_with_its_source_and_size(cache):
    folder = put(cache)
    found = look(NAME)
    assert (found.folder, found.source, found.size, found.fault) == (folder, "index", 6, "")
    assert is_fetched(NAME) and fetched_folder(NAME) == folder


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "no list", "damaged list", "another source", "files that are no list"]
)
def test_a_folder_that_is_not_whole_is_not_taken(cache, damage):
    changes = {"another source": {"source": "elsewhere"}, "files that are no list": {"files": []}}.get(damage, {})
    folder = put(cache, **changes)
    if damage == "missing":
        (folder / "model.safetensors").unlink()
    elif damage == "cut":
        (folder / "model.safetensors").write_bytes(b"123")
    elif damage == "no list":
        (folder / MADE).unlink()
    elif damage == "damaged list":
        (folder / MADE).write_text('{"files": ', encoding="utf-8")
    assert not is_fetched(NAME)
    fault = (
        r"model\.safetensors in .* is damaged or missing"
        if damage in ("missing", "cut")
        else "was not made by this version"
    )
    with pytest.raises(NotFetched, match=rf"{fault}.*: fetch {NAME} anew with  python -m qlora_helpers fetch {NAME}$"):
        fetched_folder(NAME)


def test_each_model_is_pinned():
    for name, model in FETCHABLE.items():
        assert model.name == name == name.lower() and "/" not in name  # no name of the Hub, which has an owner
        assert len(model.revision) == 40 and len(model.gguf_sha256) == len(model.weights_sha256) == 64
