"""The package by itself: installed without the course, and used from a project's own folder."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_helpers.paths import data_path
from tests import ROOT

# Everything that one's own project would call first. What it prints is compared below.
PROJECT = """
import json
from pathlib import Path

import qlora_helpers
from qlora_helpers.memory import GPU_RUN, find_gpu, find_shape, predict

found = {"from": str(Path(qlora_helpers.__file__).parents[1]), "typed": Path(qlora_helpers.__file__).with_name("py.typed").exists()}
found["gpu"] = find_gpu("t4").name
found["fits"] = predict(find_shape("meta-llama/Llama-3.1-8B"), GPU_RUN, "4090").fits

import torch
from qlora_helpers.quantize import NF4, dequantize, quantize

found["levels"] = len(dequantize(quantize(torch.randn(4096, generator=torch.Generator().manual_seed(0)), NF4, 4096, False)).unique())

from qlora_helpers.chats import read_chats
from qlora_helpers.evaluation import answer
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import new_run_folder

tokenizer = load_tokenizer("my-model")
run = train(load_model("my-model"), tokenizer, read_chats("mine.jsonl"), new_run_folder("mine"), Settings(steps=2, batch_size=2))
found["adapter"] = sorted(path.name for path in run.saved_path.iterdir())
found["where"] = str(run.saved_path)
from qlora_helpers.evaluation.knowledge import general_items

found["items"] = len(general_items())
found["answers"] = len(answer(run.model, tokenizer, [[{"role": "user", "content": "Hello?"}]]))
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed this package alone; the libraries are those of this environment."""
    copy, site = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "qlora_helpers", copy / "qlora_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--target", str(site), str(copy)]
    subprocess.run(command, check=True)
    return site


def test_a_project_of_one_s_own_uses_it_from_its_folder(site, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(data_path("tiny-llama"), project / "my-model")
    lines = data_path("chats", "train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (project / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QLORA")}
    done = subprocess.run(
        [sys.executable, "-c", PROJECT],
        cwd=project,
        env=environment | {"PYTHONPATH": str(site), "QLORA_GEAR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("found ")[2])
    assert Path(found.pop("where")) == project / "runs" / "mine-1" / "adapter"
    assert found == {
        "from": str(site), "typed": True, "gpu": "Tesla T4", "fits": True, "levels": 16,
        "adapter": ["adapter_config.json", "adapter_model.safetensors", "base.json"], "answers": 1, "items": 60,
    }  # fmt: skip


def test_a_command_runs_from_there_too(site, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qlora_helpers", "memory", "qwen2.5-7b", "--gpu", "t4"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and "fits with" in done.stdout


def test_every_module_of_the_package_is_installed(site):
    modules = {
        path.relative_to(ROOT) for path in (ROOT / "qlora_helpers").rglob("*") if path.suffix in (".py", ".json")
    }
    assert len(modules) > 40
    assert [str(path) for path in sorted(modules) if not (site / path).exists()] == []


def test_importing_a_module_gives_the_module():
    """A room that gives out a function under the name of one of its modules would hide the module."""
    for room in (path.parent for path in (ROOT / "qlora_helpers").rglob("__init__.py")):
        modules = {path.stem for path in room.glob("*.py")} | {path.parent.name for path in room.glob("*/__init__.py")}
        tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
        given_out = {
            alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert modules & given_out == set(), room


def test_nothing_edits_the_path_of_modules_but_what_must():
    """Scripts are modules. Colab's set-up, and preflight called from any folder, need modules that pip does not install;
    mutants are imported from a copy."""
    editing = [
        path.relative_to(ROOT).as_posix()
        for folder in ("qlora_helpers", "data", "notebooks", "teaching", "tests", "colab", "website")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*sys\.path(\.insert|\[:?0?\]| \+?=)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(editing) == [
        "colab/setup.py",
        "qlora_helpers/commands/preflight.py",
        "tests/support/mutants.py",
    ]


def test_the_example_of_the_readme_calls_what_there_is():
    """Its imports work, and its calls have arguments of these names; a run of it is above."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    imports = "\n".join(line for line in example.splitlines() if line.startswith("from "))
    names: dict = {}
    exec(imports, names)
    called = {
        node.func.id: node for node in ast.walk(ast.parse(example)) if isinstance(getattr(node, "func", None), ast.Name)
    }
    assert {"predict", "train", "Settings", "read_chats"} <= called.keys()
    for name in ("predict", "find_shape", "load_model", "read_chats", "Settings", "train"):
        call = called[name]
        inspect.signature(names[name]).bind(*call.args, **{keyword.arg: None for keyword in call.keywords})
