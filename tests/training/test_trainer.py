"""The trainer of a run: what it trains, on which tokens, and which chats it refuses."""

import copy
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Params4bit
from transformers import Trainer
from trl import SFTConfig

from qlora_helpers.chats import count_tokens, split_question
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.settings import Settings
from qlora_helpers.training import trainer
from qlora_helpers.training.trainer import build_trainer
from tests.support.short_runs import CHATS, CPU, SHORT, TOKENIZER, differing, run, trainer_of

# What is trained


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_the_adapters_and_nothing_else_are_trained_and_in_float32(quantization, tmp_path):
    trainer = trainer_of(tmp_path, quantization)
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 7 * 2  # layers, linears in each, A and B
    assert all("lora_" in name for name in trained)
    assert set(trained.values()) == {torch.float32}
    trainer.create_optimizer()
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {p for p in trainer.model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("quantization", "in_four_bits"), [("nf4", 28), (None, 0)])
def test_the_base_stays_as_it_was_loaded(quantization, in_four_bits, tmp_path):
    parameters = list(trainer_of(tmp_path, quantization).model.parameters())
    assert sum(isinstance(p, Params4bit) for p in parameters) == in_four_bits


def test_the_loss_is_on_the_answers_and_their_eos_tokens_alone(tmp_path):
    batch = next(iter(trainer_of(tmp_path).get_train_dataloader()))
    assert batch["input_ids"].shape[0] == SHORT.batch_size
    trained_on = {TOKENIZER.decode(row[row != -100]).strip() for row in batch["labels"]}
    answers = {split_question(chat)[1] + TOKENIZER.eos_token for chat in CHATS}
    assert len(trained_on) == SHORT.batch_size and trained_on <= answers
    spoken = batch["labels"] != -100
    assert torch.equal(batch["labels"][spoken], batch["input_ids"][spoken])


@pytest.mark.parametrize(("steps", "asked", "each"), [(300, None, 15), (59, None, 2), (6, None, 1), (300, 7, 7)])
def test_the_loss_is_logged_twenty_times_or_as_often_as_asked(steps, asked, each, tmp_path):
    made = trainer_of(tmp_path, settings=replace(SHORT, steps=steps, log_steps=asked))
    assert made.args.logging_steps == each


def test_the_first_values_of_the_adapters_follow_from_the_seed_alone(tmp_path):
    def first_values(seed):
        model = trainer_of(tmp_path, settings=Settings(rank=4, seed=seed)).model
        return {name: p for name, p in model.named_parameters() if "lora_A" in name}

    first = first_values(seed=0)
    torch.rand(1)  # whatever was drawn before
    assert differing(first_values(seed=0), first) == []
    assert len(differing(first_values(seed=1), first)) == len(first)


# What is refused


def test_a_chat_that_would_be_cut_is_refused_by_its_number(tmp_path):
    length = count_tokens(CHATS[0], TOKENIZER)
    long = [{"role": "user", "content": "Where? " * 30}, CHATS[0][1]]
    settings = Settings(steps=1, max_length=length)
    with pytest.raises(
        ValueError, match=rf"chat 2 has {count_tokens(long, TOKENIZER)} tokens, over max_length={length}"
    ):
        run(tmp_path, settings, [CHATS[0], long])


def test_a_chat_of_exactly_the_maximum_length_is_not_truncated(tmp_path):
    settings = Settings(steps=1, batch_size=1, max_length=count_tokens(CHATS[0], TOKENIZER))
    batch = next(iter(trainer_of(tmp_path, settings=settings, chats=CHATS[:1]).get_train_dataloader()))
    assert batch["labels"][0, -1] == TOKENIZER.eos_token_id


def test_a_process_uses_one_gpu_of_several(tmp_path, monkeypatch):
    """As in a notebook: a command that is not launched in several processes is refused (tests/training/test_together.py)."""
    monkeypatch.setattr(trainer, "SFTConfig", lambda **options: two_gpus(SFTConfig(**options)))
    assert trainer_of(tmp_path).args.n_gpu == 1


def two_gpus(config):
    assert config.n_gpu == 0  # after its set-up on this CPU
    config._n_gpu = 2
    return config


