"""Tables that grow row by row: a stopped script continues, and never with other weights."""

import json
from dataclasses import replace

import pytest

from data.scripts.measure import real_model
from qlora_helpers.statistics import interval

HEAD = {"command": "c", "source": {"sha256": "a"}, "processor": "p", "threads": 1, "versions": {"torch": "1"}}


def made(name, rows):
    return {"name": name, "after": list(rows), "numbers": [0.5, -1e-05]}


def stopping_at(stop):
    def row(name, rows):
        if name == stop:
            raise KeyboardInterrupt
        return made(name, rows)

    return row


def test_a_stopped_script_continues_with_the_row_that_is_missing(tmp_path):
    table = tmp_path / "table.json"
    with pytest.raises(KeyboardInterrupt):
        real_model.fill(table, HEAD, ["one", "two", "three"], stopping_at("two"))
    assert [row["name"] for row in json.loads(table.read_text(encoding="utf-8"))["rows"]] == ["one"]
    real_model.fill(table, HEAD, ["one", "two", "three"], stopping_at("one"))
    found = json.loads(table.read_text(encoding="utf-8"))
    assert found == HEAD | {"rows": [made("one", []), made("two", ["one"]), made("three", ["one", "two"])]}
    assert '"numbers": [0.5, -1e-05]' in table.read_text(encoding="utf-8")


def test_rows_that_are_not_asked_for_stay(tmp_path):
    table = tmp_path / "table.json"
    real_model.fill(table, HEAD, ["one", "two"], made)
    real_model.fill(table, HEAD, ["three", "one"], made)
    assert [row["name"] for row in json.loads(table.read_text(encoding="utf-8"))["rows"]] == ["three", "one", "two"]


def test_a_table_is_not_continued_with_other_weights(tmp_path):
    table = tmp_path / "table.json"
    real_model.fill(table, HEAD, ["one"], made)
    before = table.read_bytes()
    with pytest.raises(SystemExit, match=r"another source.*--table"):
        real_model.fill(table, HEAD | {"source": {"sha256": "b"}}, ["one", "two"], made)
    assert table.read_bytes() == before


def test_a_row_of_another_machine_says_so(tmp_path):
    table = tmp_path / "table.json"
    real_model.fill(table, HEAD, ["one"], made)
    real_model.fill(table, HEAD | {"processor": "q"}, ["one", "two"], made)
    one, two = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert "processor" not in one and two["processor"] == "q" and "versions" not in two


def test_the_source_says_that_weights_of_the_package_were_rounded_before(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("qlora_helpers.models.loading.folder_of", lambda name: tmp_path)
    found = real_model.source_of(real_model.MODEL)
    assert "Q4_1" in found["weights"] and len(found["sha256"]) == 64
    known = real_model.FETCHABLE[real_model.MODEL]
    published = replace(known, weights_sha256=found["sha256"])
    monkeypatch.setitem(real_model.FETCHABLE, real_model.MODEL, published)
    assert real_model.source_of(real_model.MODEL)["weights"] == f"the 16-bit weights of {known.title}"
    assert real_model.source_of("a-folder")["weights"] == "a-folder"


def test_the_readme_takes_the_seeds_together(tmp_path):
    def row(name, each, valid):
        return {"name": name, "questions": 4, "each": each, "valid": [valid, 0.1]}

    rows = [row("no example", "0000", 0.0), row("NF4, seed 0", "1110", 1.0), row("NF4, seed 1", "1010", 0.5)]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rows": [*rows, {"name": "capitals"}]}), encoding="utf-8")
    half = 100 * interval([1, 0.5, 1, 0]).half
    assert real_model.markdown_table(table).splitlines()[2:] == [
        "| before | 1 | 0 % | 0 % |",
        f"| after, in 4 bits (NF4, double quantisation) | 2 | 75 % | 62 % ± {half:.0f} % |",
    ]
