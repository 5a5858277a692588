"""Every lesson as Colab runs it, on a GPU; a folder with random weights stands in for the model of the Hub."""

import os

import pytest
import torch

import build  # in notebooks/

CASES = [(name, "colab", "t4") for name in build.lessons()] + [
    (name, "solutions", "ampere") for name in build.lessons()
]


@pytest.mark.parametrize(("name", "edition", "gear"), CASES)
def test_an_edition_runs(name, edition, gear, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_GEAR", gear)
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path))
    monkeypatch.setenv("QLORA_MODEL", stand_ins("Qwen2.5-1.5B"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.cuda.empty_cache()
    notebook = build.build_edition(name, edition, {})
    measured = build.execute(notebook, build.EDITIONS[edition])  # raises at the first cell that does
    said = [o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    print("".join(said)[-1500:])
    print(
        f"\n{name}, {gear}: {measured['seconds']} s, {measured['gigabytes']} GB of main memory, {os.cpu_count()} cores"
    )
