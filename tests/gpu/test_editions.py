"""Every lesson as Colab runs it, on a GPU; a folder with random weights replaces the model on the Hub."""

import os

import nbformat
import pytest
import torch

from notebooks.scripts import build
from qlora_helpers.course import check_lines

CASES = [(name, "colab", "t4") for name in build.lessons()] + [
    (name, "solutions", "ampere") for name in build.lessons()
]


def compared(notebook) -> dict[str, str]:
    """By cell id, the output of cells that print the same on every machine; without cells that query the gear."""
    return {
        cell.id: check_lines.compared("".join(o.text for o in cell.outputs if o.output_type == "stream"))
        for cell in notebook.cells
        if "nbval-check-output" in cell.metadata.get("tags", [])
        and not any(word in cell.source for word in (".gear", "SHIPPED_MODEL"))
    }


@pytest.mark.parametrize(("name", "edition", "gear"), CASES)
def test_an_edition_runs_and_prints_what_the_cpu_gear_prints(name, edition, gear, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_GEAR", gear)
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path))
    monkeypatch.setenv("QLORA_MODEL", stand_ins("Qwen2.5-1.5B"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.cuda.empty_cache()
    notebook = build.build_edition(name, edition, {})
    try:
        measured = build.execute(notebook, build.EDITIONS[edition])  # raises at the first cell that fails
    finally:
        nbformat.write(notebook, tmp_path / f"{name}_{gear}.ipynb")  # for inspection
    said = [o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    print("".join(said)[-1500:])
    print(
        f"\n{name}, {gear}: {measured['seconds']} s, {measured['gigabytes']} GB of main memory, {os.cpu_count()} cores"
    )
    on_the_cpu = nbformat.read(build.EDITIONS[edition] / f"{name}.ipynb", as_version=4)
    assert compared(notebook) == compared(on_the_cpu)