def test_chats_go_through_the_template_all_at_once(tmp_path, monkeypatch):
    calls = []
    template = type(TOKENIZER).apply_chat_template

    def counted(self, chats, *args, **options):
        calls.append(len(chats))
        return template(self, chats, *args, **options)

    monkeypatch.setattr(type(TOKENIZER), "apply_chat_template", counted)
    trainer_of(tmp_path)
    assert set(calls) == {len(CHATS)} and len(calls) <= 3  # as text, with its marks, and ready to be answered


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (
            [CHATS[0][0], {"role": "assistant", "content": "Here.<|end|><|user|>"}],
            r"message 2 \(assistant\) has '<\|end\|>'",
        ),
        ([{"role": "user", "content": "<|begin|>"}, CHATS[0][1]], r"message 1 \(user\) has '<\|begin\|>' in its text"),
        ([{"role": "user", "content": "\ud800"}, CHATS[0][1]], r"message 1 \(user\) has half a surrogate pair"),
        ([{"role": "system", "content": "s"}, *CHATS[0]], "the chat template refuses it: this model knows the roles"),
        ([CHATS[0][0], {"role": "assistant", "content": " "}], r"message 2 \(assistant\) is an empty answer"),
        (CHATS[0][:1], "the last message is not an answer"),
        ([CHATS[0][0], "Here."], "message 2 is not "),
        (CHATS[0][0], "no messages: expected "),
        ("Where?", "no messages: expected "),
    ],
)
def test_a_chat_that_read_chats_would_refuse_is_refused_by_its_number_before_anything_is_written(chat, said, tmp_path):
    with pytest.raises(ValueError, match=rf"^chat 2: {said}"):
        run(tmp_path / "new", chats=[CHATS[0], chat])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "hardware", "said"),
    [
        ({"steps": 2}, CPU, r"settings=\{'steps': 2\}: give a Settings\(\.\.\.\)"),
        (SHORT, "cpu", r"hardware='cpu': pass what qlora_helpers\.hardware\.detect\(\) returns"),
    ],
)
def test_settings_and_hardware_of_another_kind_are_refused(settings, hardware, said, tmp_path):
    with pytest.raises(ValueError, match=f"^{said}"):
        build_trainer(load_model(hardware=CPU), TOKENIZER, CHATS, tmp_path / "new", settings, hardware)
    assert not (tmp_path / "new").exists()


def test_a_template_without_marks_gives_the_same_rows(tmp_path):
    unmarked = load_tokenizer()
    unmarked.chat_template = unmarked.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain = build_trainer(load_model(hardware=CPU), unmarked, CHATS, tmp_path, SHORT, CPU)
    assert plain.train_dataset[:] == trainer_of(tmp_path).train_dataset[:]


def test_a_template_that_ends_no_answer_is_refused(tmp_path):
    endless = load_tokenizer()
    endless.chat_template = endless.chat_template.replace(" + eos_token", "")
    with pytest.raises(ValueError, match=r"^chat 1: the chat template does not mark the token that ends an answer"):
        build_trainer(load_model(hardware=CPU), endless, CHATS, tmp_path, SHORT, CPU)


# How long


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return trainer_of(tmp_path_factory.mktemp("built"), settings=Settings(batch_size=4, rank=4))


@pytest.mark.parametrize("epochs", [0.1, 1, 1.1, 2.5, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("rows", [1, 4, 12, 13])
def test_epochs_are_as_many_steps_as_for_transformers(epochs, accumulation, rows, built, monkeypatch):
    """It begins each epoch with a step of its own, and counts a part of a step as one."""
    arguments = copy.copy(built.args)
    arguments.max_steps, arguments.num_train_epochs = -1, epochs
    arguments.gradient_accumulation_steps = accumulation
    monkeypatch.setattr(built, "train_dataset", built.train_dataset.select(range(rows)))
    steps = built.set_initial_training_values(arguments, built.get_train_dataloader())[-1]
    assert Settings(epochs=epochs, batch_size=4, accumulation=accumulation).for_rows(rows).steps == steps


def test_a_trainer_counts_the_steps_of_epochs_itself(tmp_path):
    settings = Settings(epochs=2, batch_size=4, rank=4)
    assert trainer_of(tmp_path, settings=settings, chats=CHATS[:9]).args.max_steps == 6


def test_the_operations_of_a_batch_are_counted_as_transformers_counts_them(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    counted = Trainer.floating_point_ops(trainer, batch)
    assert trainer.floating_point_ops(batch) == counted > 0
