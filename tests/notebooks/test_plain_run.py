"""Lesson 4's run in the libraries' own words: short, whole without this course, and the same run as `train` makes."""

import ast
import builtins
import os
import shutil
import subprocess
import sys

import datasets
import nbformat
import pytest
import torch
from trl import SFTConfig

from notebooks.scripts import build
from notebooks.scripts.running import code_cells, has_tag
from qlora_helpers.chats import read_chats
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from tests.support.short_runs import CHATS, adapter, differing, run

NAMES = "plain-run-names"  # the cell in which learners write names of their own
LESSON = nbformat.read(build.EDITIONS["learner"] / "04_qlora_run.ipynb", as_version=4)
CELLS = [cell for cell in code_cells(LESSON) if has_tag(cell, "plain-run") or has_tag(cell, NAMES)]
OWN_NAMES = 'model_name = "model"\ndata_file = "train.jsonl"\noutput_dir = "tuned"'


def script(names: str = OWN_NAMES) -> str:
    """The cells as a learner takes them along, with other names."""
    return "\n\n".join(names if has_tag(cell, NAMES) else cell.source for cell in CELLS)


def bound(code: str) -> set[str]:
    """The names that code assigns or imports."""
    nodes = list(ast.walk(ast.parse(code)))
    imported = {
        alias.asname or alias.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names
    }
    return imported | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def test_the_cells_are_short_and_use_nothing_of_this_course():
    lines = [line for cell in CELLS for line in cell.source.splitlines()]
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert all(2 <= len(cell.source.splitlines()) <= 15 for cell in CELLS)
    assert sum(has_tag(cell, NAMES) for cell in CELLS) == 1 and "qlora_helpers" not in script()
    used = {node.id for node in ast.walk(ast.parse(script())) if isinstance(node, ast.Name)}
    assert used <= bound(script()) | set(dir(builtins)), "a name that only the lesson knows"


def test_what_the_lesson_says_of_names_is_what_its_cell_sets():
    (cell,) = [cell for cell in CELLS if has_tag(cell, NAMES)]
    assert bound(cell.source) == bound(OWN_NAMES) | {"on_gpu", "dtype"}
    assert {"on_gpu", "dtype"} <= bound(CELLS[0].source), "the line to leave out must not be needed"


def test_the_cells_stand_alone_in_another_folder_and_give_the_adapters_of_train(tmp_path):
    shutil.copytree(data_path("tiny-llama"), tmp_path / "model")
    shutil.copy(data_path("chats", "train.jsonl"), tmp_path)
    (tmp_path / "run.py").write_text(script(), encoding="utf-8")
    (tmp_path / "qlora_helpers.py").write_text("raise ImportError('the cells must stand alone')", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "QLORA_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'loss'") == 4  # of 20 steps, each fifth
    ours = run(tmp_path / "ours", Settings(steps=20, warmup_steps=2), read_chats(data_path("chats", "train.jsonl")))
    assert adapter(ours.saved_path).keys() == adapter(tmp_path / "tuned").keys()
    assert differing(adapter(ours.saved_path), adapter(tmp_path / "tuned")) == []


# ---- What the lesson says of single lines, in runs of three steps

SHORT = Settings(steps=3, warmup_steps=2)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return adapter(run(tmp_path_factory.mktemp("ours") / "run", SHORT, CHATS).saved_path)


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A function that runs the cells in this process, with some texts replaced, and returns the adapters."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    lines = data_path("chats", "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[: len(CHATS)]), encoding="utf-8")

    def adapters(*replacements: tuple[str, str]):
        code = script(OWN_NAMES.replace('"model"', repr(str(data_path("tiny-llama")))))
        for old, new in (("max_steps=20", "max_steps=3"), *replacements):
            assert code.count(old) == 1, old
            code = code.replace(old, new)
        exec(compile(code, "plain run", "exec"), {})
        return adapter(tmp_path / "tuned")

    return adapters


@pytest.mark.parametrize(
    "replacement",
    [
        ("max_steps=3", "max_steps=3"),
        ("logging_steps=5", "logging_steps=1"),
        ("use_cpu", "gradient_checkpointing=False, use_cpu"),
    ],
    ids=["as it is", "more logging", "activations kept"],
)
def test_what_does_not_matter_to_the_last_bit(plain, ours, replacement):
    assert differing(plain(replacement), ours) == []


@pytest.mark.parametrize(
    "replacement",
    [
        ("seed=0, ", ""),
        ("parameter.data.float()", "parameter.data"),
        (" dtype=dtype,", ""),
        ("optim=", "# optim="),
        ("assistant_only_loss=True,", ""),
    ],
    ids=["seed", "float32 adapters", "dtype", "optimizer", "the answers' loss"],
)
def test_what_matters(plain, ours, replacement):
    assert differing(plain(replacement), ours)


def test_without_bf16_said_off_trl_refuses_a_cpu(plain):
    with pytest.raises(ValueError, match="doesn't support bf16/gpu"):
        plain(("use_cpu=not on_gpu,", ""), ("bf16=dtype == torch.bfloat16, ", ""))


def test_the_defaults_of_which_the_lesson_tells(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert (config.num_train_epochs, config.learning_rate, config.seed) == (3, 2e-5, 42)
    assert config.warmup_steps == 0
    assert (config.save_strategy, config.save_steps) == ("steps", 500)
    assert config.gradient_checkpointing and config.max_length and config.truncation_mode == "keep_start"
    assert config.optim == "adamw_torch_fused" and SFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16
