"""The script that times QLoRA variants: its rows, its data, and a row of it on a tiny model."""

import json
import statistics

import pytest
import torch

from data.scripts.measure import speed, speed_clock, speed_data, speed_plan
from qlora_helpers.chats.tokens import tokenized
from qlora_helpers.units import GIB
from tests.support.main_functions import call

ROWS = speed_plan.rows()


def test_every_row_has_a_label_of_its_own_and_a_known_variant():
    labels = [row["label"] for row in ROWS]
    assert len(set(labels)) == len(labels)
    assert {row["variant"] for row in ROWS} == set(speed_plan.VARIANTS)
    assert all((row["cap_gib"] is not None) is (row["gear"] == "t4") for row in ROWS)


def test_the_most_important_rows_come_first():
    labels = [row["label"] for row in ROWS]
    first = ("articles", "trl", "ours", "ours compiled", "ours compiled 16-of-32", "ours compiled none-checkpointed")
    assert labels[: len(first)] == [f"8b bf16 4x2048 full {name}" for name in first]


@pytest.mark.parametrize("count", [60, 384, 2_000])
def test_mixed_lengths_have_the_stated_distribution(count):
    lengths = speed_data.mixed_lengths(count)
    assert len(lengths) == count and lengths != sorted(lengths)
    assert statistics.median(lengths) == pytest.approx(60, rel=0.03)
    assert statistics.quantiles(lengths, n=20)[-1] == pytest.approx(250, rel=0.1)
    assert lengths.count(1_000) == max(1, round(count / 100)) and max(lengths) == 1_000
    assert lengths == speed_data.mixed_lengths(count) != speed_data.mixed_lengths(count, seed=1)


def test_chats_have_exactly_the_lengths_that_were_asked_for():
    lengths = [4, 60, 257]
    chats = speed_data.chats_of(lengths, 512)
    rows = tokenized(chats, speed_data.make_tokenizer(512))
    assert [len(row["input_ids"]) for row in rows] == lengths
    assert [sum(row["assistant_masks"]) for row in rows] == [length - 1 for length in lengths]


@pytest.mark.parametrize("label", ["8b bf16 4x2048 full ours", "8b bf16 3x1024 mixed unsloth packed"])
def test_there_are_tokens_for_every_step(label):
    row = next(row for row in ROWS if row["label"] == label)
    lengths = speed_data.lengths_for(row, steps=10)
    assert max(lengths) <= row["max_length"]
    assert sum(lengths) >= 10 * row["batch_size"] * row["max_length"]


def test_mixed_data_has_the_same_chats_for_all_but_those_that_pack_before_the_run():
    found = [speed_data.lengths_for(row, 18) for row in ROWS if row["label"].startswith("8b t4 8x1024x4 mixed")]
    assert all(lengths == found[0] for lengths in found) and len(found[0]) == 18 * 32


def test_tokens_are_counted_without_padding():
    class Collator:
        pad_token_id = 0

        def __call__(self, rows):
            return {"input_ids": torch.zeros(len(rows), max(len(row["input_ids"]) for row in rows))}

    counted = speed_clock.CountedTokens(Collator())
    counted([{"input_ids": [3, 4, 1]}, {"input_ids": [1]}])
    counted([{"input_ids": [3] * 5}])
    assert (counted.tokens, counted.places, counted.pad_token_id) == ([4, 5], [6, 5], 0)
    assert counted.of_steps(2) == ([9], [11])


def test_kernels_that_overlap_are_counted_once():
    events = [
        {"cat": "kernel", "ts": 0.0, "dur": 2e6},
        {"cat": "kernel", "ts": 1e6, "dur": 2e6},
        {"cat": "gpu_memcpy", "ts": 5e6, "dur": 1e6},
        {"cat": "cuda_runtime", "ts": 0.0, "dur": 9e6},
    ]
    assert speed_clock._busy_seconds({"traceEvents": events}) == (4.0, 6.0)
    with pytest.raises(RuntimeError, match="no kernel"):
        speed_clock._busy_seconds({"traceEvents": []})


def test_a_row_is_measured_and_a_failing_one_is_recorded(tmp_path):
    out, table = tmp_path / "rows.jsonl", tmp_path / "speed.json"
    pattern, wrong = "^1.5b bf16 4x2048 full ours$", '{"no_such_setting": 1}'
    options = ["--device", "cpu", "--rows", pattern, "--out", str(out)]
    code, printed = call(speed.main, *options)
    assert code == 0, printed
    assert call(speed.main, *options, "--with", wrong)[0] == 1
    ran, failed = speed.read_results(out).values()
    assert ran["outcome"] == "ran" and ran["tokens_per_second"] > 0 and len(ran["losses"]) == 3
    assert ran["step_tokens"] == ran["step_places"] == [128] * 3
    assert failed["label"] == ran["label"] + " no_such_setting=1"
    assert failed["outcome"] == "failed" and "no_such_setting" in failed["error"] and failed["log"]
    assert call(speed.main, *options, "--dry-run") == (0, "0 rows\n")  # it is there already
    assert call(speed.main, "--collect", str(out), "--table", str(table))[0] == 0
    assert [row["outcome"] for row in json.loads(table.read_text())["rows"]] == ["ran", "failed"]


def test_the_table_has_the_predicted_peak_of_our_own_rows_in_the_plans_order(tmp_path):
    labels = ("8b t4 1x2048 full ours", "8b bf16 4x2048 full ours", "8b bf16 4x2048 full articles")
    ran = [row | {"outcome": "ran", "peak_allocated_bytes": 1} for row in ROWS if row["label"] in labels]
    out, table = tmp_path / "rows.jsonl", tmp_path / "speed.json"
    out.write_text("".join(json.dumps(row) + "\n" for row in reversed(ran)))
    rows = speed.collect([out], table)["rows"]
    assert [row["label"] for row in rows] == [row["label"] for row in ROWS if row["label"] in labels]
    assert not any("config" in row for row in rows) and "predicted_peak_allocated_bytes" not in rows[0]
    # what an H200 took in an earlier run of the same settings
    assert rows[1]["predicted_peak_allocated_bytes"] / GIB == pytest.approx(9.5, rel=0.05)
    assert rows[2]["predicted_peak_allocated_bytes"] < rows[1]["predicted_peak_allocated_bytes"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"label": "a", "outcome": "failed"}\n{"label": "a", "outcome": "ran"}\n{"label": "b", "outc')
    assert speed.read_results(out) == {"a": {"label": "a", "outcome": "ran"}}


def test_rows_that_are_collected_get_the_next_call_and_the_others_stay(tmp_path):
    table, out = tmp_path / "speed.json", tmp_path / "rows.jsonl"
    for pace, labels in ((10, "ab"), (20, "bc")):
        lines = [{"label": label, "outcome": "ran", "variant": "trl", "config": {}, "pace": pace} for label in labels]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        speed.collect([out], table)
    rows = {row["label"]: (row["call"], row["pace"]) for row in json.loads(table.read_text())["rows"]}
    assert rows == {"a": (1, 10), "b": (2, 20), "c": (2, 20)}


def test_the_budgets_are_as_fast_as_the_readme_says():
    rows = {row["label"]: row for row in json.loads(speed.TABLE.read_text())["rows"]}
    unsloth = rows["8b bf16 4x2048 full unsloth"]
    for size, times in (("14.3GiB", 1.0), ("24GiB", 1.05), ("48GiB", 1.3)):
        row = rows[f"8b bf16 4x2048 full ours compiled in-{size}"]
        assert row["call"] == unsloth["call"]
        assert row["tokens_per_second"] > times * unsloth["tokens_per_second"], size
