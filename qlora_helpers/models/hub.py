"""Fetch an open model from the Hugging Face Hub, or say in a sentence why that failed and what to do.

No model here is gated, so no account is needed. A revision is pinned where independent public projects pin the same
commit; for any other model, the path that `fetch` returns names the commit.
"""

import errno
import os
from pathlib import Path

from huggingface_hub import constants, errors, get_session, snapshot_download

__all__ = ["DEFAULT_MODEL", "LARGER_MODEL", "REVISIONS", "HubError", "answers", "fetch"]

DEFAULT_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"  # Apache-2.0; 1.54 billion parameters, 3.1 GB to download
LARGER_MODEL = "Qwen/Qwen2.5-7B-Instruct"  # Apache-2.0; 7.62 billion parameters, 15.2 GB to download
REVISIONS = {
    # each is the commit that more than two public repositories on GitHub pinned in November 2026
    DEFAULT_MODEL: "989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
    LARGER_MODEL: "a09a35458c702b33eeacc393d103063234e8bc28",
}
SMALL_FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
WEIGHTS = "*.safetensors"  # no second copy as .bin


class HubError(OSError):
    """A model could not be fetched; the message says why, and what to do."""


def answers(seconds: float = 10) -> bool:
    """Whether the Hub answers, be it with an error. A download that finds no network asks five times, and says so each time."""
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # of the library that makes the connection, which differs by the version of huggingface_hub
        return False
    return True


def fetch(name: str, revision: str | None = None, weights: bool = True, into: Path | None = None) -> Path:
    """Download a model's files from the Hub, or find them in the local cache.

    Args:
        name: owner/model.
        revision: a commit, branch or tag; by default the pinned commit if there is one, else the newest.
        weights: False fetches a few megabytes, the config and the tokenizer: enough to see whether the model will do.
        into: a folder for the files; by default they go into the Hub's cache.

    Returns:
        The local folder of the files. In the Hub's cache its name is the commit.

    Raises:
        HubError: there is no network, no such model or revision, no access, no room on the disk, or the model has no weights
            as safetensors.
    """
    revision = revision or REVISIONS.get(name)
    try:
        patterns = [*SMALL_FILES, *[WEIGHTS] * weights]
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, **{"local_dir": into} if into else {})
        )
    except (OSError, errors.HFValidationError) as error:
        raise HubError(_sentence(name, revision, error)) from error
    if weights and not any(folder.glob(WEIGHTS)):  # off the network, the Hub's library is content with what is there
        raise HubError(
            f"{name} is on this disk without its weights ({WEIGHTS}): fetch it with a network, or take a model that has them"
        )
    return folder


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and its causes. A chain of errors can be circular; each is listed once."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _sentence(name: str, revision: str | None, error: BaseException) -> str:
    """What went wrong and what to do about it. The order matters: a gated model's error is also a missing one's."""
    causes = _causes(error)

    def any_of(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return f"{name}: the disk is full. Delete what you do not need, or take a smaller model"
    if any_of(errors.GatedRepoError):
        return f"{name} is gated: its owner must grant you access first. Take an open one, such as {DEFAULT_MODEL}"
    if any_of(errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: leave the revision out to take the newest"
    if any_of(errors.RepositoryNotFoundError, errors.HFValidationError):
        return f"there is no open model {name!r} on the Hub: check the spelling; the form is owner/model"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") or any_of(
        errors.OfflineModeIsEnabled
    ):
        return f"{name} is not on this disk, and HF_HUB_OFFLINE is set: unset it, or name a local folder"
    if any_of(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        return f"{name} is not on this disk, and the Hub cannot be reached: check the network, then try again"
    return f"{name} could not be fetched from the Hub ({type(error).__name__}: {error})"
