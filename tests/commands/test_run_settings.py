"""The settings of a run: what is named takes the place of what is suggested, and the GPU decides what fits."""

import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.commands import run_settings
from qlora_helpers.commands.run_request import Request
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.suggestions import warmup_steps
from tests.support.short_runs import CPU


def test_what_is_named_takes_the_place_of_what_is_suggested(few, up_to_loading):
    usual = up_to_loading("--data", few)
    assert "1 of the 12 chats is held out for validation; 11 are trained on." in usual
    assert re.search(r"max_length +24  the longest chat has \d+ tokens; rounded up to a multiple of 8\n", usual)
    assert "this course, this course" not in usual and "As you named them" not in usual
    assert usual.endswith("To change a setting, name it, as in --seed 1.\n")
    said = up_to_loading("--data", few, "--epochs", 2, "--rank", 4, "--validation", "none")
    assert "As you named them: epochs=2, rank=4\nWhat goes with them: steps=6, warmup_steps=1\n" in said
    lines = [line.split()[0] for line in said.splitlines() if line and not line.startswith(" ")]
    assert "learning_rate" in lines and not {"epochs", "steps", "rank"} & set(lines)


def test_another_batch_is_trained_for_as_many_epochs(few, up_to_loading):
    usual = up_to_loading("--data", few, "--validation", "none")
    epochs, batch = (
        next(float(line.split()[1]) for line in usual.splitlines() if line.startswith(name))
        for name in ("epochs", "batch_size")
    )
    assert batch == 4
    said = up_to_loading("--data", few, "--batch-size", 2, "--validation", "none")
    steps = math.ceil(epochs * 12 / 4)
    assert f"What goes with them: accumulation=2, steps={steps}, warmup_steps=3\n" in said and "\nepochs " in said


def test_all_weights_are_trained_at_a_tenth_of_the_rate(few, up_to_loading):
    said = up_to_loading("--data", few, "--method", "full", "--validation", "none")
    assert "What goes with them: learning_rate=0.00015\n" in said and "rank" not in said.replace("ranking", "")
    said = up_to_loading("--data", few, "--method", "full", "--validation", "none", "--learning-rate", "3e-5")
    assert "As you named them: method=full, learning_rate=3e-05\n" in said


def test_a_long_warm_up_is_measured_by_the_steps_of_this_run(few, up_to_loading):
    assert "warmup_steps=400" in up_to_loading(
        "--data", few, "--warmup-steps", 400, "--epochs", 150, "--validation", "none"
    )
    assert main(["run", "--data", str(few), "--warmup-steps", "400", "--epochs", "1", "--output", "out"]) == 2


def test_what_no_gpu_is_predicted_to_hold_can_be_tried_all_the_same(few, up_to_loading, capsys, monkeypatch):
    from qlora_helpers.memory import find_gpu

    tiny = replace(find_gpu("t4"), usable_bytes=2**20)
    monkeypatch.setattr(run_settings, "gpu_of", lambda hardware: tiny)
    assert main(["run", "--data", str(few), "--output", "out"]) == 2
    assert capsys.readouterr().err.endswith("To train all the same: --ignore-memory\n")
    said = up_to_loading("--data", few, "--ignore-memory")
    assert "11 rows, on a Tesla T4\n" in said and "Not even one row at a time is predicted to fit." in said
    assert "It is tried all the same." in said


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({}, (54 * 10 / 4 + 5, 4, 1)),
        ({"batch_size": 2}, (140, 2, 2)),  # the effective batch stays, and so does what a run sees
        ({"accumulation": 4}, (140, 1, 4)),
        ({"batch_size": 54}, (10, 54, 1)),  # ten epochs are ten steps
        ({"batch_size": 2, "accumulation": 3, "epochs": 2}, (18, 2, 3)),
        ({"steps": 40}, (40, 4, 1)),
    ],
)
def test_what_is_named_changes_what_goes_with_it(named, said):
    request = Request(data="people.csv", settings=named)
    data = SimpleNamespace(training=[None] * 54, longest=23, answer_tokens=397)
    found = run_settings.settings_of(request, {}, data, run_settings.shape_of("tiny-llama"), CPU)
    assert (found.steps, found.batch_size, found.accumulation) == said
    assert found.warmup_steps == warmup_steps(found.steps) == max(1, round(found.steps / 10))


