"""From a table on the disk to a tuned model of a real size: data, run and ask, in both gears of a GPU."""

import csv
import gc
import json

import pytest
import torch

from qlora_helpers.__main__ import main
from qlora_helpers.chats import read_chats
from qlora_helpers.commands import run_settings
from qlora_helpers.memory import find_gpu
from qlora_helpers.paths import data_path
from qlora_helpers.units import GIB

ROWS = 60


@pytest.fixture(autouse=True)
def empty_gpu():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def table(tmp_path):
    """Questions and answers about QLoRA as a table, in the way in which spreadsheets save it."""
    path = tmp_path / "faq.csv"
    chats = read_chats(data_path("chats", "qlora", "train.jsonl"))[:ROWS]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([("question", "answer"), *((chat[-2]["content"], chat[-1]["content"]) for chat in chats)])
    return path


def tuned(model, table, folder, capsys, *options):
    """The report of a run, after `data` has looked at the table; and the answer of `ask` to its first question."""
    assert main(["data", str(table), "--model", model]) == 0
    assert main(["run", "--model", model, "--data", str(table), "--output", str(folder), *options]) == 0
    said = capsys.readouterr().out
    assert "faq.csv: 60 rows of question-answer (CSV, semicolons" in said and "6 of the 60 chats are held out" in said
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert main(["ask", str(folder), "What is NF4?", "--max-new-tokens", "8"]) == 0
    answer = capsys.readouterr().out
    predicted, peak = report["predicted_memory_bytes"], report["peak_memory_bytes"]
    settings = report["settings"]
    with capsys.disabled():
        print(
            f"\n{report['model'].rpartition('/')[2]}, {report['gear']}: {settings['steps']} steps of {settings['accumulation']} x "
            f"{settings['batch_size']} chats of up to {settings['max_length']} tokens in {report['train_seconds']:.0f} s of "
            f"{report['total_seconds']:.0f} s; {peak / GIB:.2f} GiB allocated, {predicted / GIB:.2f} predicted; loss "
            f"{report['scores']['before']['loss']:.2f} to {report['scores']['after']['loss']:.2f}"
        )
    return report, answer


def check(report, answer, folder, model):
    assert answer.strip()
    assert report["scores"]["after"]["loss"] < report["scores"]["before"]["loss"]
    assert report["data_rows"] == 54 and report["validation_rows"] == report["test_rows"] == 6
    assert report["forgetting"]["facts"] == 45  # of general knowledge
    assert abs(report["predicted_memory_bytes"] / report["peak_memory_bytes"] - 1) < 0.15
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "faq" in card and str(folder) not in card


@pytest.mark.parametrize("shape", ["Qwen2.5-1.5B", "Qwen2.5-7B"])
def test_a_table_becomes_a_tuned_model_in_a_t4_s_memory(shape, table, stand_ins, t4, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_settings, "gpu_of", lambda hardware: find_gpu("t4"))
    model = stand_ins(shape)
    report, answer = tuned(model, table, tmp_path / "run", capsys, "--epochs", "2")
    check(report, answer, tmp_path / "run", model)
    assert report["gear"] == "t4" and report["peak_memory_bytes"] < find_gpu("t4").usable_bytes


def test_a_table_becomes_a_tuned_model_in_bfloat16(table, stand_ins, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QLORA_GEAR", "ampere")
    model = stand_ins("Qwen2.5-1.5B")
    report, answer = tuned(model, table, tmp_path / "run", capsys)
    check(report, answer, tmp_path / "run", model)


def test_a_run_that_will_not_fit_is_refused(table, stand_ins, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QLORA_GEAR", "ampere")
    model = stand_ins("Qwen2.5-1.5B")
    options = ["--batch-size", "4096", "--max-length", "32768", "--output", str(tmp_path / "run")]
    assert main(["run", "--model", model, "--data", str(table), *options]) == 2
    err = capsys.readouterr().err
    assert "so it will not fit" in err and "What helps, the cheapest first:" in err
    assert not (tmp_path / "run").exists()
