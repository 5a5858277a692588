"""Runs as tutorials write them, and the fault in each."""

import datasets
import pytest
import torch
import transformers

from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.settings import Settings
from qlora_helpers.training.faulty_runs import collator_run, sft_trainer
from tests.support.short_runs import CHATS, CPU, SHORT, TOKENIZER, trainer_of


def rows_of(folder, rows, tokenizer=TOKENIZER, **options):
    return sft_trainer(load_model(hardware=CPU), tokenizer, rows, folder, SHORT, hardware=CPU, **options).train_dataset


def test_trl_trains_on_the_question_doubles_the_bos_token_and_cuts_the_end_silently(tmp_path, capfd):
    ids = TOKENIZER.apply_chat_template(CHATS[0], return_dict=True)["input_ids"]
    messages = [{"messages": CHATS[0]}]
    assert rows_of(tmp_path, messages)[0]["labels"] == ids
    text = [{"text": TOKENIZER.apply_chat_template(CHATS[0], tokenize=False)}]
    assert rows_of(tmp_path, text)[0]["input_ids"] == [TOKENIZER.bos_token_id, *ids]
    cut = rows_of(tmp_path, messages, assistant_only_loss=True, max_length=16)[0]
    assert cut["input_ids"] == ids[:16] and TOKENIZER.eos_token_id not in cut["labels"]
    assert capfd.readouterr().out == ""


def test_plain_arguments_mean_1_024_tokens(tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.model_max_length = 4096
    long = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "piano " * 1100}]
    made = rows_of(tmp_path, [{"messages": long}], tokenizer, plain_arguments=True)
    assert len(made[0]["input_ids"]) == 1024


def test_the_collator_of_transformers_takes_the_end_out_of_the_loss_if_it_pads(tmp_path):
    for pad, learnt in ((TOKENIZER.pad_token, True), (TOKENIZER.eos_token, False)):
        tokenizer = load_tokenizer()
        tokenizer.pad_token = pad
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        labels = collate([tokenizer.apply_chat_template(CHATS[0], return_dict=True)])["labels"]
        assert bool((labels == tokenizer.eos_token_id).any()) is learnt


def test_the_collator_of_transformers_stops_with_trl_at_an_uneven_batch(tmp_path):
    trainer = trainer_of(tmp_path, chats=CHATS[:4])
    trainer.data_collator = transformers.DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    with pytest.raises(ValueError, match=r"Unable to create tensor.*`labels`"):
        next(iter(trainer.get_train_dataloader()))


def test_a_run_with_the_collator_trains_the_adapters_alone(tmp_path):
    settings = Settings(steps=2, batch_size=2, rank=4, warmup_steps=0)
    trainer = collator_run(load_model(hardware=CPU), load_tokenizer(), CHATS, tmp_path, settings, CPU)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not trainer.data_collator.mlm  # no token is masked: the next one is predicted
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]


def test_a_scaler_stops_at_float16_adapters():
    weight = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(torch.optim.SGD([weight], lr=1.0))


def test_the_bars_of_datasets_are_left_as_they_were(tmp_path):
    datasets.enable_progress_bars()
    rows_of(tmp_path, [{"messages": CHATS[0]}])
    assert datasets.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"assistant_only_loss": "no"}, "assistant_only_loss='no': must be True or False"),
        ({"plain_arguments": 1}, "plain_arguments=1: must be True or False"),
        ({"max_length": 0}, "max_length=0: must be a whole number, 1 or more"),
        ({"max_length": "1024"}, "max_length='1024': must be a whole number, 1 or more"),
    ],
)
def test_a_value_of_another_kind_is_refused_before_anything_is_written(bad, said, tmp_path):
    with pytest.raises(ValueError, match=f"^{said}"):
        sft_trainer(None, TOKENIZER, [], tmp_path / "new", SHORT, hardware=CPU, **bad)
    assert not (tmp_path / "new").exists()
