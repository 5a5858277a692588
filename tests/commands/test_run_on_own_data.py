"""`run` on any model and any file of chats: what it reads, suggests, refuses, keeps and reports."""

import json
import shutil
from dataclasses import asdict

import pytest

from qlora_helpers import evaluation
from qlora_helpers.__main__ import main
from qlora_helpers.commands import run as run_command
from qlora_helpers.commands import run_data, run_settings
from qlora_helpers.commands.run_request import Request
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.suggestions import warmup_steps
from qlora_helpers.training.interrupts import Interrupted
from tests.support.short_runs import CPU


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_a_table_becomes_a_tuned_model_with_a_report_and_a_card(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_data, "warning_of_spelling", lambda *args: "the words are spelled out")
    folder = tmp_path / "out"
    assert main(["run", "--data", str(few), "--output", str(folder), "--epochs", "2", "--validation", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "few.csv: 12 rows of question-answer (CSV, commas)" in said
    assert "3 of the 12 chats are held out for validation; 9 are trained on." in said
    assert "Settings to start from, for tiny-llama (3 million parameters), 9 rows, without a GPU" in said
    assert "learning_rate" in said and "[this course]" in said and "validation_rows" not in said
    assert "rounded up to a multiple of 8" in said and "As you named them: epochs=2\n" in said
    before, after = said.split("Training for")
    assert "Warning: the words are spelled out.\n" in before
    assert "As said before training: the words are spelled out.\n" in after
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
    assert "- the words are spelled out.\n" in card and "| peak memory, predicted | not predicted |" in card

    # killed before the report: it is made again from the same chats, and from no others
    (folder / "report.json").unlink()
    kept = few.read_text(encoding="utf-8")
    few.write_text(kept.replace("lawyer", "dentist"), encoding="utf-8")
    assert main(["run", "--resume", "--output", str(folder)]) == 2
    assert "was begun differently: chats was" in capsys.readouterr().err and not (folder / "report.json").exists()
    few.write_text(kept, encoding="utf-8")
    (folder / "adapter" / "README.md").unlink()
    assert main(["run", "--resume", "--output", str(folder)]) == 0
    again = report_of(folder)
    for name in ("validation_history", "loss_history", "best_step", "forgetting", "data_answer_tokens", "adapter_path"):
        assert again[name] == report[name]
    assert again["scores"]["after"]["loss"] == report["scores"]["after"]["loss"]
    assert "tiny-llama, tuned on few" in (folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_run_is_continued_by_its_folder_alone(few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_settings, "SAVE_STEPS", 1)
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
        (["--data", "one.csv"], "--data has one chat that can be used, so none can be held out for validation"),
        (["--data", "{few}", "--validation", "1.5"], "error: --validation=1.5: must be a share of the chats"),
        (["--data", "{few}", "--epochs", "0"], "error: --epochs=0: must be"),
        (["--data", "{few}", "--epochs", "1", "--steps", "2"], "error: --steps=2 and --epochs=1: a run has one length"),
        (
            ["--data", "{few}", "--max-length", "8"],
            "over --max-length=8: the answer would be cut. Raise --max-length or shorten",
        ),
        (["--data", "{few}", "--form", "alpaca"], "alpaca"),
        (
            ["--data", "{few}", "--validation", "none", "--patience", "2"],
            "error: --patience=2: there is nothing to validate on",
        ),
        (["--data", "{few}", "--model", "no_such_folder"], "no_such_folder"),
        (["--data", "{few}", "--model", ""], "--model='': name a model, or leave it out for the shipped one"),
        (["--data", ""], "--data='' is not there: name a file of chats"),
        (
            ["--data", "{few}", "--model", str(data_path("adapters", "sentences"))],
            "holds an adapter, and a run starts from a model: name the adapter's base, tiny-llama",
        ),
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
    assert "Warning: " in said and "the shipped model knows only the words of its" in said and "(--model)" in said


# ---- Up to where the model would be loaded


def test_the_validation_file_may_be_of_another_form(few, tmp_path, up_to_loading):
    other = tmp_path / "held.jsonl"
    row = {"instruction": "Which pet?", "input": "Carmen Kirkford", "output": "turtle."}
    other.write_text(json.dumps(row), encoding="utf-8")
    said = up_to_loading("--data", few, "--form", "question-answer", "--validation", other)
    assert "held.jsonl: 1 row of alpaca (JSONL)" in said


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (1, [], "--data has one chat that can be used, so none can be held out for validation. Name a file with"),
        (
            3,
            ["--on-bad", "stop"],
            'few.csv, row 4: "answer" is empty\nRows are counted without the header. To leave such rows out: --on-bad drop',
        ),
        (3, ["--on-bad", "drop", "--max-length", "16"], "--too-long drop, --too-long cut-question"),
    ],
)
def test_what_is_wrong_with_the_rows_is_said_with_the_option_that_helps(rows, options, said, few, tmp_path, capsys):
    lines = few.read_text(encoding="utf-8").splitlines(keepends=True)[: rows + 1] + ["Why?,\n"] * (rows > 1)
    few.write_text("".join(lines), encoding="utf-8")
    assert main(["run", "--data", str(few), "--output", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_chats_that_are_too_long_are_named_by_their_rows(few, tmp_path, capsys, up_to_loading):
    lines = few.read_text(encoding="utf-8").splitlines(keepends=True)
    long = f'"{"Who? " * 30}",Carmen Kirkford.\n'
    few.write_text("".join([lines[0], "Why?,\n", *lines[1:4], long]), encoding="utf-8")
    options = ["--data", str(few), "--on-bad", "drop", "--max-length", "64", "--validation", "none"]
    assert main(["run", "--output", "out", *options]) == 2
    assert f"{few}, row 5: " in capsys.readouterr().err
    assert "1 left out (the first is row 5: " in up_to_loading(*options, "--too-long", "drop")
    few.write_text(f"{lines[0]}{'Who? ' * 600},Carmen Kirkford.\n", encoding="utf-8")
    assert main(["run", "--output", "out", "--data", str(few), "--validation", "none"]) == 2
    assert "Without --max-length, max_length is what the model takes. To leave" in capsys.readouterr().err


def test_a_chat_whose_answers_cannot_be_marked_is_a_bad_row(few, tmp_path, capsys, up_to_loading):
    """Its template changes earlier messages, so a chat of two questions cannot be learnt from."""
    model = tmp_path / "model"
    shutil.copytree(data_path("tiny-llama"), model)
    template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% else %}<|{{ m.role }}|>...{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = tmp_path / "chats.jsonl"
    one = [{"role": "user", "content": "Which pet?"}, {"role": "assistant", "content": "turtle."}]
    path.write_text("".join(json.dumps({"messages": one * n}) + "\n" for n in (1, 2, 1)), encoding="utf-8")
    options = ["--data", str(path), "--model", str(model), "--validation", "none"]
    assert main(["run", "--output", "out", *options]) == 2
    err = capsys.readouterr().err
    assert "chats.jsonl, line 2: the chat template changes earlier messages" in err and "--on-bad drop" in err
    assert "1 row of chats.jsonl cannot be used, and is left out:" in up_to_loading(*options, "--on-bad", "drop")


def test_a_model_without_a_chat_template_is_refused_by_name(few, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(data_path("tiny-llama"), model)
    (model / "chat_template.jinja").unlink()
    assert main(["run", "--data", str(few), "--model", str(model), "--output", str(tmp_path / "out")]) == 2
    assert f"error: --model={str(model)!r}: it has no chat template. Name one" in capsys.readouterr().err


def test_rules_for_reading_need_a_file(tmp_path, capsys):
    for option, value in (("--on-bad", "drop"), ("--too-long", "drop"), ("--form", "alpaca")):
        assert main(["run", "--output", str(tmp_path / "out"), option, value]) == 2
        assert f"error: {option}={value}: there is no file to read" in capsys.readouterr().err


# ---- Interrupts, and what --resume takes


def stop(*args, **options):
    raise KeyboardInterrupt


def begun(folder, **request):
    """A folder with the record of a run."""
    folder.mkdir()
    record = {"steps": 6, "chats": "0", "model": "tiny-llama", "compute_dtype": "x", "rank": 8}
    record |= {"request": asdict(Request(**request))} if request else {}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return record


def test_an_interrupt_before_an_earlier_run_is_moved_aside_says_nothing_about_that_run(
    few, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    begun(tmp_path / "out", data=str(few))
    (tmp_path / "out" / "adapter").mkdir()
    (tmp_path / "out" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "out" / "report.json").write_text("{}")
    monkeypatch.setattr("qlora_helpers.models.loading.load_tokenizer", stop)
    assert main(["run", "--data", "few.csv", "--output", "out"]) == 130
    said, how = capsys.readouterr().err.strip().splitlines()
    assert said == "Stopped before the first step of training. To continue:"
    assert how.endswith("run --data few.csv --output out")


def test_the_command_that_continues_keeps_what_a_resumed_run_needs(few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = begun(tmp_path / "out", data="/nowhere/few.csv")
    monkeypatch.setattr(run_command, "_load_and_run", stop)
    typed = ["run", "--resume", "--output", "out", "--data", "few.csv"]
    assert main(typed) == 130
    assert capsys.readouterr().err.strip().endswith(" ".join(typed))

    def begins(plan, launch):
        (tmp_path / "new" / "run.json").write_text(json.dumps(record), encoding="utf-8")
        stop()

    monkeypatch.setattr(run_command, "_load_and_run", begins)
    assert main(["run", "--output", "new", "--data", "few.csv", "--ignore-memory"]) == 130
    assert capsys.readouterr().err.strip().endswith("run --resume --output new --ignore-memory")


@pytest.fixture
def resumed(tmp_path, monkeypatch, few):
    """What a resumed run is asked for."""
    monkeypatch.chdir(tmp_path)
    plans = []
    monkeypatch.setattr(run_command, "_load_and_run", lambda plan, launch: plans.append(plan) or 0)

    def run(*options):
        assert main(["run", "--resume", "--output", "out", *options]) == 0
        return plans[-1].request

    return run


def test_a_run_of_an_older_version_is_resumed_with_what_is_named(few, tmp_path, resumed, capsys):
    begun(tmp_path / "out")
    assert resumed() == Request()
    assert resumed("--rank", "8", "--steps", "6") == Request()
    found = resumed("--data", "few.csv", "--model", "some/model", "--validation", "none")
    assert found == Request("some/model", str(few), None)
    assert main(["run", "--resume", "--output", "out", "--rank", "4"]) == 2
    assert "--rank=4: the run in --output='out' was begun with 8" in capsys.readouterr().err


def test_a_model_s_folder_may_lie_elsewhere_now(few, tmp_path, resumed, capsys):
    begun(tmp_path / "out", model=str(tmp_path / "gone" / "model"), data=str(few))
    (tmp_path / "model").mkdir()
    assert resumed("--model", "model").model == str(tmp_path / "model")
    (tmp_path / "gone" / "model").mkdir(parents=True)  # it may be a copy: its weights decide when it is loaded
    assert resumed("--model", "model").model == str(tmp_path / "model")
    for options, said in (
        (["--model", "other/model"], "--model=other/model: the run in"),
        (["--form", "alpaca"], "--form=alpaca: the run in --output='out' was begun without it. Leave out --form"),
    ):
        assert main(["run", "--resume", "--output", "out", *options]) == 2
        assert said in capsys.readouterr().err
    few.rename(tmp_path / "moved.csv")
    assert main(["run", "--resume", "--output", "out"]) == 2
    assert f"--data={str(few)!r} is not there: name a file of chats" in capsys.readouterr().err
    assert resumed("--data", "moved.csv").data == str(tmp_path / "moved.csv")


def test_a_run_of_which_later_checkpoints_are_gone_was_not_stopped_early(few, tmp_path, monkeypatch):
    """Its report is made anew from what is there."""
    folder = tmp_path / "out"
    monkeypatch.setattr(run_settings, "SAVE_STEPS", 1)
    assert main(["run", "--data", str(few), "--output", str(folder), "--steps", "2", "--validation", "0.25"]) == 0
    shutil.rmtree(folder / "checkpoint-2")
    facts = run_command._trained_before(
        load_model(hardware=CPU), folder, Settings(steps=2, batch_size=4, save_steps=1, validation=0.25)
    )[1]
    assert not facts["stopped_early"] and facts["loss_history"] == []


def test_a_card_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    from qlora_helpers.json_files import write_whole

    path = tmp_path / "README.md"
    write_whole(path, "é first\n")
    monkeypatch.setattr("os.replace", stop)  # a kill before the new text has the name
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "second")
    assert path.read_text(encoding="utf-8") == "é first\n" and [file.name for file in tmp_path.iterdir()] == [
        "README.md"
    ]
