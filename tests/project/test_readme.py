"""The promises of the README and of the project's own files."""

import ast
import json
import re
import subprocess
import tomllib
from collections import Counter

import pytest
from packaging.requirements import Requirement

from data.scripts.markdown_tables import fill
from notebooks.scripts import api_page, build
from qlora_helpers.course.troubleshooting import read_entries
from qlora_helpers.memory import catalogue, gpus
from tests import ROOT

README = (ROOT / "README.md").read_text()
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))
RANGES = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]

# The packages in Colab's GPU runtime; the requirements of each come after the bars.
COLAB = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "colab" / "runtime-packages.txt").read_text(), re.M))


def test_the_generated_tables_of_the_readme_are_up_to_date():
    assert fill(README, build.readme_tables()) == README, "run: make notebooks"


def test_the_readme_s_commands_are_those_of_the_makefile_and_ci_checks_everything():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    in_the_table = {command.split()[0] for command in build.COMMANDS}
    quick_start = set(re.findall(r"^make ([\w-]+)", README, re.M))
    assert {"run", "test", "lab"} <= quick_start <= targets
    assert (
        {
            "run",
            "preflight",
            "teaching",
            "test",
            "test-all",
            "test-real",
            "test-colab",
            "attack",
            "mutants",
            "notebooks",
            "site",
        }
        == in_the_table
        <= targets
    )
    assert re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M) == [
        "test-all",
        "test-colab",
        "attack",
    ]


def test_the_times_of_the_commands_were_measured_three_times_where_an_instructor_waits():
    rows = json.loads((ROOT / "data" / "measured" / "commands.json").read_text())["rows"]
    runs = Counter(row["command"] for row in rows)
    assert runs.keys() == build.COMMANDS.keys()
    assert runs["test"] >= 3 and runs["preflight"] >= 3


def test_a_time_of_another_number_of_lessons_says_so(tmp_path, monkeypatch):
    measured = json.loads((ROOT / "data" / "measured" / "commands.json").read_text(encoding="utf-8"))
    (tmp_path / "data" / "measured").mkdir(parents=True)
    monkeypatch.setattr(build, "lessons", lambda: ["one"] * 12)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for count, said in ((12, "| 1 min 10 s |"), (11, "| 1 min 10 s for 11 lessons |")):
        others = [row for row in measured["rows"] if row["command"] != "preflight"]
        row = {"command": "preflight", "seconds": 70, "said": [f"✓ ready: {count} lessons in 1 min 10 s."]}
        table = json.dumps(measured | {"rows": [*others, row]})
        (tmp_path / "data" / "measured" / "commands.json").write_text(table, encoding="utf-8")
        assert any(line.endswith(said) for line in build.commands_table().splitlines() if "`make preflight`" in line)


def test_the_table_has_the_times_of_the_newest_day(tmp_path, monkeypatch):
    measured = json.loads((ROOT / "data" / "measured" / "commands.json").read_text(encoding="utf-8"))
    (tmp_path / "data" / "measured").mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    others = [row for row in measured["rows"] if row["command"] != "run"]
    days = [
        {"command": "run", "seconds": s, "said": [], "date": d} for s, d in ((90, "2026-01-01"), (40, "2026-01-02"))
    ]
    content = json.dumps(measured | {"rows": [*others, *days]})
    (tmp_path / "data" / "measured" / "commands.json").write_text(content, encoding="utf-8")
    assert any(line.endswith("| 40 s |") for line in build.commands_table().splitlines() if "`make run`" in line)


def test_links_to_files_resolve():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("data/**/*.md"), *ROOT.glob("teaching/**/*.md")]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not target.startswith("http")
    ]
    assert {page.name for page, _ in links} >= {"README.md", "TROUBLESHOOTING.md", "CLAIMS.md"}
    assert [(page.name, target) for page, target in links if not (page.parent / target).exists()] == []


def test_the_numbers_about_the_t4_gear_are_the_measured_ones():
    rows = json.loads((ROOT / "data" / "measured" / "t4_gear.json").read_text())["rows"]
    loading = next(row for row in rows if row["what"] == "loading")
    own, disk = loading["host_own_bytes"] / 1e9, loading["disk_bytes"] / 1e9
    assert own < 10 and disk < 20
    text = " ".join(README.split())
    assert f"needs {own:.2f} GB of main memory of its own while it is loaded, and {disk:.2f} GB of disk" in text
    for split, said in (("train", "on {} questions about QLoRA"),):
        count = len((ROOT / "data" / "chats" / "qlora" / f"{split}.jsonl").read_bytes().splitlines())
        assert said.format(count) in text
    fits = {
        who: [
            row["tokens"]
            for row in rows
            if row["what"] == "training"
            and (row["model"], row["gear"], row["batch_size"], row["who"]) == ("Llama-3.1-8B", "t4", 1, who)
            and row["outcome"] == "ran"
        ]
        for who in ("recipe", "ours")
    }
    said = (
        "the recipe trains 8B at {:,} tokens and not at 4,096; this course's gear trains it at {:,} and not at 16,384"
    )
    assert said.format(max(fits["recipe"]), max(fits["ours"])) in text
    killed = (ROOT / "data" / "measured" / "kills.txt").read_text()
    assert "20 of 20 runs ended bit-identical to the uninterrupted one" in killed
    for where in ("between steps", "inside a save", "inside an evaluation"):
        assert where in killed
    assert "20 runs killed for real, between steps, inside saves and inside evaluations" in text


