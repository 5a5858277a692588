"""Where the files of the course are searched for."""

import pytest

from qlora_helpers.paths import data_path


def test_the_error_for_missing_data_names_the_variable_that_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"data/chats/no\.jsonl is not in QLORA_DATA='.*': set it to .*, or unset it"
    ):
        data_path("chats", "no.jsonl")
