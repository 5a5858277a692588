"""Where runs are stored and may be: a folder without a run is never changed, refusals name the argument and cure."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.commands.run import _make_room
from qlora_helpers.folder_locks import FolderInUse
from qlora_helpers.paths import data_path
from qlora_helpers.training import run_folder
from qlora_helpers.training.run_folder import (
    RECORD,
    check_output,
    gone_if_refused,
    is_finished,
    move_aside,
    new_run_folder,
    read_record,
    steps_saved,
    unfinished_run_folder,
)
from tests.support.holding import held_by_another

OURS = {"steps": 6, "chats": "0", "model": "tiny-llama", "compute_dtype": "torch.float32"}


def run_in(folder, record=OURS, steps=(), finished=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record))
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if finished:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").touch()
        (folder / "report.json").write_text("{}")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delattr("qlora_helpers.commands.run._load_and_run")  # refusals come before anything heavy
    return tmp_path / "here"


def refused(capsys, *arguments):
    assert main(["run", *arguments]) == 2
    return capsys.readouterr().err


def everything_below(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("file", "--output='file' is a file: name a new or an empty folder"),
        ("file/below", "--output='file/below' cannot be written to (Not a directory): name a folder of your own"),
        ("mine", "--output='mine' holds 'essay.txt' but no run of this course: name a new or an empty folder"),
        ("link", "--output='link' holds 'essay.txt' but no run of this course"),
        ("dangling", "--output='dangling' is a link to nowhere, which does not exist"),
        ("foreign", "--output='foreign' holds 'run.json' but no run of this course"),
        ("..", "--output='..' holds 'here' but no run of this course"),
        (".", "--output='.' holds "),
        ("/", "--output='/' holds "),
    ],
)
def test_what_holds_no_run_is_not_touched(output, said, resume, here, capsys):
    (here / "file").write_text("mine")
    (here / "mine").mkdir()
    (here / "mine" / "essay.txt").write_text("mine")
    (here / "link").symlink_to(here / "mine")
    (here / "dangling").symlink_to("nowhere")
    run_in(here / "foreign", {"name": "of another program"})
    before = everything_below(here)
    assert said in refused(capsys, "--output", output, *resume)
    assert everything_below(here) == before


@pytest.mark.parametrize("output", [".", "..", "run/.."])
def test_a_run_in_the_working_folder_or_above_is_not_renamed(output, tmp_path, monkeypatch, capsys):
    run_in(tmp_path)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run" if output == ".." else tmp_path)
    before = everything_below(tmp_path)
    assert f"--output={output!r} is the folder you are in, or one above it" in refused(capsys, "--output", output)
    assert everything_below(tmp_path) == before


def test_a_link_to_a_run_is_not_renamed(here, capsys):
    run_in(here / "a run")
    (here / "link").symlink_to(here / "a run")
    said = refused(capsys, "--output", "link")
    assert f"--output='link' is a link to {here / 'a run'}, which holds a run" in said and "--resume" in said
    assert (here / "link").is_symlink() and OURS.items() <= read_record(here / "a run").items()


def test_a_run_of_ours_is_moved_aside_and_never_onto_another(tmp_path):
    kept = []
    for _ in range(3):
        run_in(tmp_path / "latest")
        kept.append(move_aside(tmp_path / "latest"))
    assert len(set(kept)) == 3 and all(OURS.items() <= read_record(path).items() for path in kept)
    assert not (tmp_path / "latest").exists()


def test_nothing_else_is_moved_aside(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="holds no run of this course, so it is not renamed"):
        move_aside(tmp_path / "mine")


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def read_only(folder):
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(run_folder, "probe_writing", read_only)
    with pytest.raises(
        OSError, match=r"--output='.*new' cannot be written to \(Read-only file system\): name a folder"
    ):
        check_output(tmp_path / "new")


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(
        OSError, match=r"--output='.*' cannot be read \(Permission denied\): name a new or an empty folder"
    ):
        check_output(tmp_path)


def test_a_full_disk_is_said_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10**6))
    with pytest.raises(OSError, match=r"--output='.*new': its disk has 1 MB left, and a run needs 50 MB\. Free some"):
        check_output(tmp_path / "new")


def test_folders_that_were_made_for_a_run_go_again_if_it_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="no"), gone_if_refused(tmp_path / "there" / "a" / "b"):
        (tmp_path / "there" / "a" / "b").mkdir(parents=True)
        raise ValueError("no")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(ValueError, match="no"), gone_if_refused(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run").mkdir(parents=True)
        (tmp_path / "new" / "file").touch()
        raise ValueError("no")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_folder_that_another_process_holds_is_not_removed(tmp_path):
    with pytest.raises(FolderInUse, match="theirs"), gone_if_refused(tmp_path / "new"):
        (tmp_path / "new").mkdir()
        raise FolderInUse("theirs")
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("left", [".lock", "run.json.part", ".run.json.0123abcd.qlora-new"])
def test_a_folder_with_what_a_kill_has_left_counts_as_empty(left, tmp_path):
    (tmp_path / left).touch()
    assert check_output(tmp_path) is None
    (tmp_path / f"my{left}").touch()
    with pytest.raises(FileExistsError, match="but no run of this course"):
        check_output(tmp_path)


# ---- Resuming


def test_a_finished_run_is_not_resumed(here, capsys):
    run_in(here / "latest", steps=[6], finished=True)
    assert is_finished(here / "latest")
    said = refused(capsys, "--output", "latest", "--resume")
    assert "--resume: the run in --output='latest' is finished. Leave out --resume" in said


def test_a_record_of_an_older_version_is_read_in_today_s_words(tmp_path):
    run_in(tmp_path / "four", OURS | {"method": "lora", "quantization": "nf4, double_quant=True"})
    run_in(tmp_path / "sixteen", OURS | {"method": "lora", "quantization": "none"})
    assert read_record(tmp_path / "four")["method"] == "qlora"
    assert read_record(tmp_path / "sixteen")["method"] == "lora"
    assert read_record(tmp_path / "four")["schedule"] == "linear"


@pytest.mark.parametrize("option", ["--rank", "--learning-rate"])
def test_other_settings_are_refused_too(option, here, capsys):
    run_in(here / "latest", OURS | {"rank": 16, "learning_rate": 1e-3}, steps=[2])
    said = refused(capsys, "--output", "latest", "--resume", option, "8")
    assert f"{option}=8: the run in --output='latest' was begun with" in said


def test_other_steps_are_refused_before_anything_is_loaded(here, capsys):
    run_in(here / "latest", steps=[2])
    said = refused(capsys, "--output", "latest", "--resume", "--steps", "8")
    assert "--steps=8: the run in --output='latest' was begun with 6. Leave out --steps" in said


@pytest.mark.parametrize(
    ("begun", "arguments", "steps", "said"),
    [
        (None, [], 300, ""),
        (None, ["--steps", "8"], 8, ""),
        (None, ["--resume"], 300, "There is nothing to resume in latest: this is a new run."),
        ((), ["--resume"], 6, "The run in latest was stopped before its first checkpoint: it starts again at step 1."),
        ((2, 4), ["--resume"], 6, "Continuing the run in latest after step 4 of 6."),
        ((2, 4), ["--resume", "--steps", "6"], 6, "Continuing the run in latest after step 4 of 6."),
        ((2, 4), [], 300, ""),
    ],
)
def test_it_is_said_where_a_run_begins_and_its_steps_come_from_its_record(
    begun, arguments, steps, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if begun is not None:
        run_in(tmp_path / "latest", steps=begun)
    begins = []
    monkeypatch.setattr(
        "qlora_helpers.commands.run._load_and_run",
        lambda plan, launch: begins.append((plan.record.get("steps"), plan.begin.name)) or 0,
    )
    assert main(["run", "--output", "latest", *arguments]) == 0
    how = "NEW" if begun is None else "RESUME" if arguments else "ASIDE"
    # a new run counts its steps when its chats are read
    assert begins == [(steps if how == "RESUME" else None, how)] and said in capsys.readouterr().out


def test_the_run_that_was_there_is_moved_aside_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_in(tmp_path / "latest", steps=[2])
    _make_room(Path("latest"))
    assert "The run that was in latest is now in latest-until-" in capsys.readouterr().out
    assert list((tmp_path / "latest").iterdir()) == []


@pytest.mark.parametrize("report", [None, "", '{"gear": "cp'], ids=["missing", "empty", "cut off"])
def test_a_run_that_lacks_only_its_report_gets_it(report, here, capsys, monkeypatch):
    run_in(here / "latest", steps=[6], finished=True)
    (here / "latest" / "report.json").unlink()
    if report is not None:
        (here / "latest" / "report.json").write_text(report)
    begins = []
    monkeypatch.setattr(
        "qlora_helpers.commands.run._load_and_run",
        lambda plan, launch: begins.append(plan.begin.name) or 0,
        raising=False,
    )
    assert main(["run", "--output", "latest", "--resume"]) == 0
    assert begins == ["REPORT"]
    assert "The run in latest is trained, but was stopped before its report: only that is made now." in (
        capsys.readouterr().out
    )


def test_a_run_that_another_process_is_training_is_neither_moved_nor_resumed(here, capsys):
    run_in(here / "latest", steps=[2])
    before = everything_below(here / "latest")
    with held_by_another(here / "latest") as process:
        for how in ([], ["--resume"]):
            said = refused(capsys, "--output", "latest", *how)
            assert f"--output='latest' is being written by process {process.pid} on " in said
    assert everything_below(here / "latest") == before


def test_a_checkpoint_that_was_cut_off_is_not_counted(tmp_path):
    run_in(tmp_path, steps=[2, 4])
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    assert steps_saved(tmp_path) == 2


# New folders for runs


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_each_new_folder_has_the_next_number(runs):
    assert [new_run_folder("a"), new_run_folder("a"), new_run_folder("b")] == [runs / "a-1", runs / "a-2", runs / "b-1"]


def test_an_unfinished_run_is_found_again_and_a_finished_one_is_not(runs):
    first = unfinished_run_folder("a")
    assert first == runs / "a-1"
    assert unfinished_run_folder("a") == runs / "a-2"  # nothing was begun in the first
    (first / "run.json").touch()
    assert unfinished_run_folder("a") == first
    (first / "adapter").mkdir()
    assert unfinished_run_folder("a") == first  # empty: what was in it was lost
    (first / "adapter" / "adapter_config.json").touch()
    assert unfinished_run_folder("a") == runs / "a-3"


def test_of_several_unfinished_runs_the_newest_is_taken_by_number(runs):
    for number in (2, 10, 9):
        (runs / f"a-{number}").mkdir(parents=True)
        (runs / f"a-{number}" / "run.json").touch()
    (runs / "a-b-11").mkdir()
    (runs / "a-b-11" / "run.json").touch()
    assert unfinished_run_folder("a") == runs / "a-10"


def test_a_run_that_another_process_is_training_is_not_the_unfinished_one(runs):
    first = run_in(unfinished_run_folder("a"))
    assert unfinished_run_folder("a") == first
    with held_by_another(first):
        assert unfinished_run_folder("a") == runs / "a-2"


def test_google_drive_is_used_when_it_is_mounted(tmp_path, monkeypatch):
    monkeypatch.delenv("QLORA_RUNS")
    monkeypatch.setattr(run_folder, "DRIVE", tmp_path / "MyDrive")
    assert run_folder.runs_folder() == data_path().parent / "runs"
    (tmp_path / "MyDrive").mkdir()
    assert new_run_folder("a") == tmp_path / "MyDrive" / "qlora-runs" / "a-1"


def test_qlora_runs_comes_first(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "DRIVE", tmp_path)
    assert new_run_folder("a") == runs / "a-1"


@pytest.mark.parametrize("find", [new_run_folder, unfinished_run_folder])
def test_runs_that_cannot_be_written_name_the_variable_and_the_cure(find, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"QLORA_RUNS='.*file' cannot be written to \(.+\): set QLORA_RUNS to a folder of your"
    ):
        find("a")
    monkeypatch.delenv("QLORA_RUNS")
    monkeypatch.setattr(run_folder, "runs_folder", lambda: tmp_path / "file" / "runs")
    with pytest.raises(OSError, match=r"runs, where runs go, cannot be written to \(.+\): set QLORA_RUNS"):
        new_run_folder("a")


@pytest.mark.parametrize("find", [new_run_folder, unfinished_run_folder])
@pytest.mark.parametrize("name", ["", "a/b", "/"])
def test_a_run_has_a_plain_name(find, name, runs):
    with pytest.raises(ValueError, match=f"name='{name}': pass the plain name of a folder"):
        find(name)
    assert not runs.exists()


def test_a_folder_that_another_process_has_just_made_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path))
    (tmp_path / "a-1").mkdir()
    monkeypatch.setattr(Path, "exists", lambda self: False)  # when it was looked for
    assert new_run_folder("a") == tmp_path / "a-2"


@pytest.mark.parametrize(
    ("error", "why"),
    [(OSError(errno.EBUSY, "it is in use"), "it is in use"), (OSError(errno.EBUSY, ""), "EBUSY")],
)
def test_a_run_that_cannot_be_renamed_says_why(error, why, tmp_path, monkeypatch):
    def refuse(self, target):
        raise error

    folder = run_in(tmp_path / "latest")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        OSError, match=rf"holds a run that cannot be moved aside \({why}\): .* continue it with --resume"
    ):
        move_aside(folder)
    assert (folder / RECORD).exists()
