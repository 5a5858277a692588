"""Packing: what goes into which row, that it learns the same, and the traps in which a chat sees another in silence."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconH1Config, GPT2Config, LlamaConfig, MambaConfig, MistralConfig

from qlora_helpers.chats import tokenized
from qlora_helpers.models.loading import load_model
from qlora_helpers.settings import Settings
from qlora_helpers.training.packing import COMPARED, PackingCollator, check_packing, rows_for
from tests.support.short_runs import CHATS, CPU, SHORT, TOKENIZER, assert_learnt_the_same, run, trainer_of

ROWS = [{"input_ids": row["input_ids"]} for row in tokenized(CHATS, TOKENIZER)]
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
TINY = LlamaConfig(**SMALL, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def chats_of(*lengths):
    return [{"input_ids": torch.randint(1, 64, (length,)).tolist()} for length in lengths]


# ---- Which chat goes where


@pytest.mark.parametrize(
    ("lengths", "most", "rows"),
    [
        ([8], 8, [[0]]),
        ([5, 5, 5], 8, [[0], [1], [2]]),
        ([4, 4, 4], 8, [[0, 2], [1]]),
        ([6, 1, 1, 1, 1, 1], 8, [[0], [1, 2, 3, 4, 5]]),  # not 8 and 3
        ([4, 4, 3, 3, 2], 8, [[0, 1], [2, 3, 4]]),  # spread, a row would have 9
    ],
)
def test_chats_go_into_few_rows_of_nearly_the_same_length(lengths, most, rows):
    assert rows_for(lengths, most) == rows


def test_a_row_never_holds_more_than_it_may_and_every_chat_is_in_one():
    lengths = torch.randint(1, 257, (500,)).tolist()
    rows = rows_for(lengths, 256)
    assert sorted(place for row in rows for place in row) == list(range(500))
    assert max(sum(lengths[place] for place in row) for row in rows) <= 256
    assert len(rows) <= 1.05 * sum(lengths) / 256 + 1  # best-fit decreasing leaves little


def test_positions_begin_anew_and_nothing_predicts_a_first_token():
    batch = PackingCollator(pad_token_id=9, most=8)([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]


# ---- It learns the same


def test_each_token_has_the_loss_that_it_has_alone():
    model = load_model(hardware=CPU).eval()
    batch = PackingCollator(TOKENIZER.pad_token_id, 256)(ROWS)
    assert len(batch["input_ids"]) < len(ROWS) / 3
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits.log_softmax(-1)
        worst, seen = 0.0, 0
        for chat in ROWS:
            ids = torch.tensor([chat["input_ids"]])
            alone = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            at = _place_of(chat["input_ids"], batch)
            packed = logits[at[0], at[1] : at[1] + ids.shape[1] - 1].gather(1, ids[0, 1:, None])
            worst, seen = max(worst, (alone - packed).abs().max().item()), seen + 1
    assert seen == len(ROWS) and worst < 1e-4


def _place_of(ids, batch):
    for row, tokens in enumerate(batch["input_ids"].tolist()):
        for start in (batch["position_ids"][row] == 0).nonzero().flatten().tolist():
            if tokens[start : start + len(ids)] == ids:
                return row, start
    raise AssertionError("the chat is in no row")


@pytest.mark.parametrize("batch", [{"batch_size": 2, "accumulation": 4}, {"batch_size": 8, "accumulation": 1}])
def test_a_packed_run_has_the_losses_and_the_adapters_of_a_padded_one(batch, tmp_path):
    settings = replace(SHORT, dropout=0.0, save_steps=None, max_length=256, **batch)
    padded = run(tmp_path / "padded", settings)
    packed = run(tmp_path / "packed", replace(settings, packing=True))
    assert len(padded.step_losses) == len(packed.step_losses) == SHORT.steps
    assert_learnt_the_same(padded, packed)


def test_a_packed_step_takes_fewer_passes(tmp_path, monkeypatch):
    settings = Settings(steps=1, rank=4, max_length=256, batch_size=2, accumulation=8)
    passes = []
    for packing in (False, True):
        trainer = trainer_of(tmp_path, settings=replace(settings, packing=packing))
        seen = []
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        trainer.train()
        passes.append(seen)
    assert len(passes[0]) == 8
    assert len(passes[1]) <= 2 and all(rows <= 2 and tokens <= 256 for rows, tokens in passes[1])


def test_a_packed_run_is_resumed_to_the_last_bit(tmp_path):
    settings = replace(SHORT, packing=True, max_length=256, batch_size=2, accumulation=2)
    whole = run(tmp_path / "whole", settings)
    run(tmp_path / "parts", settings)
    for gone in ("adapter", "checkpoint-6"):
        for file in sorted((tmp_path / "parts" / gone).glob("*")):
            file.unlink()
        (tmp_path / "parts" / gone).rmdir()
    again = run(tmp_path / "parts", settings, resume=True)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- The traps


def test_with_a_cache_chats_see_each_other_in_silence():
    model, (first, second) = built(TINY), chats_of(9, 5)
    batch = PackingCollator(0, 16)([first, second])
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([second["input_ids"]])).logits
        exact = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        cached = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert (exact[:, 9:14] - alone).abs().max() < 1e-5
    assert (cached[:, 9:14] - alone).abs().max() > 0.01


def test_with_a_mask_of_two_dimensions_chats_see_each_other_in_silence():
    model, (first, second) = built(TINY), chats_of(9, 5)
    batch = PackingCollator(0, 16)([first, second])
    ones = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([second["input_ids"]])).logits
        masked = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=ones, use_cache=False
        ).logits
    assert (masked[:, 9:14] - alone).abs().max() > 0.01


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**SMALL, state_size=4),
        FalconH1Config(**SMALL, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, mamba_d_ssm=32,
                       mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_models_whose_layers_mix_tokens_are_refused(config):
    with pytest.raises(ValueError, match=r"packing=True: this model cannot be packed. A chat's logits change by"):
        check_packing(built(config), chats_of(9, 5, 12), pad_token_id=0)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        MistralConfig(**SMALL, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=4),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "sdpa_repeated_kv"])
def test_models_with_attention_alone_are_packed(config, attention):
    model = built(config)
    model.set_attn_implementation(attention)
    leaked, apart = check_packing(model.train(), chats_of(9, 5, 12), pad_token_id=0)
    assert leaked == 0 and apart < 1e-4
    assert model.training


def test_chats_as_long_as_the_learned_positions_are_packed():
    model = built(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=23))
    assert check_packing(model, chats_of(23, 23), pad_token_id=0)[0] == 0
    assert check_packing(model, chats_of(11, 12), pad_token_id=0)[0] == 0


def test_a_run_of_a_model_that_cannot_be_packed_is_refused_before_it_begins(tmp_path, monkeypatch):
    def other(model, chats, pad_token_id):
        raise ValueError("packing=True: no")

    monkeypatch.setattr("qlora_helpers.training.trainer.check_packing", other)
    with pytest.raises(ValueError, match="packing=True: no"):
        run(tmp_path, Settings(steps=1, packing=True))


def test_the_check_does_not_take_the_logits_of_long_chats():
    """Two chats of 1,024 tokens and a vocabulary of 150,000: their logits alone would be more than a gigabyte."""
    model, tokens = built(TINY), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    check_packing(model, chats_of(100, 90, 95), pad_token_id=0)
    assert max(tokens) == 2 * COMPARED < 90 + 95
