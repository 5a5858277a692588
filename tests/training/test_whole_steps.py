"""A step in parts, and made again with a safer choice when memory runs out."""

import contextlib
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from qlora_helpers.memory import find_gpu, find_shape
from qlora_helpers.memory.budget import plan_for
from qlora_helpers.models.loading import load_model
from qlora_helpers.settings import Settings
from qlora_helpers.training import budget
from qlora_helpers.training import trainer as trainer_module
from qlora_helpers.training.trainer import build_trainer
from qlora_helpers.training.whole_steps import ROW_ENDS, ShareOfStep, WithRowEnds, safer, split
from qlora_helpers.units import GIB
from tests.support.short_runs import CHATS, CPU, SHORT, TOKENIZER, assert_learnt_the_same, run, trainer_of


def collate(lengths):
    ids = torch.arange(1, 6 * len(lengths) + 1).reshape(len(lengths), 6)
    mask = torch.tensor([[1] * length + [0] * (6 - length) for length in lengths])
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def test_a_step_is_split_into_rows_of_a_length_without_their_padding():
    batch = WithRowEnds(collate, keep_mask=True)([6, 3, 4, 1, 3])
    assert batch[ROW_ENDS] == [6, 3, 4, 1, 3]
    parts = list(split(batch, 2))
    assert [tuple(part["input_ids"].shape) for part in parts] == [(2, 6), (2, 3), (1, 1)]
    assert torch.equal(parts[0]["labels"], batch["labels"][[0, 2]])
    assert torch.equal(parts[1]["attention_mask"], batch["attention_mask"][[1, 4], :3])
    assert [len(part["labels"]) for part in split(batch, 4)] == [3, 2]
    assert all(ROW_ENDS not in part for part in parts)
    assert WithRowEnds(collate)([6, 1]).keys() == {"input_ids", "labels", ROW_ENDS}


def test_each_safer_choice_learns_the_same_from_fewer_bytes():
    settings, seen = Settings(batch_size=6, accumulation=2, max_length=512), []
    while found := safer(settings):
        settings, words = found
        seen.append(words)
        assert settings.batch_size * settings.accumulation >= 12
    assert seen == ["batch_size=3", "batch_size=1", "all layers checkpointed", "activation_offloading=True"]


PLAN = plan_for(
    find_shape(load_model(hardware=CPU).config), replace(SHORT, dropout=0.0, save_steps=None), find_gpu("t4"), 4 * GIB
)


