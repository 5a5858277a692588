"""What the libraries' own step says about the measured runs, as it was recorded, and as the installed libraries say it."""

import importlib.metadata
import json

import pytest

from data.scripts.measure import memory_errors
from data.scripts.measure.memory_errors import mean_and_worst

RECORDED, MEASURED_WITH = memory_errors.recorded(), memory_errors.measured_with()
EIGHT = [row for rows in memory_errors.groups().values() for row in rows]
OTHERS = memory_errors.groups_of_other_families()
ALL = EIGHT + [row for rows in OTHERS.values() for row in rows]
INSTALLED = importlib.metadata.version("transformers")


def found(rows):
    """The mean and the worst error of each figure, as recorded with the transformers of the measurement."""
    errors = memory_errors.errors(memory_errors.pairs_of(rows, MEASURED_WITH))
    return {of: mean_and_worst(sizes) for of, sizes in errors.items() if sizes}


def test_each_measured_run_is_recorded_with_the_versions():
    assert next(iter(RECORDED)) == MEASURED_WITH
    for version, entry in RECORDED.items():
        assert entry["versions"].keys() == set(memory_errors.LIBRARIES)
        assert entry["versions"]["transformers"] == version
        assert entry["rows"].keys() == {row["label"] for row in ALL}
    measured = memory_errors.table_of("memory_families.json")["versions"]
    for name in ("peft", "trl", "bitsandbytes"):
        assert RECORDED[MEASURED_WITH]["versions"][name] == measured[name]


@pytest.mark.parametrize("group", OTHERS)
def test_other_families_lie_near_the_measured_runs(group):
    errors = found(OTHERS[group])
    mean, worst = errors["loaded_bytes"]
    assert mean < 0.005 and worst < 0.02
    mean, worst = errors["peak_allocated_bytes"]
    assert mean < 0.003 and worst < 0.015
    assert errors["peak_reserved_bytes"][0] < 0.02 and errors["device_bytes"][0] < 0.02
    assert errors["evaluation_bytes"][1] < 0.005


def test_the_libraries_agree_with_the_layers_that_are_written_out():
    errors = found(EIGHT)
    written_out = memory_errors.errors(memory_errors.pairs_of(EIGHT))
    for of in ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes"):
        assert errors[of][0] < mean_and_worst(written_out[of])[0] + 0.001, of


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.everything)])
def test_the_installed_libraries_say_what_was_recorded(every):
    if INSTALLED not in RECORDED:
        pytest.skip(f"nothing was recorded with transformers {INSTALLED}: memory_errors.py --record does it")
    rows = {row["label"]: row for rows in OTHERS.values() for row in rows}
    rows |= {row["label"]: row for row in EIGHT[::5]}
    for label, row in list(rows.items())[::every]:
        said = RECORDED[INSTALLED]["rows"][label]
        assert "error" not in said, label
        now = {of: size for of, size in memory_errors.by_the_libraries(row).items() if size is not None}
        # what Python's garbage collector frees may go an operation sooner or later, which can cost a segment
        assert now == pytest.approx(said, rel=1e-3), label


# Where transformers has changed since the measurement, so that its newest recorded version says something else: what differs
CHANGED = {
    "bamba": "Mamba2's scan multiplies and sums by einsum, where it made the products of all pairs of positions first",
    "granitemoe": "its router hands on its logits in another way, and the mask of the experts is one wider",
    "qwen2": "rotary positions take other steps: hardly any other allocated memory, but another order of requests",
    "qwen3": "rotary positions take other steps: hardly any other allocated memory, but another order of requests",
}


def test_the_models_whose_code_has_changed_are_known_and_listed():
    changed = memory_errors.changed()
    by_label = {row["label"]: row for row in ALL}
    assert {by_label[label]["config"]["model_type"] for label in changed} == CHANGED.keys()
    sentence = memory_errors.markdown_table().splitlines()[-1]
    assert MEASURED_WITH in sentence and list(RECORDED)[-1] in sentence
    for label in changed:
        assert f"{label.split()[0]} (" in sentence


def test_a_run_that_the_libraries_cannot_make_is_recorded_and_counted(tmp_path, monkeypatch, capsys):
    rows = [row for rows in OTHERS.values() for row in rows if row["model"].startswith("gpt2")]
    broken = [rows[0] | {"label": "no such layers", "target_modules": ["nothing"]}]
    monkeypatch.setattr(memory_errors, "RECORDED", tmp_path / "recorded.json")
    monkeypatch.setattr(memory_errors, "groups", dict)
    monkeypatch.setattr(memory_errors, "groups_of_other_families", lambda: {"some": rows + broken})
    memory_errors.record()
    assert "no layer is called 'nothing'" in capsys.readouterr().out
    kept = json.loads((tmp_path / "recorded.json").read_text(encoding="utf-8"))[INSTALLED]["rows"]
    assert [label for label, figures in kept.items() if "error" in figures] == ["no such layers"]
    assert [row["label"] for row, _ in memory_errors.pairs_of(rows + broken, INSTALLED)] == [
        row["label"] for row in rows
    ]
    line = memory_errors._line("some", 2, memory_errors.pairs_of(rows + broken, INSTALLED))
    assert line.startswith("| some | 2 | ") and line.count("(1 runs)") == 3
