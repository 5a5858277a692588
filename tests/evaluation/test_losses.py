"""The loss as it is by hand, as it was, and as training has it; evaluation mode."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_helpers import evaluation
from qlora_helpers.chats import count_tokens, tokenized
from qlora_helpers.evaluation import losses
from qlora_helpers.models.loading import load_model
from tests.support.short_runs import CHATS, CPU, TOKENIZER, trainer_of


@pytest.fixture(scope="module")
def base():
    return load_model(quantization=None, hardware=CPU)


def loss_by_hand(model, chat):
    """The sum of -log p over the answer's tokens and its EOS token, and their number; without the template's mask."""
    whole = TOKENIZER.apply_chat_template(chat, return_dict=True)["input_ids"]
    asked = len(TOKENIZER.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"])
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return -sum(log_p[i - 1, whole[i]].item() for i in range(asked, len(whole))), len(whole) - asked


def test_the_loss_of_one_chat_is_what_it_is_by_hand(base):
    total, count = loss_by_hand(base, CHATS[0])
    assert evaluation.loss(base, TOKENIZER, CHATS[:1]) == pytest.approx(total / count, rel=1e-5)


def test_the_loss_of_many_chats_is_their_mean_over_tokens_however_they_are_batched(base):
    chats = [*CHATS[:4], [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Easthaven."}]]
    totals, counts = zip(*(loss_by_hand(base, chat) for chat in chats), strict=True)
    assert len({count_tokens(chat, TOKENIZER) for chat in chats}) > 1 and len(set(counts)) > 1  # there is padding
    for batch_size in (2, 5):
        loss = evaluation.loss(base, TOKENIZER, chats, batch_size=batch_size)
        assert loss == pytest.approx(sum(totals) / sum(counts), rel=1e-5)


def test_the_loss_of_training_is_the_one_that_evaluation_computes(base, tmp_path):
    trainer = trainer_of(tmp_path, None, chats=CHATS[:4])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), next(iter(trainer.get_train_dataloader())))
    assert loss.item() == pytest.approx(evaluation.loss(base, TOKENIZER, CHATS[:4]), rel=1e-4)


@pytest.mark.parametrize(("count", "wanted"), [(1, 4.149591445922852), (20, 5.09813585673293)])
def test_the_loss_is_what_it_was_before_it_padded_by_itself(count, wanted, base):
    assert evaluation.loss(base, TOKENIZER, CHATS[:count]) == pytest.approx(wanted, rel=1e-5)  # CPUs differ by 1e-6


def test_the_loss_of_each_row_is_its_own_in_the_order_of_the_rows(base):
    rows = tokenized(CHATS[:6], TOKENIZER)
    found = losses.losses_of(base, TOKENIZER, rows, batch_size=4)
    for row, (total, count) in zip(rows, found, strict=True):
        (alone,) = losses.losses_of(base, TOKENIZER, [row])
        assert (total, count) == (pytest.approx(alone[0], rel=1e-5), sum(row["assistant_masks"]))
    assert len({count for _, count in found}) > 1


def test_rows_that_differ_in_their_last_token_alone_go_through_the_model_once(base, monkeypatch):
    (row, other) = tokenized(CHATS[:2], TOKENIZER)
    last = {"assistant_masks": [0] * (len(row["input_ids"]) - 1) + [1]}
    endings = [row | {"input_ids": [*row["input_ids"][:-1], token]} for token in (2, 5, 7)]
    rows = [endings[0], other, endings[1] | last, endings[2], {"input_ids": [1], "assistant_masks": [1]}]
    alone = [losses.losses_of(base, TOKENIZER, [one])[0] for one in rows]
    seen, forward = [], base.forward
    monkeypatch.setattr(base, "forward", lambda **batch: seen.append(len(batch["input_ids"])) or forward(**batch))
    together = losses.losses_of(base, TOKENIZER, rows)
    assert sum(seen) == 2
    for (total, count), (wanted, tokens) in zip(together, alone, strict=True):
        assert (total, count) == (pytest.approx(wanted, rel=1e-5), tokens)
    assert together[2][1] == 1 and together[4] == (0.0, 0)


def test_padding_moves_no_token_of_a_model_with_learned_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(TOKENIZER), n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=1.0)
    ).eval()
    chats = [*CHATS[:1], [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Easthaven."}]]
    alone = losses.losses_of(model, TOKENIZER, tokenized(chats[1:], TOKENIZER))
    assert losses.losses_of(model, TOKENIZER, tokenized(chats, TOKENIZER))[1][0] == pytest.approx(alone[0][0], rel=1e-4)


def test_batches_are_smaller_where_their_logits_would_be_large(base, monkeypatch):
    seen, forward = [], base.forward
    monkeypatch.setattr(base, "forward", lambda **batch: seen.append(batch["input_ids"].shape) or forward(**batch))
    monkeypatch.setattr(losses, "MOST_LOGITS", 100 * base.config.vocab_size)
    evaluation.loss(base, TOKENIZER, CHATS)
    assert len(seen) > 1 and all(rows * tokens <= 100 for rows, tokens in seen)
    assert sum(rows for rows, _ in seen) == len(CHATS)


def test_a_template_without_marks_has_no_loss(base, monkeypatch):
    monkeypatch.setattr(losses, "tokenized", lambda chats, _: [{"input_ids": [1, 2, 3], "assistant_masks": [0] * 3}])
    with pytest.raises(ValueError, match=r"^chat 1: the chat template marks none of its tokens as the assistant's"):
        evaluation.loss(base, TOKENIZER, CHATS[:1])


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_mode_as_it_was(base, training):
    base.train(training)
    evaluation.loss(base, TOKENIZER, CHATS[:1])
    assert base.training is training
    base.eval()
