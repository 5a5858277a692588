"""`run` on any model and any file of chats: what it reads, suggests, refuses, keeps and reports."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from qlora_helpers import evaluation
from qlora_helpers.__main__ import main
from qlora_helpers.commands import run as run_command
from qlora_helpers.commands.run_report import reset_peak_memory, what_to_change
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.statistics import Interval
from qlora_helpers.suggestions import warmup_steps
from qlora_helpers.training.interrupts import Interrupted
from tests.support.short_runs import CPU

PEOPLE = data_path("examples", "people.csv")


def rows_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@pytest.fixture
def few(tmp_path):
    """A table of 12 rows."""
    path = tmp_path / "few.csv"
    path.write_text("".join(rows_of(PEOPLE.read_text(encoding="utf-8"))[:13]), encoding="utf-8")
    return path


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_a_table_becomes_a_tuned_model_with_a_report_and_a_card(few, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["run", "--data", str(few), "--output", str(folder), "--epochs", "2", "--validation", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "few.csv: 12 rows of question-answer (CSV, commas)" in said
    assert "3 of the 12 chats are held out for validation; 9 are trained on." in said
    assert "Settings to start from, for tiny-llama (3 million parameters), 9 rows, without a GPU" in said
    assert "learning_rate" in said and "[this course]" in said and "validation_rows" not in said
    assert (
        "the longest chat, rounded up to a multiple of 8" in said
        and "By what the command line names: epochs 2, " in said
    )
    assert "What else it knows: Of 500 facts" in said and f"-m qlora_helpers chat {folder}" in said

    report = report_of(folder)
    of_the_data = [report[name] for name in ("data_file", "data_form", "data_rows", "validation_rows")]
    assert of_the_data == ["few.csv", "question-answer", 9, 3]
    per_epoch = -(-9 // report["settings"]["batch_size"])
    assert report["settings"]["steps"] == 2 * per_epoch and report["settings"]["epochs"] is None
    assert report["settings"]["warmup_steps"] == warmup_steps(2 * per_epoch) < per_epoch
    changes = {change["name"]: change for change in report["first_changes"]}
    assert set(changes) <= {"overfits", "hardly learns", "forgets", "never ends"}
    assert all(
        f"What to change first where {change['symptom']}" in " ".join(said.split()) for change in changes.values()
    )
    assert report["scores"]["after"]["rows"] == report["test_rows"] == 3
    assert report["validation_history"][0][0] == 0 and report["best_step"] in dict(report["validation_history"])
    assert report["predicted_memory_bytes"] is None and report["peak_memory_bytes"] > 2**28

    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "tiny-llama, tuned on few" in card and "What it has forgotten" in card and str(tmp_path) not in card


def test_a_run_is_continued_by_its_folder_alone(few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_command, "SAVE_STEPS", 1)
    from qlora_helpers.training import run as training

    real = training._train_to_the_end

    def stopped(trainer, *rest):
        monkeypatch.setattr(training, "_train_to_the_end", real)
        trainer.args.max_steps = trainer.args.max_steps - 1
        trainer.train()
        raise Interrupted("in step 2 of 2; the last checkpoint is that of step 1", tmp_path / "out")

    monkeypatch.setattr(training, "_train_to_the_end", stopped)
    asked = ["--data", "few.csv", "--steps", "2", "--validation", "0.25", "--output", "out"]
    assert main(["run", *asked]) == 130
    how = capsys.readouterr().err
    assert "run --resume --output out" in how and "few.csv" not in how

    for more, named in (
        (["--steps", "3"], "--steps=3: the run in --output='out' was begun with 2"),
        (["--model", "other/model"], "--model=other/model: the run in --output='out' was begun with tiny-llama"),
        (["--on-bad", "drop"], "--on-bad=drop: the run in --output='out' was begun with stop"),
    ):
        assert main(["run", "--resume", "--output", "out", *more]) == 2
        assert named in capsys.readouterr().err

    kept = few.read_text(encoding="utf-8")
    few.write_text(kept.replace("lawyer", "dentist"), encoding="utf-8")
    assert main(["run", "--resume", "--output", "out"]) == 2
    assert "was begun differently: chats" in capsys.readouterr().err

    few.write_text(kept, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(few, tmp_path / "elsewhere" / "few.csv")
    assert main(["run", "--resume", "--output", "out"]) == 2
    assert "few.csv" in capsys.readouterr().err
    assert main(["run", "--resume", "--output", "out", "--data", "elsewhere/few.csv"]) == 0
    assert report_of(tmp_path / "out")["settings"]["steps"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "Qwen/Qwen2.5-1.5B-Instruct"], "--model='Qwen/Qwen2.5-1.5B-Instruct' needs chats to learn from"),
        (["--data", "none.csv"], "--data='none.csv' is not there: name a file of chats"),
        (["--data", "{few}", "--validation", "none.csv"], "--validation='none.csv' is not there"),
        (["--data", "one.csv"], "--data: a single chat cannot be held out and trained on"),
        (["--data", "{few}", "--validation", "1.5"], "validation=1.5: must be a share of the chats"),
        (["--data", "{few}", "--epochs", "0"], "epochs=0: must be"),
        (["--data", "{few}", "--epochs", "1", "--steps", "2"], "steps=2 and epochs=1: a run has one length"),
        (["--data", "{few}", "--max-length", "8"], "over max_length=8"),
        (["--data", "{few}", "--format", "alpaca"], "alpaca"),
        (["--data", "{few}", "--validation", "none", "--patience", "2"], "patience=2: there is nothing to validate on"),
        (["--data", "{few}", "--model", "no_such_folder"], "no_such_folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_asked(options, said, few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "score", None)  # asking would fail
    (tmp_path / "one.csv").write_text("question,answer\nWho?,Ann.\n", encoding="utf-8")
    assert main(["run", "--output", "out", *[option.format(few=few) for option in options]]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err
    assert not (tmp_path / "out").exists()


def test_words_that_the_tokenizer_spells_out_are_said_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qlora_helpers.models.loading.load_model", None)  # it ends where the model would be loaded
    path = tmp_path / "faq.csv"
    rows = [f"Could you please explain topic number {n}?,Certainly; it concerns quarterly budgets." for n in range(9)]
    path.write_text("question,answer\n" + "\n".join(rows), encoding="utf-8")
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        main(["run", "--data", str(path), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "warning: " in said and "the shipped model is for data in its own words" in said


def test_a_run_that_will_not_fit_is_refused_with_what_helps(few, tmp_path, capsys, monkeypatch):
    from qlora_helpers.memory import find_gpu

    small = find_gpu("t4")
    monkeypatch.setattr(run_command, "_gpu", lambda hardware: small)
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
    request = run_command.Request(data="people.csv", settings=named)
    data = SimpleNamespace(training=[None] * 54, longest=23, answer_tokens=397)
    plan = run_command._Plan(request, PEOPLE.parent, run_command._Begin.NEW)
    found = run_command._settings(plan, data, run_command._shape_of("tiny-llama"), CPU)
    assert (found.steps, found.batch_size, found.accumulation) == said
    assert found.warmup_steps == warmup_steps(found.steps) == max(1, round(found.steps / 10))


def report_and_scores(validation, training, cut_off=0, change=(-1.0, 0.1)):
    report = {"validation_history": list(enumerate(validation)), "loss_history": list(enumerate(training, start=1))}
    after = SimpleNamespace(cut_off=cut_off, rows=[None] * 4)
    return report, SimpleNamespace(after=after, loss_change=Interval(*change, 4))


@pytest.mark.parametrize(
    ("measured", "verdict", "names"),
    [
        (report_and_scores([3.0, 2.0], [3.0, 1.0]), "kept", []),
        (report_and_scores([], [3.0, 1.0]), "less sure", []),
        (report_and_scores([3.0, 3.1], [3.0, 1.0]), "kept", ["overfits"]),
        (report_and_scores([3.0, 3.0], [3.0, 2.9]), "kept", ["hardly learns"]),
        (report_and_scores([3.0, 2.9], [3.0, 2.9], change=(-0.1, 0.2)), "kept", ["hardly learns"]),
        (report_and_scores([3.0, 2.0], [3.0, 1.0], cut_off=3), "forgotten", ["never ends", "forgets"]),
        (report_and_scores([3.0, 2.0], [3.0, 1.0], cut_off=2), "broken", ["diverges"]),
    ],
)
def test_a_bad_figure_names_what_to_change_first(measured, verdict, names):
    assert [change.name for change in what_to_change(*measured, SimpleNamespace(verdict=verdict))] == names


def test_the_peak_of_the_training_is_not_that_of_the_questions_before(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    reset_peak_memory()
    assert called == ["empty", "reset"]


def test_a_run_of_which_later_checkpoints_are_gone_was_not_stopped_early(few, tmp_path, monkeypatch):
    """Its report is made anew from what is there."""
    folder = tmp_path / "out"
    monkeypatch.setattr(run_command, "SAVE_STEPS", 1)
    assert main(["run", "--data", str(few), "--output", str(folder), "--steps", "2", "--validation", "0.25"]) == 0
    shutil.rmtree(folder / "checkpoint-2")
    facts = run_command._trained_before(
        load_model(hardware=CPU), folder, Settings(steps=2, batch_size=4, save_steps=1, validation=0.25)
    )[1]
    assert not facts["stopped_early"] and facts["loss_history"] == []
