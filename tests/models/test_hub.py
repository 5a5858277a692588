"""Trouble with the Hub ends in a sentence that says what to do, and a lesson continues with the shipped model."""

import errno
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants, errors

from qlora_helpers.models import hub
from qlora_helpers.models import loading as models
from qlora_helpers.models.hub import DEFAULT_MODEL, LARGER_MODEL, REVISIONS, HubError, fetch
from tests.support.short_runs import CPU


def refused(kind, message="as the Hub says it"):
    """An error of huggingface_hub, created without a connection."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def caused_by(cause, error):
    error.__cause__ = cause
    return error


NO_ROUTE = caused_by(socket.gaierror(-2, "Name or service not known"), refused(errors.LocalEntryNotFoundError))
TROUBLE = {
    "gated": (refused(errors.GatedRepoError), "is gated: its owner must grant you access first. Take an open one"),
    "wrong name": (refused(errors.RepositoryNotFoundError), "there is no open model 'some/model' on the Hub: check"),
    "wrong form": (refused(errors.HFValidationError), "there is no open model 'some/model' on the Hub: check the spel"),
    "wrong revision": (refused(errors.RevisionNotFoundError), "has no revision 'abc': leave the revision out"),
    "disk full": (OSError(errno.ENOSPC, "No space left"), "the disk is full. Delete what you do not need, or take a sm"),
    "disk full, deeper": (caused_by(OSError(errno.ENOSPC, "full"), RuntimeError("write")), "the disk is full"),
    "quota": (OSError(errno.EDQUOT, "Quota exceeded"), "the disk is full"),
    "no network": (NO_ROUTE, "is not on this disk, and the Hub cannot be reached: check the network, then try again"),
    "time out": (TimeoutError("read"), "and the Hub cannot be reached"),
    "anything else": (PermissionError(13, "denied"), r"could not be fetched from the Hub \(PermissionError: .*denied"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TROUBLE)
def test_every_trouble_has_its_sentence(kind, monkeypatch):
    error, sentence = TROUBLE[kind]

    def fail(*args, **options):
        raise error if isinstance(error, (OSError, ValueError)) else OSError("wrapped") from error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(HubError, match=sentence) as raised:
        fetch("some/model", "abc")
    assert "some/model" in str(raised.value)


def test_offline_is_said_for_real():
    with pytest.raises(
        HubError, match="some/model is not on this disk, and HF_HUB_OFFLINE is set: unset it, or name a"
    ):
        fetch("some/model")


def test_an_error_that_is_not_from_the_hub_is_not_swallowed(monkeypatch):
    def fail(*args, **options):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(KeyError):
        fetch("some/model")


def test_the_pinned_commit_is_asked_for_unless_another_is_named(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path)
    )
    assert fetch(DEFAULT_MODEL) == tmp_path
    fetch(LARGER_MODEL)
    fetch(LARGER_MODEL, "main")
    fetch("some/model")
    assert [options["revision"] for _, options in asked] == [
        REVISIONS[DEFAULT_MODEL],
        REVISIONS[LARGER_MODEL],
        "main",
        None,
    ]
    assert all(len(commit) == 40 for commit in REVISIONS.values())


def test_without_weights_only_small_files_are_fetched_and_a_model_that_lacks_its_weights_is_named(
    monkeypatch, tmp_path
):
    asked = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **options: asked.append(options["allow_patterns"]) or str(tmp_path)
    )
    assert fetch("some/model", weights=False) == tmp_path
    assert "*.json" in asked[0] and not any("safetensors" in pattern for pattern in asked[0])
    with pytest.raises(
        HubError, match=r"^some/model is on this disk without its weights \(\*\.safetensors\): fetch it"
    ):
        fetch("some/model")
    assert "*.safetensors" in asked[1]


def test_a_lesson_continues_with_the_shipped_model_and_says_why(capsys):
    model, tokenizer, name = models.load_or_shipped("some/model", hardware=CPU)
    assert name == "tiny-llama" and model.num_parameters() == 2_984_192 and len(tokenizer) == 1_216
    said = capsys.readouterr().out
    assert said.startswith("some/model is not on this disk, and HF_HUB_OFFLINE is set")
    assert said.endswith("This lesson continues with the shipped model, tiny-llama.\n")


def test_what_was_loaded_is_said_with_its_commit(capsys, monkeypatch, tmp_path):
    folder = tmp_path / ("ab12" * 10)
    folder.symlink_to(models.data_path("tiny-llama"))
    monkeypatch.setattr(models, "fetch", lambda name, **_: folder)
    _, _, name = models.load_or_shipped("some/model", hardware=CPU)
    assert name == "some/model"
    assert capsys.readouterr().out == f"Loaded some/model at {'ab12' * 10}.\n"


@pytest.mark.parametrize(
    ("gear", "named", "wanted"),
    [
        ("cpu", "", "tiny-llama"),
        ("t4", "", DEFAULT_MODEL),
        ("ampere", "", DEFAULT_MODEL),
        ("cpu", "my/model", "my/model"),
        ("t4", " tiny-llama ", "tiny-llama"),
    ],
)
def test_the_gear_s_model_unless_qlora_model_names_another(gear, named, wanted, monkeypatch):
    monkeypatch.setenv("QLORA_MODEL", named)
    assert models.default_model(type(CPU)(gear, "gear", None, 0, None, False, 1, 0)) == wanted


@pytest.mark.parametrize("code", [200, 503])
def test_a_server_answers_whatever_it_says_and_a_closed_door_does_not(code, monkeypatch):
    class Says(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Says) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert hub.answers()
        thread.join()
    assert not hub.answers(1)
