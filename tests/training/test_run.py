"""Runs of a few steps: what is trained, on what, and what is refused."""

import math
import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from trl import SFTTrainer

from qlora_helpers.models.loading import load_model
from qlora_helpers.settings import Settings
from qlora_helpers.training import run as training
from qlora_helpers.training.callbacks import TrainingDiverged
from qlora_helpers.training.run import train
from tests.support.short_runs import CHATS, CPU, SHORT, TOKENIZER, adapter, run
from tests.test_settings import REFUSED


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps, not interrupted, with checkpoints at three and six."""
    return run(tmp_path_factory.mktemp("finished"))


def test_training_changes_the_adapters_and_not_the_base(finished):
    plain = dict(load_model(hardware=CPU).named_parameters())
    for name, parameter in finished.model.named_parameters():
        if "lora_B" in name:
            assert parameter.abs().sum() > 0, f"{name} still has its initial value, zero"
        elif "lora_" not in name:
            assert torch.equal(parameter, plain[name.removeprefix("base_model.model.").replace(".base_layer", "")]), (
                name
            )


def test_a_run_reports_what_it_trained(finished):
    trainable = sum(p.numel() for p in finished.model.parameters() if p.requires_grad)
    assert finished.trainable_parameters == trainable == sum(t.numel() for t in adapter(finished.saved_path).values())
    assert finished.all_parameters > 10 * trainable
    assert finished.seconds > 0
    assert not finished.model.training


def test_the_saved_adapter_gives_the_trained_model_back(finished):
    batch = TOKENIZER("Where does Carl Kirkcroft live?", return_tensors="pt")
    again = PeftModel.from_pretrained(load_model(hardware=CPU), finished.saved_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, finished.model(**batch).logits)


def test_the_loss_is_recorded_and_passed_on_twenty_times(tmp_path):
    seen = []
    settings = Settings(steps=40, batch_size=1, warmup_steps=0, rank=4)
    done = run(tmp_path, settings, CHATS[:1], on_loss=lambda history: seen.append(list(history)))
    assert [step for step, _ in done.history] == list(range(2, 41, 2))
    assert done.history[-1][1] < done.history[0][1]  # the same chat over and over
    assert seen == [done.history[:count] for count in range(1, 21)]
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "run.json"}  # no save_steps, no checkpoints


@pytest.mark.parametrize("wanted", [True, False])
def test_a_progress_bar_with_the_loss_is_shown_if_it_is_wanted(wanted, tmp_path, capfd):
    done = run(tmp_path, Settings(steps=2, batch_size=1, rank=4), progress_bar=wanted)
    shown = capfd.readouterr()
    assert ("2/2" in shown.err) is (f"loss {done.history[-1][1]:.3f}" in shown.err) is wanted
    assert shown.out == ""  # not even the trainer's own dictionaries


def test_gradient_checkpointing_computes_the_same(tmp_path):
    plain = run(tmp_path / "plain", Settings(steps=2, batch_size=2, warmup_steps=0, rank=4))
    frugal = run(
        tmp_path / "frugal", Settings(steps=2, batch_size=2, warmup_steps=0, rank=4, gradient_checkpointing=True)
    )
    torch.testing.assert_close(adapter(frugal.saved_path), adapter(plain.saved_path))
    assert any("lora_B" in name and tensor.any() for name, tensor in adapter(frugal.saved_path).items())


def test_no_chats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"chats=\[\]: there is nothing to learn"):
        run(tmp_path, chats=[])


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_setting_of_a_bad_value_is_refused_before_anything_is_written(name, value, allowed, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f": {allowed}")):
        train(None, TOKENIZER, CHATS, tmp_path / "new", Settings(**{name: value}), hardware=CPU)
    assert not (tmp_path / "new").exists()


# The values that `Settings` itself refuses are in tests/test_settings.py.
DESCRIBES_ANOTHER_RUN = [
    ({"method": "lora"}, "method='lora': the model has 4-bit layers. Load it with quantization=None, or use 'qlora'"),
    ({"method": "full"}, "method='full': 4-bit weights cannot be trained. Load the model with quantization=None"),
    ({"adapter_dtype": "bfloat16"}, "adapter_dtype='bfloat16': only the predictor takes it; training uses 'float32'"),
    ({"block_size": 128}, "block_size=128: only the predictor takes it; training uses 64"),
    ({"optimizer": "sgd_of_mine"}, "optimizer='sgd_of_mine': choose one of adamw_torch, "),
    ({"target_modules": ["foo"]}, "target_modules=['foo']: 'foo' is no linear layer. There are q_proj, "),
    ({"target_modules": ["q_proj", "qproj"]}, "target_modules=['q_proj', 'qproj']: 'qproj' is no linear layer"),
    ({"rank": 2**63}, "rank=9223372036854775808: must be a whole number, 1 or more, in 64 bits"),
    ({"batch_size": 2**63}, "batch_size=9223372036854775808: must be a whole number, 1 or more, in 64 bits"),
    ({"attention": "math"}, "attention='math': only the predictor takes it; training uses 'sdpa'"),
    ({"upcast_fp32": True}, "upcast_fp32=True: only the predictor takes it; training uses False"),
    ({"compute_dtype": "float16"}, "compute_dtype='float16': the cpu gear computes in float32"),
    ({"num_gpus": 2}, "num_gpus=2: 1 process was launched. Start it with torchrun --nproc-per-node 2"),
    (
        {"sharding": "fsdp"},
        "sharding='fsdp': the processes were launched without it. Start them with accelerate launch",
    ),
]


@pytest.mark.parametrize(("changed", "said"), DESCRIBES_ANOTHER_RUN)
def test_settings_that_describe_another_run_are_refused_before_anything_is_written(changed, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        run(tmp_path / "new", replace(SHORT, **changed))
    assert not (tmp_path / "new").exists()


def test_an_unquantised_model_is_not_called_qlora(tmp_path):
    with pytest.raises(ValueError, match="method='qlora': the model has no 4-bit layers"):
        train(load_model(quantization=None, hardware=CPU), TOKENIZER, CHATS, tmp_path, SHORT, hardware=CPU)


# When it goes wrong


def test_a_loss_of_nan_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    step = SFTTrainer.training_step

    def spoiled(self, *args, **options):
        loss = step(self, *args, **options)
        return loss * math.nan if self.state.global_step == 2 else loss  # the third step

    monkeypatch.setattr(SFTTrainer, "training_step", spoiled)
    with pytest.raises(
        TrainingDiverged, match=r"^step 3: the loss is nan\. Lower learning_rate=0\.001 or raise warmup_"
    ):
        run(tmp_path)
    assert not (tmp_path / "checkpoint-3").exists()  # it would have been saved at this step
    assert not (tmp_path / "adapter").exists()


def overflowing(trainer, steps):
    """An accelerator whose optimizer skips these steps, as it does when gradients overflow float16."""
    accelerator = type(trainer.accelerator)
    return type(
        "Overflowing",
        (accelerator,),
        {"optimizer_step_was_skipped": property(lambda self: trainer.state.global_step in steps)},
    )


@pytest.mark.parametrize(("steps", "stops"), [(range(1, 17), False), (range(3, 20), True)])
def test_steps_that_overflow_are_counted_and_too_many_in_a_row_stop_the_run(
    steps, stops, tmp_path, monkeypatch, capsys
):
    build = training.build_trainer

    def build_overflowing(*args):
        trainer = build(*args)
        trainer.accelerator.__class__ = overflowing(trainer, steps)
        return trainer

    monkeypatch.setattr(training, "build_trainer", build_overflowing)
    settings = Settings(steps=20, batch_size=1, rank=4)
    if stops:
        with pytest.raises(
            TrainingDiverged, match=r"^step 19: the gradients have overflowed float16 17 times in a row"
        ):
            run(tmp_path, settings, CHATS[:1])
    else:
        assert run(tmp_path, settings, CHATS[:1]).skipped_steps == list(range(1, 17))
        assert "gradients overflowed at 16 of 20 steps (the last is step 16)" in capsys.readouterr().out
