"""The promises of the README and of the project's own files."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import build
import pytest
from measured_tables import fill
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))
RANGES = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]

# What Colab's GPU runtime had in November 2026.
COLAB = {
    "accelerate": "1.14.0", "datasets": "4.0.0", "ipywidgets": "7.7.1", "matplotlib": "3.10.0", "numpy": "2.1.3",
    "peft": "0.20.0", "psutil": "5.9.5", "safetensors": "0.8.0", "tokenizers": "0.22.2", "torch": "2.11.0+cu128",
    "transformers": "5.15.0",
}  # fmt: skip


def test_the_generated_tables_of_the_readme_are_up_to_date():
    assert fill(README, build.readme_tables()) == README, "run: make notebooks"


def test_the_readme_names_the_two_commands_and_ci_calls_one_of_them():
    assert re.search(r"^make run\b", README, re.M)
    assert re.search(r"^make test\b", README, re.M)
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", ["README.md", "data/tiny-llama/README.md", "LICENSE-CONTENT.md"])
def test_links_to_files_resolve(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_numbers_of_a_lesson_s_summary_are_printed_by_the_lesson():
    for name, summary in json.loads((ROOT / "notebooks" / "lessons.json").read_text()).items():
        printed = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
        for number in re.findall(r"\d+\.\d+", summary):
            assert number in printed, (name, number)


def test_every_lesson_has_a_summary():
    assert list(json.loads((ROOT / "notebooks" / "lessons.json").read_text())) == build.lessons()


def test_the_pins_are_exact_and_lie_within_the_ranges():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(PINS)
    for requirement in RANGES:
        assert requirement.specifier.contains(PINS[requirement.name]), str(requirement)


def test_the_ranges_admit_what_colab_has():
    for requirement in RANGES:
        if requirement.name in COLAB:
            assert requirement.specifier.contains(COLAB[requirement.name]), str(requirement)


def test_no_file_names_a_path_of_the_machine_it_was_made_on():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is asked of git")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".safetensors",):
            assert str(ROOT) + "/" not in path.read_text(encoding="utf-8"), name
