"""What is predicted for two GPUs, against what two H200s took (data/measured/several_gpus.json)."""

import json

import pytest

from data.scripts.measure.several_gpus import predicted
from qlora_helpers.memory import find_gpu
from qlora_helpers.memory.sharding import HOST_TRAINING, NCCL_BYTES
from qlora_helpers.paths import data_path
from qlora_helpers.units import GIB
from tests import ROOT

ROWS = json.loads(data_path("measured", "several_gpus.json").read_text(encoding="utf-8"))["rows"]
RAN = [row for row in ROWS if row["outcome"] == "ran"]


def name(row: dict) -> str:
    return f"{row['label']}, {row['cap_bytes'] / GIB:.0f} GiB"


def test_each_way_was_measured():
    assert {(row["model"], row["way"]) for row in RAN} == {
        ("8B", "fsdp"),
        ("8B", "fsdp_offload"),
        ("8B", "ddp"),
        ("70B", "fsdp"),
        ("70B", "fsdp_offload"),
    }
    assert all(len(set(row["peak_allocated_bytes"])) == 1 for row in RAN)  # both GPUs took the same


@pytest.mark.parametrize("row", RAN, ids=name)
def test_tensors_take_what_is_predicted(row):
    found = predicted(row, row["tokens"])
    assert found.peak_allocated_bytes == pytest.approx(row["peak_allocated_bytes"][0], rel=0.01)


@pytest.mark.parametrize("row", RAN, ids=name)
def test_main_memory_is_what_is_predicted(row):
    assert predicted(row, row["tokens"]).host_bytes_of_run == pytest.approx(sum(row["host_bytes"]), rel=0.03)


@pytest.mark.parametrize("row", RAN, ids=name)
def test_the_allocator_holds_little_more_than_is_predicted(row):
    """Or less: it holds what there is room for, and under a limit gives back what no tensor needs."""
    share = predicted(row, row["tokens"]).peak_reserved_bytes / row["peak_reserved_bytes"][0]
    assert 0.94 < share < 1.15
    assert row["peak_reserved_bytes"][0] <= row["cap_bytes"]


def test_70b_was_predicted_not_to_fit_24_gib_sharded_and_did_not():
    (row,) = (row for row in ROWS if row["outcome"] == "out of memory")
    assert (row["model"], row["way"], row["cap_bytes"]) == ("70B", "fsdp", 24 * GIB)
    assert predicted(row, row["tokens"]).peak_allocated_bytes > row["cap_bytes"]
    assert row["predicted"]["peak_allocated_bytes"] > row["cap_bytes"]
    larger = next(other for other in RAN if other["label"] == row["label"])
    assert row["cap_bytes"] < predicted(larger, larger["tokens"]).peak_allocated_bytes < larger["cap_bytes"]


def test_the_memory_of_a_process_is_that_of_the_data_parallel_run():
    (row,) = (row for row in RAN if row["way"] == "ddp")
    assert max(row["host_bytes"]) == HOST_TRAINING


WAYS = {"ddp": "copies", "fsdp": "shards", "fsdp_offload": "offloaded"}


def line_of(row: dict) -> str:
    """A row as README's table has it."""
    found, ran = predicted(row, row["tokens"]), row["outcome"] == "ran"
    limit = f", limit {row['cap_bytes'] / GIB:.0f} GiB" if (row["model"], row["way"]) == ("70B", "fsdp") else ""
    return " | ".join(
        [
            f"| {row['model']}",
            WAYS[row["way"]] + limit,
            f"{max(row['peak_allocated_bytes']) / GIB:.2f}" if ran else row["outcome"],
            f"{found.peak_allocated_bytes / GIB:.2f}",
            f"{max(row['peak_reserved_bytes']) / GIB:.2f}" if ran else "–",
            f"{found.peak_reserved_bytes / GIB:.2f}",
            f"{sum(row['host_bytes']) / GIB:.1f}" if ran else "–",
            f"{found.host_bytes_of_run / GIB:.1f}",
            f"{row['tokens_per_second']:,} |" if ran else "– |",
        ]
    )


def test_the_readme_has_the_table_and_says_what_it_shows():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in ROWS:
        assert line_of(row) in readme, line_of(row)
    assert {(row["model"], row["tokens"]) for row in ROWS} == {("8B", 2_048), ("70B", 512)}
    before = [row["predicted"]["peak_allocated_bytes"] / row["peak_allocated_bytes"][0] - 1 for row in RAN]
    assert 0.05 < max(map(abs, before)) < 0.06 and "within 6 % for the tensors" in readme
    (offloaded,) = (row for row in RAN if (row["model"], row["way"]) == ("70B", "fsdp_offload"))
    for words in (
        f"torch reserved {offloaded['peak_reserved_bytes'][0] / GIB:.1f} GiB on each of two GPUs of type H200",
        f"main memory took {sum(offloaded['host_bytes']) / GIB:.0f} GiB, at {offloaded['tokens_per_second']} tokens/s",
        f"measured for {len(ROWS)} runs on two GPUs".replace("6", "six"),
    ):
        assert words in " ".join(readme.split()), words


def test_70b_in_shards_fits_two_cards_of_32_gb_and_not_of_24():
    (row,) = (row for row in RAN if (row["model"], row["way"]) == ("70B", "fsdp"))
    found = predicted(row, row["tokens"], "5090")
    assert found.fits and not predicted(row, row["tokens"], "4090").fits


def test_70b_offloaded_took_what_a_card_of_12_gb_has():
    """With the context and NCCL's assumed share. The prediction is higher: it names cards of 16 GB."""
    (row,) = (row for row in RAN if (row["model"], row["way"]) == ("70B", "fsdp_offload"))
    small = find_gpu("3060-12")
    assert row["peak_reserved_bytes"][0] + small.context_bytes + NCCL_BYTES < small.usable_bytes
    assert not predicted(row, row["tokens"], small).fits and predicted(row, row["tokens"], "4060ti-16").fits
