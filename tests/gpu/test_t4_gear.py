"""The t4 gear on real-size models, within a T4's memory and with only its attention kernels."""

import gc
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qlora_helpers.chats import read_chats
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train
from qlora_helpers.units import GIB

CHATS = read_chats(data_path("chats", "qlora", "train.jsonl"))
# the lesson's, except for the number of steps
LESSON = Settings(
    steps=4, batch_size=8, accumulation=2, learning_rate=2e-4, warmup_steps=1, dropout=0.05, max_length=512,
    gradient_checkpointing=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def empty_gpu():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("shape", ["Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Llama-3.1-8B"])
def test_a_real_size_trains_with_finite_losses_below_the_cap(shape, stand_ins, t4, tmp_path):
    from data.scripts.measure.t4_gear import CAP

    folder = stand_ins(shape)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    torch.cuda.reset_peak_memory_stats()
    run = train(model, tokenizer, CHATS, tmp_path, LESSON)
    peak = torch.cuda.max_memory_reserved()
    print(f"\n{shape}: peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB allocated, {peak / GIB:.2f} reserved")
    assert len(run.history) == 4 and all(math.isfinite(loss) for _, loss in run.history)
    assert run.skipped_steps != [1, 2, 3, 4]  # loss scaling has settled
    assert peak < CAP


class _Dtypes(TorchDispatchMode):
    """Collect the dtypes of all inputs and outputs of every operation, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for value in tree_flatten((args, kwargs, result))[0]:
            if isinstance(value, torch.Tensor):
                self.seen.setdefault(value.dtype, str(function))
        return result


def test_there_is_no_bfloat16_tensor_anywhere_in_the_steps(stand_ins, t4, tmp_path):
    folder = stand_ins("Qwen2.5-1.5B")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    from qlora_helpers.hardware import detect
    from qlora_helpers.training.trainer import build_trainer

    settings = Settings(steps=2, batch_size=2, max_length=512, gradient_checkpointing=True, dropout=0.05)
    trainer = build_trainer(model, tokenizer, CHATS, tmp_path, settings, detect())
    hooked = set()
    for module in trainer.model.modules():
        module.register_forward_hook(
            lambda module, inputs, output: hooked.update(
                t.dtype for t in tree_flatten((inputs, output))[0] if isinstance(t, torch.Tensor)
            )
        )
    with _Dtypes() as dtypes:
        trainer.train()
    assert torch.float16 in dtypes.seen and torch.float16 in hooked  # the mode and the hooks saw the step
    assert torch.bfloat16 not in dtypes.seen, dtypes.seen
    assert torch.bfloat16 not in hooked
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    others = {p.dtype for n, p in trainer.model.named_parameters() if "embed" in n or "lm_head" in n or "norm" in n}
    assert others == {torch.float16}  # no float32 copy


def test_8192_tokens_of_8b_fit_and_the_default_attention_finds_no_kernel(stand_ins, t4, tmp_path):
    from data.scripts.make import stand_in_models as stand_in

    folder = stand_ins("Llama-3.1-8B")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    chats = stand_in.chats(2, 8_192, tokenizer)
    settings = Settings(steps=2, batch_size=1, max_length=8_192, gradient_checkpointing=True)
    torch.cuda.reset_peak_memory_stats()
    run = train(model, tokenizer, chats, tmp_path, settings)
    print(f"\n8,192 tokens, no dropout: {torch.cuda.max_memory_allocated() / GIB:.2f} GiB")
    assert all(math.isfinite(loss) for _, loss in run.history)
    run.model.set_attn_implementation("sdpa")  # transformers' default: needs the math kernel here
    with pytest.raises(RuntimeError, match=r"No available kernel|Invalid backend"), torch.no_grad():
        run.model(input_ids=torch.zeros(1, 64, dtype=torch.long, device="cuda"))


def test_batches_with_padding_need_no_math_kernel_either(stand_ins, t4):
    folder = stand_ins("Qwen2.5-1.5B")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    batch = tokenizer(["What is NF4?", "What?"], padding=True, return_tensors="pt").to("cuda")
    alone = tokenizer("What?", return_tensors="pt").to("cuda")
    with torch.no_grad():
        padded, unpadded = model(**batch).logits[1, -1], model(**alone).logits[0, -1]
    assert torch.isfinite(padded).all()
    assert (padded - unpadded).abs().max() < 0.02 * unpadded.abs().max()