@pytest.fixture
def planned(monkeypatch):
    """Runs on this CPU as if they had been planned for a GPU; the function makes its steps fail."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(trainer_module, "plan_of", lambda *_: PLAN)
    monkeypatch.setattr(trainer_module, "kept_within", lambda plan: contextlib.nullcontext())

    def fail(when):
        plain = trainer_module._Trainer.compute_loss

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = plain(self, model, inputs, *args, **kwargs)
            if self.model.training and when(self, inputs):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB\nmore")
            return loss

        monkeypatch.setattr(trainer_module._Trainer, "compute_loss", compute_loss)

    return fail


def test_a_step_that_runs_out_of_memory_is_made_again_with_less(planned, tmp_path, capsys):
    settings = replace(SHORT, dropout=0.0, save_steps=None, memory_budget="auto")
    plain = run(tmp_path / "plain", replace(settings, memory_budget=None))
    calls = []

    def second_part_of_the_second_step(trainer, inputs):
        calls.append(len(inputs["input_ids"]))
        return trainer.state.global_step == 1 and len(inputs["input_ids"]) > 1

    planned(second_part_of_the_second_step)
    budgeted = run(tmp_path / "budgeted", settings)
    said = capsys.readouterr().out
    assert "Out of GPU memory in step 2: it is made again with batch_size=2. (CUDA out of memory." in said
    assert "Out of GPU memory in step 2: it is made again with batch_size=1." in said
    assert calls[:3] == [4, 4, 2] and set(calls[3:]) == {1}
    assert_learnt_the_same(plain, budgeted)


def test_a_run_that_runs_out_later_says_so(planned, tmp_path, monkeypatch):
    planned(lambda trainer, inputs: trainer.state.global_step >= 3)
    monkeypatch.setattr(trainer_module, "FIRST_STEPS", 2)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path / "run", replace(SHORT, save_steps=None, memory_budget="auto"))


def test_on_a_cpu_a_budget_changes_nothing_and_says_so(tmp_path, capsys):
    settings = replace(SHORT, dropout=0.0, save_steps=None, batch_size=2, accumulation=2)
    plain = run(tmp_path / "plain", settings)
    budgeted = run(tmp_path / "budgeted", replace(settings, memory_budget="16GiB"))
    assert "memory_budget: there is no GPU whose memory could be used" in capsys.readouterr().out
    assert_learnt_the_same(plain, budgeted)


def test_a_run_is_held_to_its_budget_and_a_limit_from_before_stays(monkeypatch):
    """On a card of 16 GiB, of which this process may use half by a limit of its own."""
    limits = [0.5]
    for name, found in {
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "mem_get_info": (15 * GIB, 16 * GIB),
        "memory_reserved": GIB // 2,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: limits[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for_tensors = 4 * GIB - PLAN.context_bytes
    with budget.kept_within(PLAN):
        assert limits[-1] == for_tensors / (16 * GIB)
        assert budget.free_for_a_run(find_gpu("t4")) == for_tensors + find_gpu("t4").context_bytes
    assert limits[-1] == 0.5
    with budget.kept_within(None):
        assert limits[-1] == 0.5


def test_a_budget_beyond_what_is_free_is_planned_for_what_is_free(monkeypatch, capsys):
    gpu, asked = find_gpu("t4"), []
    monkeypatch.setattr(budget, "measured_gpu", lambda *_: gpu)
    monkeypatch.setattr(budget, "free_for_a_run", lambda gpu: 6 * GIB)
    monkeypatch.setattr(budget, "shape_of", lambda model: None)
    monkeypatch.setattr(budget, "plan_for", lambda shape, settings, gpu, budget: asked.append(budget))
    hardware = replace(CPU, gear="t4")
    for wanted, words in (("8GiB", "only 6.00 GiB of the GPU's memory are free now"), ("5GiB", None), ("auto", None)):
        budget.plan_of(None, replace(SHORT, memory_budget=wanted), hardware)
        said = capsys.readouterr().out
        assert words in said if words else "free now" not in said
    assert asked == [6 * GIB, 5 * GIB, 6 * GIB]


def planned_as(monkeypatch, rows, passes):
    """Runs on this CPU as if a budget had split their steps so."""
    chosen = replace(PLAN.chosen, settings=replace(PLAN.chosen.settings, batch_size=rows, accumulation=passes))
    monkeypatch.setattr(trainer_module, "plan_of", lambda *_: replace(PLAN, chosen=chosen))
    monkeypatch.setattr(trainer_module, "kept_within", lambda plan: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)


def test_a_step_has_the_chats_that_were_asked_for_however_it_is_split(monkeypatch, tmp_path):
    planned_as(monkeypatch, rows=3, passes=2)  # of 4 chats
    trainer = trainer_of(tmp_path, settings=replace(SHORT, memory_budget="auto"))
    assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 4


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("options", [{"memory_budget": "auto"}, {"packing": True, "max_length": 48}])
def test_the_loss_of_a_step_does_not_depend_on_its_parts(accepts, options, monkeypatch, tmp_path):
    """Some models, such as Gemma 3, say that they take no number of tokens for a loss of their own."""
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", accepts, raising=False)
    settings = replace(SHORT, dropout=0.0, save_steps=None, batch_size=1, accumulation=4)
    plain = run(tmp_path / "plain", replace(settings, batch_size=4, accumulation=1))
    assert_learnt_the_same(plain, run(tmp_path / "accumulated", settings))
    assert_learnt_the_same(plain, run(tmp_path / "parts", replace(settings, **options)))


def test_the_loss_of_the_experts_router_counts_once(tmp_path):
    config = MixtralConfig(
        vocab_size=TOKENIZER.vocab_size + 64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
        router_aux_loss_coef=1.0, max_position_embeddings=128,
    )  # fmt: skip
    losses = []
    for options in ({"batch_size": 4}, {"accumulation": 4}, {"accumulation": 4, "memory_budget": "auto"}):
        torch.manual_seed(0)
        settings = Settings(**{"method": "full", "steps": 1, "batch_size": 1, "max_length": 64} | options)
        trainer = build_trainer(MixtralForCausalLM(config), TOKENIZER, CHATS, tmp_path, settings, CPU)
        trainer.train()
        losses.append(trainer.step_losses[0][1].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02) == losses[2]


def test_a_resumed_run_can_fall_back_too(planned, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer_module, "FIRST_STEPS", 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    planned(lambda trainer, inputs: len(inputs["input_ids"]) > 2)
    settings = replace(SHORT, memory_budget="auto")
    run(tmp_path / "run", settings)
    for gone in ("adapter", "checkpoint-6"):
        shutil.rmtree(tmp_path / "run" / gone)
    capsys.readouterr()
    run(tmp_path / "run", settings, resume=True)
    assert "Out of GPU memory in step 4: it is made again with batch_size=2." in capsys.readouterr().out


# ---- Several processes


def test_the_shares_of_the_processes_are_the_step_and_alike_in_length():
    chats = [
        {"input_ids": [number] * length, "labels": [number] * length}
        for number, length in enumerate((3, 9, 5, 7, 1, 8))
    ]
    shares = [ShareOfStep(lambda share: {"share": list(share)}, rank, 3)(chats)["share"] for rank in range(3)]
    assert sorted((len(chat["input_ids"]) for share in shares for chat in share), reverse=True) == [9, 8, 7, 5, 3, 1]
    assert [[len(chat["input_ids"]) for chat in share] for share in shares] == [[9, 5], [8, 3], [7, 1]]


def test_a_process_without_a_share_computes_without_a_loss():
    chats = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]

    def collator(share):
        return {name: torch.tensor([chat[name] for chat in share]) for name in ("input_ids", "labels")}

    assert (ShareOfStep(collator, 0, 2)(chats)["labels"] == torch.tensor([[-100, 6, 7]])).all()
    idle = ShareOfStep(collator, 1, 2)(chats)
    assert (idle["labels"] == -100).all() and (idle["input_ids"] == torch.tensor([[5, 6, 7]])).all()
    assert (collator(chats)["labels"] != -100).any()  # what was given is unchanged
