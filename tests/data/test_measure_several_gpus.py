"""The script that measures runs on two GPUs, where there is none: its plan, its launches, and what it makes of their results."""

import json
import sys

import pytest

from data.scripts.measure import several_gpus as measure
from qlora_helpers.units import GIB
from tests import ROOT

CAP = 24 * GIB
ROW = {"kind": "step", "model": "8B", "way": "ddp", "processes": 2, "tokens": 2_048, "label": "8B ddp x2 2048"}
SEEN = {"outcome": "ran", "loss": 9.5, "peak_allocated_bytes": 1, "peak_reserved_bytes": 2, "host_bytes": 3}


def test_every_row_has_a_name_and_two_processes_have_those_of_one_as_well():
    rows = measure.plan(2)
    assert len({row["label"] for row in rows}) == len(rows)
    assert {row["way"] for row in rows} == set(measure.WAYS)
    assert {row["processes"] for row in rows} == {1, 2}
    assert {(row["model"], row["way"]) for row in rows if row["kind"] == "step"} >= {
        ("70B", "fsdp"),
        ("70B", "fsdp_offload"),
        ("8B", "one"),
        ("8B", "ddp"),
    }
    assert {row["processes"] for row in measure.plan(1)} == {1}


@pytest.mark.parametrize("row", measure.plan(2), ids=lambda row: row["label"])
def test_each_row_is_launched_as_readers_launch_it(row, tmp_path):
    command = measure.command_of(row, False, CAP, tmp_path)
    assert command[0] == sys.executable
    if row["way"].startswith("fsdp"):
        config = command[command.index("--config_file") + 1]
        assert config == str(ROOT / "data" / "accelerate" / f"{row['way']}.yaml")
        assert command[command.index("--num_processes") + 1] == str(row["processes"])
    else:
        assert command[command.index("--nproc-per-node") + 1] == str(row["processes"])
    if row["kind"] == "score":
        assert command[command.index("qlora_helpers") + 1] == "run"
    else:
        assert json.loads(command[command.index("--job") + 1]) == row
        assert float(command[command.index("--cap") + 1]) == 24


@pytest.mark.parametrize("way", ["one", "fsdp_offload"])
def test_the_longest_sequence_is_the_longest_that_is_predicted_to_fit(way):
    row = {"kind": "step", "model": "8B", "way": way, "processes": 1 if way == "one" else 2, "tokens": None}
    cap = 8 * GIB
    tokens = measure.longest(row, cap)
    assert tokens % 128 == 0
    assert (
        measure.predicted(row, tokens).peak_reserved_bytes
        <= cap
        < measure.predicted(row, tokens + 128).peak_reserved_bytes
    )
    assert measure.longest(row, GIB) == 0


def test_of_the_processes_the_slowest_counts_and_each_has_its_peak():
    found = measure.put_together(
        [SEEN | {"rank": 0, "tokens_per_second": 20}, SEEN | {"rank": 1, "tokens_per_second": 19}]
    )
    assert found == {
        "outcome": "ran",
        "loss": 9.5,
        "tokens_per_second": 19,
        "peak_allocated_bytes": [1, 1],
        "peak_reserved_bytes": [2, 2],
        "host_bytes": [3, 3],
    }


def test_a_length_that_does_not_fit_is_followed_by_three_quarters_of_it(monkeypatch):
    tried = []

    def launched(row, dry, cap, limit):
        tried.append(row["tokens"])
        return row | {"outcome": "ran" if row["tokens"] < 3_000 else "out of memory"}

    monkeypatch.setattr(measure, "launched", launched)
    monkeypatch.setattr(measure, "longest", lambda row, cap: 4_096)
    found = list(measure.attempts(ROW | {"tokens": None}, False, CAP))
    assert tried == [4_096, 3_072, 2_304]
    assert [row["outcome"] for row in found] == ["out of memory", "out of memory", "ran"]
    assert all(row["predicted"]["peak_allocated_bytes"] > 0 for row in found)
    monkeypatch.setattr(measure, "longest", lambda row, cap: 0)
    assert [row["outcome"] for row in measure.attempts(ROW | {"tokens": None}, False, CAP)] == ["predicted not to fit"]


def test_a_launch_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(
        measure, "command_of", lambda *args: [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    )
    found = measure.launched(ROW, False, CAP)
    assert found["outcome"] == "ended with 1" and "no such thing" in found["stderr"]
    assert "no such thing" in measure.show(found)


def test_a_launch_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(measure, "command_of", lambda *args: [sys.executable, "-c", "import time; time.sleep(60)"])
    assert measure.launched(ROW, False, CAP, limit=1)["outcome"] == "not done in 1 s"


@pytest.mark.everything
def test_a_row_is_measured_on_cpu_processes_with_a_tiny_model():
    (found,) = measure.attempts(ROW, True, CAP)
    assert found["outcome"] == "ran", found
    assert len(found["host_bytes"]) == 2 and found["tokens_per_second"] > 0 and found["loss"] > 0
    assert "tokens/s" in measure.show(found | {"peak_allocated_bytes": [GIB, GIB]})
    shared = measure.show(found | {"peak_allocated_bytes": [GIB, GIB], "tokens_per_second": None})
    assert "on one GPU: no pace" in shared


def test_rows_with_more_processes_than_gpus_share_one_and_have_no_pace(tmp_path, monkeypatch):
    rows = measure.with_sharing(measure.plan(2), 1)
    assert {row["label"] for row in rows if row.get("share_a_gpu")} == {
        row["label"] for row in measure.plan(2) if row["processes"] == 2
    }
    assert measure.with_sharing(measure.plan(2), 2) == measure.plan(2)
    score = next(row for row in rows if row["label"].startswith("score ddp"))
    command = measure.command_of(score, False, CAP, tmp_path)
    assert command[command.index("data.scripts.measure.shared_gpu") - 1 :][:4] == [
        "-m", "data.scripts.measure.shared_gpu", "qlora_helpers", "run",
    ]  # fmt: skip
    said = [SEEN | {"rank": rank, "tokens_per_second": 20} for rank in range(2)]
    code = "".join(f"print('RESULT ' + {json.dumps(json.dumps(one))});" for one in said)
    monkeypatch.setattr(measure, "command_of", lambda *args: [sys.executable, "-c", code])
    assert measure.launched(ROW, False, CAP)["tokens_per_second"] == 20
    assert measure.launched(ROW | {"share_a_gpu": True}, False, CAP)["tokens_per_second"] is None


def test_collected_rows_come_beside_those_of_the_table_or_in_their_place(tmp_path):
    table, log = tmp_path / "table.json", tmp_path / "log.jsonl"
    ran = ROW | SEEN | {"cap_bytes": CAP, "made_on": {"gpu": "H200"}}
    offloaded = ran | {"way": "fsdp_offload", "label": "8B fsdp_offload x2 2048"}
    log.write_text(json.dumps(ran) + "\n" + json.dumps(offloaded) + "\n", encoding="utf-8")
    measure.collect([log], table)
    log.write_text(json.dumps(ran | {"loss": 1.0}) + "\n" + json.dumps(ran | {"cap_bytes": 1}) + "\n", encoding="utf-8")
    measure.collect([log], table)
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert rows == [offloaded, ran | {"loss": 1.0}, ran | {"cap_bytes": 1}]
    log.write_text(json.dumps(ran | {"share_a_gpu": True}) + "\n", encoding="utf-8")
    measure.collect([log], table)
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert ran | {"loss": 1.0} in rows and ran | {"share_a_gpu": True} in rows  # one does not replace the other