def test_the_readme_counts_the_models_and_gpus_that_the_memory_command_knows():
    models = json.loads(catalogue.TABLE.read_text())["models"]
    cards = json.loads(gpus.TABLE.read_text())
    text = " ".join(README.split())
    assert f"It knows {len(models)} open models by name" in text and f"{len(cards)} GPUs" in text


def test_the_readme_counts_the_entries_of_the_troubleshooting_page():
    entries = read_entries(ROOT / "TROUBLESHOOTING.md")
    on_a_cpu = [entry for entry in entries if any(not test.startswith("tests/gpu/") for test in entry.tests)]
    on_a_gpu = [entry for entry in entries if entry.tests and entry not in on_a_cpu]
    said = f"{len(entries)} entries: tests provoke {len(on_a_cpu)} on a CPU and {len(on_a_gpu)} more on a GPU"
    assert said in " ".join(README.split())


def uses(source: str, helper: str) -> bool:
    """Whether code imports the module, or a name that it gives out, or takes one from its room; or a text names its file."""
    room, _, module = helper.rpartition("/")
    public = api_page.public_names(ast.parse((ROOT / "qlora_helpers" / f"{helper}.py").read_text(encoding="utf-8")))
    package = f"qlora_helpers.{room}".rstrip(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if node.module == f"{package}.{module}" or (node.module == package and names & {module, *public}):
                return True
            if (
                node.module == "qlora_helpers"
                and room in names
                and re.search(rf"\b{room}\.({'|'.join(public)})\b", source)
            ):
                return True
    return f"qlora_helpers/{helper}.py" in source


def test_each_lesson_uses_the_helpers_that_the_map_names_and_their_tests_do():
    assert list(build.HELPERS) == build.lessons()
    for name, helpers in build.HELPERS.items():
        source = (build.SOURCES / f"{name}.py").read_text(encoding="utf-8")
        for helper in helpers:
            room, _, module = helper.rpartition("/")
            test = ROOT / "tests" / room / f"test_{module}.py"
            assert uses(source, helper), f"{name} does not use {helper}"
            assert uses(test.read_text(encoding="utf-8"), helper), f"{test.name} does not test {helper}"
    assert not uses("from qlora_helpers.memory import find_gpu", "memory/ladder")
    assert not uses("from qlora_helpers import evaluation\nevaluation.loss()", "evaluation/answers")


def test_the_environment_variables_of_the_readme_are_those_that_the_package_reads():
    read = set()
    for path in (ROOT / "qlora_helpers").rglob("*.py"):
        read |= set(re.findall(r"\bQLORA_[A-Z]+\b", path.read_text(encoding="utf-8")))
    assert set(re.findall(r"^\| `(QLORA_[A-Z]+)`", README, re.M)) == read >= {"QLORA_GEAR", "QLORA_RUNS"}


def test_the_map_in_the_readme_is_today_s(tmp_path):
    """Its texts stand in it as comments; the letters are paths, which another version of matplotlib may draw otherwise."""
    build.write_map(tmp_path / "map.svg")
    shown, today = (
        re.findall(r"<!-- (.+?) -->", path.read_text(encoding="utf-8"))
        for path in (build.EDITIONS["learner"] / build.MAP, tmp_path / "map.svg")
    )
    assert shown == today and len(today) > 20, "run: make notebooks"
    assert f"](notebooks/{build.MAP})" in README and (ROOT / "notebooks" / build.MAP).exists()


def test_every_lesson_has_a_summary():
    assert list(json.loads((ROOT / "notebooks" / "scripts" / "lessons.json").read_text())) == build.lessons()


def test_the_pins_are_exact_and_lie_within_the_ranges():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(PINS)
    for requirement in RANGES:
        assert requirement.specifier.contains(PINS[requirement.name]), str(requirement)


def test_the_ranges_admit_what_colab_has():
    assert {"torch", "transformers", "peft", "numpy", "ipywidgets"} <= COLAB.keys()
    for requirement in RANGES:
        if requirement.name in COLAB:
            assert requirement.specifier.contains(COLAB[requirement.name]), str(requirement)


def test_no_file_names_a_path_of_the_machine_it_was_made_on():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: git lists the project's files")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".safetensors",):
            assert str(ROOT) + "/" not in path.read_text(encoding="utf-8"), name