def test_a_run_that_will_not_fit_is_refused_with_what_helps(few, tmp_path, capsys, monkeypatch):
    from qlora_helpers.memory import find_gpu

    small = find_gpu("t4")
    monkeypatch.setattr(run_settings, "gpu_of", lambda hardware: small)
    model = tmp_path / "model"
    shutil.copytree(data_path("tiny-llama"), model)
    monkeypatch.setattr("qlora_helpers.models.loading.load_model", None)
    shape = {"batch_size": "100000", "rank": "16"}
    options = [word for name, value in shape.items() for word in ("--" + name.replace("_", "-"), value)]
    arguments = ["run", "--data", str(few), "--model", str(model), "--output", str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert (
        "so it will not fit. To train all the same: --ignore-memory" in err and "What helps, the cheapest first:" in err
    )
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        main([*arguments, "--ignore-memory"])
    assert "It is tried all the same." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("request_", "record", "found"),
    [
        (Request(), {}, (64, 0)),  # the course's own run
        (Request(data="x.csv"), {}, (256, 0)),  # what the model takes
        (Request(data="x.csv", settings={"max_length": 32, "seed": 3}), {}, (32, 3)),
        (Request(data="x.csv", settings={"seed": 3}), {"max_length": 40, "seed": 5}, (40, 5)),  # as it was begun
    ],
)
def test_how_long_a_chat_may_be_and_which_are_held_out_is_known_before_they_are_read(request_, record, found):
    shape = run_settings.shape_of("tiny-llama")
    assert run_settings.length_and_seed(request_, record, shape) == found
    assert run_settings.length_and_seed(Request(data="x.csv"), {}, None) == (None, 0)
    assert shape.max_position_embeddings == 256


def test_a_run_begun_before_keeps_the_settings_of_its_record():
    data = SimpleNamespace(training=[None] * 54)
    record = {"steps": 7, "rank": 4, "batch_size": 2, "validation": "not one that is varied"}
    found = run_settings.settings_of(Request(data="people.csv", settings={"rank": 4}), record, data, None, CPU)
    assert (found.steps, found.rank, found.batch_size, found.validation) == (7, 4, 2, None)
    assert found.save_steps == run_settings.SAVE_STEPS


def test_without_the_model_s_shape_the_usual_settings_of_a_gpu_are_taken(capsys):
    data = SimpleNamespace(training=[None] * 54, longest=23, answer_tokens=397)
    found = run_settings.settings_of(Request(data="people.csv", settings={"rank": 4}), {}, data, None, CPU)
    assert (found.steps, found.max_length, found.learning_rate, found.rank) == (162, 24, 2e-4, 4)
    assert "none can be suggested without the model's shape" in capsys.readouterr().out


def test_no_memory_is_predicted_without_a_gpu_or_a_known_shape(monkeypatch):
    from qlora_helpers.memory import find_gpu

    shape, settings = run_settings.shape_of("tiny-llama"), Settings()
    assert run_settings.predicted_memory(shape, settings, CPU) is None
    monkeypatch.setattr(run_settings, "gpu_of", lambda hardware: find_gpu("t4"))
    assert run_settings.predicted_memory(None, settings, CPU) is None
    assert run_settings.predicted_memory(shape, settings, CPU).fits


def test_a_merge_aware_run_on_a_gpu_goes_on_without_a_prediction(monkeypatch, capsys):
    from qlora_helpers.memory import find_gpu

    monkeypatch.setattr(run_settings, "gpu_of", lambda hardware: find_gpu("t4"))
    shape = run_settings.shape_of("tiny-llama")
    assert run_settings.predicted_memory(shape, Settings(merge_aware=0.3), CPU) is None
    assert capsys.readouterr().out.startswith("note: the memory of the run is not predicted: its merge-aware steps")


def test_a_model_of_an_unknown_family_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "no such family"}', encoding="utf-8")
    assert run_settings.shape_of(str(tmp_path)) is None
    assert "note: the memory of the run is not predicted: " in capsys.readouterr().out
