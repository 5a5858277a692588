"""A run that is killed at any moment ends as it would have, bit for bit in the same set-up, or is refused with a reason."""

import json
import logging
import random
import re
import shutil
import time
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import sort_checkpoints
from trl import SFTTrainer

from qlora_helpers.folder_locks import FolderInUse
from qlora_helpers.models.loading import SHIPPED_MODEL, load_model
from qlora_helpers.paths import data_path
from qlora_helpers.safe_folders import NEW
from qlora_helpers.settings import Settings
from qlora_helpers.training import run as training
from qlora_helpers.training.best import best_of
from qlora_helpers.training.checkpoints import (
    PARTS,
    VALIDATION_LOSS,
    WEIGHTS,
    SaveByTheClock,
    last_whole_checkpoint,
    log_history,
    logged,
)
from qlora_helpers.training.checksums import CHECKSUMS, count_of_states, write_checksums
from tests.support import kills
from tests.support.holding import held_by_another
from tests.support.short_runs import CHATS, CPU, SHORT, TOKENIZER, adapter, differing, run

LORA_PARTS = (WEIGHTS["lora"], *PARTS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps, not interrupted, with checkpoints at three and six."""
    return run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def interrupted(finished, tmp_path):
    """The same run, killed after its third step."""
    for name in ("checkpoint-3", "run.json"):
        source = finished.saved_path.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


@pytest.fixture
def steps_taken(monkeypatch):
    """A list that grows by one with each training step, since starting over would give the same result."""
    taken, step = [], SFTTrainer.training_step
    monkeypatch.setattr(SFTTrainer, "training_step", lambda *args, **options: taken.append(1) or step(*args, **options))
    return taken


# Resuming


def test_a_resumed_run_ends_as_an_uninterrupted_one_to_the_last_bit(finished, interrupted, steps_taken):
    wanted = adapter(finished.saved_path)
    assert len(differing(adapter(interrupted / "checkpoint-3"), wanted)) == len(wanted)  # something is left to do
    resumed = run(interrupted, resume=True)
    assert differing(adapter(resumed.saved_path), wanted) == []
    assert resumed.history == finished.history
    assert len(steps_taken) == 3


def test_a_run_killed_while_it_wrote_a_checkpoint_resumes_from_the_one_before(
    finished, interrupted, steps_taken, capsys
):
    shutil.copytree(finished.saved_path.parent / "checkpoint-6", interrupted / "checkpoint-6")
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        (interrupted / "checkpoint-6" / name).write_bytes(b"cut")
    for name in ("trainer_state.json", CHECKSUMS):
        (interrupted / "checkpoint-6" / name).unlink()
    resumed = run(interrupted, resume=True)
    said = "checkpoint-6 was not written to its end, and is removed. The run goes on from step 3."
    assert said in capsys.readouterr().out
    assert differing(adapter(resumed.saved_path), adapter(finished.saved_path)) == []
    assert len(steps_taken) == 3
    assert last_whole_checkpoint(interrupted).name == "checkpoint-6"  # written again, complete


def test_a_run_killed_after_its_last_step_is_not_trained_further(finished, interrupted, steps_taken):
    shutil.copytree(finished.saved_path.parent / "checkpoint-6", interrupted / "checkpoint-6")
    cut = interrupted / f".adapter.0123abcd{NEW}"  # the kill came while the adapter was saved
    cut.mkdir()
    (cut / "adapter_model.safetensors").write_bytes(b"cut")
    resumed = run(interrupted, resume=True)
    assert steps_taken == []
    assert differing(adapter(resumed.saved_path), adapter(finished.saved_path)) == []
    assert resumed.history == finished.history
    assert not cut.exists()
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad():
        assert torch.equal(resumed.model(**batch).logits, finished.model(**batch).logits)


def test_resuming_where_there_is_nothing_starts_from_the_start(finished, tmp_path, steps_taken):
    fresh = run(tmp_path / "new", resume=True)
    assert len(steps_taken) == 6
    assert differing(adapter(fresh.saved_path), adapter(finished.saved_path)) == []


def test_how_often_to_save_may_change_between_the_parts_of_a_run(finished, interrupted):
    resumed = run(interrupted, Settings(**{**vars(SHORT), "save_steps": 2}), resume=True)
    assert {path.name for path in interrupted.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert differing(adapter(resumed.saved_path), adapter(finished.saved_path)) == []


# When a checkpoint is written


def test_a_checkpoint_is_written_when_its_minutes_are_over_and_the_newest_two_are_kept(tmp_path, monkeypatch):
    clock = [0.0]
    step = SFTTrainer.training_step
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def minute_long(*args, **options):
        clock[0] += 60
        return step(*args, **options)

    monkeypatch.setattr(SFTTrainer, "training_step", minute_long)
    run(tmp_path, Settings(steps=9, batch_size=1, rank=4, save_minutes=2.5), CHATS[:4])
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-9"}  # 3 is gone
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-9"


def test_a_checkpoint_is_not_written_before_its_time(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    callback, asked = SaveByTheClock(2.5), []
    callback.on_train_begin(None, None, None)
    for clock[0] in (100.0 + 149.9, 100.0 + 150):
        control = TrainerControl()
        callback.on_step_end(None, None, control)
        asked.append(control.should_save)
    assert asked == [False, True]


def test_checkpoints_of_one_second_leave_no_warning_on_the_page(tmp_path):
    """A fast GPU writes them that way. transformers then sorts them by number, and says so."""
    for step in (8, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
    seen, logger = BufferingHandler(100), logging.getLogger("transformers")
    logger.addHandler(seen)
    logging.Logger.warning_once.cache_clear()  # an earlier test may have triggered it already
    try:
        found = sort_checkpoints(str(tmp_path), use_mtime=True)
    finally:
        logger.removeHandler(seen)
    assert [path.rpartition("-")[2] for path in found] == ["8", "16"]
    assert not seen.buffer


# Which checkpoint is whole


def write_checkpoint(folder, step, state="whole", parts=LORA_PARTS):
    """A checkpoint of an older version of the package, without checksums."""
    state = f'{{"global_step": {step}}}' if state == "whole" else state
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for part in parts:
        if part.endswith(".safetensors"):
            save_file({"a": torch.zeros(3)}, path / part)
        else:
            torch.save({"a": 1}, path / part)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, "best")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 6, "log_hist'], ids=["missing", "empty", "cut off"])
def test_a_half_written_checkpoint_is_passed_over(state, tmp_path):
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 6, state, parts=())
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    write_checkpoint(tmp_path, 3, state=None)
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize("part", LORA_PARTS)
def test_a_checkpoint_without_one_of_its_parts_is_refused(part, interrupted):
    (interrupted / "checkpoint-3" / part).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-3 lacks {part}: a run resumed from it would not be the same run"):
        run(interrupted, resume=True)


@pytest.mark.parametrize("part", LORA_PARTS)
def test_a_part_that_was_cut_off_counts_as_missing(part, tmp_path):
    path = write_checkpoint(tmp_path, 3) / part
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"checkpoint-3 lacks {part}"):
            last_whole_checkpoint(tmp_path)


def test_a_checkpoint_of_an_older_version_must_be_of_the_step_in_its_name(tmp_path):
    write_checkpoint(tmp_path, 3, state='{"global_step": 99}')
    with pytest.raises(
        ValueError, match=r"checkpoint-3 says in trainer_state\.json that it is of step 99: a run resumed"
    ):
        last_whole_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}"], ids=["garbage", "no tensors"])
def test_an_adapter_file_that_holds_no_tensors_counts_as_missing(content, tmp_path):
    (write_checkpoint(tmp_path, 3) / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint-3 lacks adapter_model\.safetensors"):
        last_whole_checkpoint(tmp_path)


def test_a_float16_run_needs_its_loss_scale_too(tmp_path):
    write_checkpoint(tmp_path, 3)
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-3"
    with pytest.raises(ValueError, match=r"checkpoint-3 lacks scaler\.pt"):
        last_whole_checkpoint(tmp_path, float16=True)


# Damaged checkpoints


def _flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _drop_a_tensor(file):
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)


def _empty_the_state(file):
    torch.save(torch.load(file, weights_only=True) | {"state": {}}, file)


def _say_step(step):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": step}))


DAMAGE = {
    "no state": ("optimizer.pt", _empty_the_state),
    "a tensor gone": ("adapter_model.safetensors", _drop_a_tensor),
    "step 99": ("trainer_state.json", _say_step(99)),
    "step -5": ("trainer_state.json", _say_step(-5)),
    "state cut off": ("trainer_state.json", lambda file: file.write_text('{"global_step": 3, "log_h')),
    "checksums cut off": (CHECKSUMS, lambda file: file.write_text('{"files": {"optim')),
    "checksums of another program": (CHECKSUMS, lambda file: file.write_text("[]")),
    "no rng": ("rng_state.pth", lambda file: file.unlink()),
    **{
        f"a byte of {name}": (name, _flip_a_byte)
        for name in (
            "adapter_config.json",
            "adapter_model.safetensors",
            *PARTS,
            "trainer_state.json",
            "training_args.bin",
        )
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_kept(damage, interrupted, steps_taken):
    name, harm = DAMAGE[damage]
    harm(interrupted / "checkpoint-3" / name)
    before = {path.name: path.read_bytes() for path in (interrupted / "checkpoint-3").iterdir()}
    said = "(lacks|has files that are not as they were written)"
    with pytest.raises(
        ValueError, match=rf"checkpoint-3 {said}.*{re.escape(name)}.*a run resumed from it would not be the same run"
    ):
        run(interrupted, resume=True)
    assert steps_taken == []
    assert {path.name: path.read_bytes() for path in (interrupted / "checkpoint-3").iterdir()} == before


def without_checksums(folder):
    """Make a run one of an older version of the package."""
    record = json.loads((folder / "run.json").read_text())
    for name in ("environment", "base", "validation", "eval_steps", "patience"):
        del record[name]
    (folder / "run.json").write_text(json.dumps(record))
    for path in folder.glob("checkpoint-*"):
        (path / CHECKSUMS).unlink()
    return folder


def test_a_run_of_an_older_version_is_resumed(finished, interrupted, steps_taken):
    resumed = run(without_checksums(interrupted), resume=True)
    assert differing(adapter(resumed.saved_path), adapter(finished.saved_path)) == []
    assert len(steps_taken) == 3


def test_a_run_of_an_older_version_may_be_killed_again(interrupted, monkeypatch):
    """Its checkpoints have no checksums, and must not be taken for cut off when it is resumed the second time."""
    before = (without_checksums(interrupted) / "run.json").read_text()

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "training_step", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="the last checkpoint is that of step 3"):
            run(interrupted, resume=True)
    assert (interrupted / "checkpoint-3").is_dir()
    assert (interrupted / "run.json").read_text() == before  # how and where it was begun


def test_a_missing_tensor_is_noticed_without_checksums_too(interrupted):
    """PEFT would load the others and leave this one as it was drawn."""
    _drop_a_tensor(without_checksums(interrupted) / "checkpoint-3" / "adapter_model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"lacks tensors that its config asks for, such as .*lora_A.weight\. Resume with the versions of the libraries",
    ):
        run(interrupted, resume=True)


def test_an_empty_optimizer_is_noticed_without_checksums_too(interrupted, steps_taken):
    _empty_the_state(without_checksums(interrupted) / "checkpoint-3" / "optimizer.pt")
    with pytest.raises(ValueError, match="checkpoint-3 has no state of the optimizer: a run resumed from it would not"):
        run(interrupted, resume=True)
    assert steps_taken == []


@pytest.mark.parametrize("name", ["thesis.txt", "folder"])
def test_a_folder_of_somebody_else_s_is_not_taken_for_a_checkpoint_that_was_cut_off(name, interrupted):
    (interrupted / "checkpoint-9").mkdir()
    (interrupted / "checkpoint-9" / name).mkdir()
    with pytest.raises(ValueError, match=f"checkpoint-9 is no whole checkpoint, and holds '{name}', which the trainer"):
        run(interrupted, resume=True)
    assert (interrupted / "checkpoint-9" / name).exists()


def test_an_optimizer_that_did_not_get_its_state_back_is_noticed(interrupted, steps_taken):
    """Checksums are of the files; this is about what was loaded."""
    checkpoint = interrupted / "checkpoint-3"
    states = count_of_states(checkpoint)
    _empty_the_state(checkpoint / "optimizer.pt")
    write_checksums(checkpoint, states)
    with pytest.raises(ValueError, match=f"with the optimizer's state of {states} tensors, and 0 were loaded"):
        run(interrupted, resume=True)
    assert steps_taken == []


@pytest.mark.parametrize(
    ("name", "before", "said"),
    [
        ("threads", 64, "threads was 64 and is now"),
        ("torch", "2.0", "torch was 2.0 and is now"),
        ("device", "NVIDIA H200", "device was NVIDIA H200 and is now"),
    ],
)
def test_a_change_of_the_environment_is_said(name, before, said, interrupted, capsys):
    record = json.loads((interrupted / "run.json").read_text())
    assert set(record["environment"]) >= {"device", "threads", "python", "torch", "transformers", "bitsandbytes"}
    record["environment"][name] = before
    (interrupted / "run.json").write_text(json.dumps(record))
    run(interrupted, resume=True)
    printed = capsys.readouterr().out
    assert said in printed and "its last bits may differ from those of an uninterrupted run" in printed


def test_in_the_same_environment_nothing_is_said(interrupted, capsys):
    run(interrupted, resume=True)
    assert capsys.readouterr().out == ""


# Writers that meet, and disks that are full


def test_a_second_run_in_a_folder_is_told_who_has_it(tmp_path, steps_taken):
    with (
        held_by_another(tmp_path / "run") as process,
        pytest.raises(FolderInUse, match=f"output_dir='.*run' is being written by process {process.pid} on"),
    ):
        run(tmp_path / "run")
    assert steps_taken == [] and list((tmp_path / "run").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("name", "kept"), [("optimizer.pt", "that of step 3"), ("trainer_state.json", "that of step 3")]
)
def test_a_full_disk_during_a_checkpoint_is_a_sentence(name, kept, interrupted, monkeypatch):
    save = Trainer._save_checkpoint

    def full(self, *args, **options):
        (interrupted / "checkpoint-6").mkdir()
        (interrupted / "checkpoint-6" / name).symlink_to("/dev/full")
        save(self, *args, **options)

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    with pytest.raises(
        OSError, match=rf"could not be written to; its disk has \d+ MB left .*and resume the run: .* {kept}"
    ):
        run(interrupted, resume=True)
    monkeypatch.undo()
    assert run(interrupted, resume=True).saved_path.exists()


def test_an_error_of_safetensors_is_a_sentence_too(tmp_path, monkeypatch):
    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    with pytest.raises(OSError, match=r"MB left \(Error while serializing.*resume the run: no checkpoint is complete"):
        run(tmp_path / "new")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("tensors share memory")])
def test_other_errors_of_saving_stay_as_they_are(error, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(Trainer, "_save_checkpoint", broken)
    with pytest.raises(type(error), match=str(error)):
        run(tmp_path / "new")


def test_other_errors_stay_as_they_are(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(SFTTrainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(tmp_path / "new")


# What is refused


def test_resuming_a_finished_run_is_refused(finished):
    with pytest.raises(ValueError, match="is finished: load what it trained, or name a new folder for another run"):
        run(finished.saved_path.parent, resume=True)


@pytest.mark.parametrize("left", ["adapter", "checkpoint-3", "run.json"])
def test_a_folder_that_holds_a_run_is_refused_unless_it_is_to_be_resumed(left, tmp_path):
    (tmp_path / left).mkdir()
    (tmp_path / left / "file").touch()
    with pytest.raises(FileExistsError, match="holds a run already: name a new folder, or pass resume=True"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]


@pytest.mark.parametrize(
    ("settings", "chats", "said"),
    [
        (Settings(**{**vars(SHORT), "steps": 12}), CHATS, "steps was 6 and is now 12"),
        (Settings(**{**vars(SHORT), "seed": 1}), CHATS, "seed was 0 and is now 1"),
        (Settings(**{**vars(SHORT), "packing": True}), CHATS, "packing was not set and is now True"),
        (Settings(**{**vars(SHORT), "max_grad_norm": None}), CHATS, "max_grad_norm was 1.0 and is not set now"),
        (SHORT, CHATS[:-1], "chats was '[0-9a-f]{16}' and is now '[0-9a-f]{16}'"),
    ],
)
def test_a_run_that_was_begun_differently_is_not_resumed(settings, chats, said, interrupted):
    with pytest.raises(ValueError, match=f"was begun differently: {said}. Resume it as it was begun"):
        run(interrupted, settings, chats, resume=True)
    assert (interrupted / "checkpoint-3").exists()


def test_a_run_is_not_resumed_with_another_base(interrupted):
    other = load_model(double_quant=False, hardware=CPU)
    said = "quantization was 'nf4, double_quant=True' and is now 'nf4, double_quant=False'"
    with pytest.raises(ValueError, match=f"was begun differently: {said}"):
        training.train(other, TOKENIZER, CHATS, interrupted, SHORT, hardware=CPU, resume=True)


def test_a_run_is_not_resumed_with_other_weights_of_the_same_name(interrupted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / SHIPPED_MODEL
    shutil.copytree(data_path(SHIPPED_MODEL), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    other = load_model(str(folder), hardware=CPU)
    with pytest.raises(ValueError, match=r"was begun differently: base was 'sha256:.*' and is now 'sha256:"):
        training.train(other, TOKENIZER, CHATS, interrupted, SHORT, hardware=CPU, resume=True)


def test_a_run_is_resumed_with_a_copy_of_its_base_under_another_name(interrupted, finished, tmp_path_factory):
    copy = shutil.copytree(data_path(SHIPPED_MODEL), tmp_path_factory.mktemp("copies") / "1")
    resumed = training.train(
        load_model(str(copy), hardware=CPU), TOKENIZER, CHATS, interrupted, SHORT, hardware=CPU, resume=True
    )
    assert differing(adapter(resumed.saved_path), adapter(finished.saved_path)) == []
    record = json.loads((interrupted / "run.json").read_text(encoding="utf-8"))
    (interrupted / "run.json").write_text(json.dumps(record | {"base": None}), encoding="utf-8")
    shutil.rmtree(resumed.saved_path)
    with pytest.raises(
        ValueError, match=r"was begun differently: base was not set.*model was 'tiny-llama' and is now '1'"
    ):
        training.train(
            load_model(str(copy), hardware=CPU), TOKENIZER, CHATS, interrupted, SHORT, hardware=CPU, resume=True
        )


def test_a_folder_with_other_files_is_refused(tmp_path):
    """The trainer would write over a README.md."""
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"output_dir='.*' holds 'README.md' but no run of this course: name a new"
    ):
        run(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("README.md", "mine")]


def test_a_damaged_record_is_refused(interrupted):
    (interrupted / "run.json").write_text('{"steps": 6')
    with pytest.raises(
        ValueError, match=r"run\.json is damaged, so it is unknown how the run was begun: name a new folder"
    ):
        run(interrupted, resume=True)


def test_an_adapter_folder_without_its_files_is_not_a_finished_run(interrupted, finished):
    (interrupted / "adapter").mkdir()
    resumed = run(interrupted, resume=True)
    assert differing(adapter(resumed.saved_path), adapter(finished.saved_path)) == []


def test_checkpoints_of_an_unknown_run_are_refused(interrupted):
    (interrupted / "run.json").unlink()
    with pytest.raises(
        ValueError, match=re.escape("has checkpoints but no run.json: it is unknown which run they belong to")
    ):
        run(interrupted, resume=True)


@pytest.mark.parametrize(("folder", "said"), [("file", "is a file"), ("file/below", r"cannot be written to \(.+\)")])
def test_the_error_for_a_folder_that_cannot_be_used_names_the_argument_and_the_cure(folder, said, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"output_dir='.*{folder}' {said}: name a "):
        run(tmp_path / folder)


def test_a_run_that_could_not_begin_leaves_its_folder_free(tmp_path):
    with pytest.raises(ValueError, match="over max_length=5"):
        run(tmp_path / "new", Settings(steps=1, max_length=5))
    assert not (tmp_path / "new" / "run.json").exists()


# Real kills, each in its own process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return {
        validated: kills.uninterrupted(tmp_path_factory.mktemp("reference"), validated) for validated in (False, True)
    }


def test_the_validated_run_ends_and_keeps_what_the_kills_take_it_to(uninterrupted):
    log = log_history(last_whole_checkpoint(uninterrupted[True].parent))
    losses = dict(logged(log, VALIDATION_LOSS))
    assert tuple(losses) == kills.EVALUATIONS
    assert best_of(losses.items())[0] == 12
    assert kills.EVALUATIONS[-1] == kills.VALIDATED_SAVES[-1] < kills.STEPS


# the others take `make test-kills`
QUICK = [*((where, False) for where in kills.PLACES), ("inside an evaluation", True), ("inside the last save", True)]


@pytest.mark.parametrize(("where", "validated"), QUICK)
def test_a_killed_process_leaves_a_run_that_ends_bit_identical(where, validated, uninterrupted, tmp_path):
    result = kills.trial(tmp_path, where, random.Random(where), reference=uninterrupted[validated], validated=validated)
    assert result["kills"] >= 1
    assert result["differing tensors"] == 0, json.dumps(result)
