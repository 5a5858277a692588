"""What the tests of chats share: a tokenizer, and files to read."""

import json

import pytest

from qlora_helpers.models.loading import load_tokenizer


@pytest.fixture(scope="package")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write lines, given as text or as chats, to a file; return its path."""

    def to_file(*lines):
        path = tmp_path / "chats.jsonl"
        texts = [line if isinstance(line, str) else json.dumps({"messages": line}) for line in lines]
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return path

    return to_file
