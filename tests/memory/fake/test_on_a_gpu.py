"""What is replaced while a step runs: the kernels that torch picks on a GPU, and that all is put back."""

import inspect
from threading import Event, Thread
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.models.qwen3_moe import modeling_qwen3_moe
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from qlora_helpers.memory.fake.ledger import ALIVE, Ledger
from qlora_helpers.memory.fake.on_a_gpu import fused_head, on_a_gpu
from qlora_helpers.memory.layers import TILE

NO_FAMILY = ModuleType("a family without experts")


def on_meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def gpu(kernel="sdpa", capability=(9, 0), family=NO_FAMILY, routed_layers=0, ledger=None):
    return on_a_gpu(ledger or Ledger(), kernel, capability, family, routed_layers)


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append((function.overloadpacket.__name__, args))
        return function(*args, **(kwargs or {}))


def attention(how, shared=False, heads=(4, 4), head=64, of_values=None, dtype=torch.bfloat16, mask=None, **options):
    """The operations of an attention, and its result."""
    q, k, v = (
        on_meta(1, h, 16, d, dtype=dtype)
        for h, d in zip((heads[0], heads[1], heads[1]), (head, head, of_values or head), strict=True)
    )
    with how, _Operations() as operations:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared, **options)
    return operations.called, out


FLASH, EFFICIENT, MATH = "flash", "efficient", "math"
# the rules of torch (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)
KERNELS = [
    (FLASH, {}, {}),
    (FLASH, {}, {"dtype": torch.float16, "is_causal": True}),
    (FLASH, {"capability": (8, 0)}, {}),
    (EFFICIENT, {"capability": (7, 5)}, {"dtype": torch.float16}),  # check_sm_version: FlashAttention begins at 8.0
    (EFFICIENT, {}, {"dtype": torch.float32}),  # check_tensor_dtype
    (EFFICIENT, {}, {"mask": on_meta(1, 1, 16, 16, dtype=torch.bool)}),  # check_for_attn_mask
    (FLASH, {}, {"head": 256}),  # check_head_dim_size_flash ...
    (EFFICIENT, {}, {"head": 264}),
    (EFFICIENT, {}, {"head": 96, "of_values": 64}),  # ... and of one size
    (FLASH, {}, {"heads": (4, 2), "shared": True}),  # check_batch_size_and_num_heads_dense ...
    (MATH, {}, {"heads": (4, 2), "shared": True, "dtype": torch.float32}),  # ... the other kernel has none shared
    (MATH, {"capability": (7, 5)}, {"heads": (4, 2), "shared": True, "dtype": torch.float16}),
    (MATH, {}, {"heads": (4, 2), "shared": True, "mask": on_meta(1, 1, 16, 16, dtype=torch.bool)}),
    (MATH, {"kernel": "math"}, {}),
]


@pytest.mark.parametrize(("kernel", "card", "of"), KERNELS)
def test_attention_runs_in_the_kernel_that_torch_picks(kernel, card, of):
    called, out = attention(gpu(**card), **of)
    names = {name for name, _ in called}
    fused = {FLASH: "_scaled_dot_product_flash_attention", EFFICIENT: "_scaled_dot_product_efficient_attention"}
    expected = {fused[kernel]} if kernel in fused else set()
    assert names & set(fused.values()) == expected
    assert ("_softmax" in names or "_safe_softmax" in names) == (kernel == MATH)
    heads, head = of.get("heads", (4, 4))[0], of.get("of_values") or of.get("head", 64)
    assert (out.shape, out.dtype) == ((1, heads, 16, head), of.get("dtype", torch.bfloat16))


def test_a_mask_of_booleans_is_made_a_bias_for_all_heads():
    called, _ = attention(gpu(), mask=on_meta(1, 1, 16, 16, dtype=torch.bool))
    bias = next(args for name, args in called if "efficient" in name)[3]
    assert bias.dtype == torch.bfloat16 and bias.shape == (1, 4, 16, 16)
    assert bias.untyped_storage().nbytes() == 2 * 16 * 16  # the heads share it


def test_attention_is_narrow_under_autocast():
    with gpu(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = on_meta(1, 4, 16, 64)
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert F.scaled_dot_product_attention(x, x, x).dtype == torch.float32


def test_dropout_keeps_a_mask_of_one_byte_and_takes_nothing_in_evaluation():
    x = on_meta(4_096, requires_grad=True)
    with gpu(), Ledger() as ledger:
        out = F.dropout(x, 0.1, True)
        assert ledger.sizes == [4 * 4_096, 4_096] and ledger.deaths == [ALIVE, ALIVE]
        F.dropout(x, 0.1, False)
        F.dropout(x, 0.0, True)
    assert len(ledger.sizes) == 2
    del out


@pytest.mark.parametrize("trained", [False, True])
def test_the_product_with_experts_gives_what_torchs_own_gives(trained):
    def run(device):
        tokens = torch.ones(32, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
        weights = torch.ones(4, 16, 24, dtype=torch.bfloat16, device=device, requires_grad=trained)
        ends = torch.tensor([8, 16, 24, 32], dtype=torch.int32).to(device)
        out = torch._grouped_mm(tokens, weights, offs=ends)
        out.backward(torch.ones_like(out))
        return [None if x is None else (x.shape, x.dtype) for x in (out, tokens.grad, weights.grad)]

    expected = run("cpu")
    with gpu():
        assert run("meta") == expected
    assert (expected[2] is None) == (not trained)


def test_frozen_experts_keep_no_tokens_for_their_gradients():
    weights = on_meta(4, 16, 24, dtype=torch.float16)
    for trained, kept in ((False, 0), (True, 1)):
        weights.requires_grad_(trained)
        with gpu(), Ledger() as ledger:
            tokens = on_meta(1_024, 16, dtype=torch.float16).requires_grad_(True)
            out = torch._grouped_mm(tokens * 1, weights)
            alive = [size for size, death in zip(ledger.sizes, ledger.deaths, strict=True) if death == ALIVE]
            assert alive.count(2 * 1_024 * 16) == 1 + kept
        del out


def test_a_full_batch_needs_no_mask():
    with gpu():
        assert masking_utils._ignore_causal_mask_sdpa(on_meta(2, 16, dtype=torch.bool), 16, 16, 0, 0)


def test_the_balancing_loss_sees_the_routers_of_all_layers(monkeypatch):
    seen = []
    monkeypatch.setattr(modeling_qwen3_moe, "load_balancing_loss_func", lambda logits, *args: seen.append(logits))
    with gpu(family=modeling_qwen3_moe, routed_layers=7):
        modeling_qwen3_moe.load_balancing_loss_func(("first", "between", "last"), 8)
        modeling_qwen3_moe.load_balancing_loss_func(None)
    assert len(seen[0]) == 7 and set(seen[0]) == {"first", "between", "last"} and seen[1] is None


def test_tiles_of_logits_are_a_kind_of_their_own():
    ledger = Ledger()
    with gpu(ledger=ledger), ledger:
        chunked_logprob.torch.empty(8, device="meta")
        torch.empty(8, device="meta")
        assert chunked_logprob.torch.float32 is torch.float32
    assert ledger.kinds == [TILE, None]


def test_an_output_head_that_is_not_known_is_refused(monkeypatch):
    assert inspect.isfunction(fused_head())

    def add_fused_lm_head(model, outputs):
        return model

    monkeypatch.setattr(trl_utils, "add_fused_lm_head", add_fused_lm_head)
    with pytest.raises(RuntimeError, match="another fused output head"):
        fused_head()


# ---- Everything is put back

PLACES = (torch, F, torch.Tensor, masking_utils, chunked_logprob, modeling_qwen3_moe)


def what_is_there():
    return [dict(vars(place)) for place in PLACES]


def changed(before):
    return [
        {name for name, value in vars(place).items() if was.get(name) is not value} | (set(was) - set(vars(place)))
        for place, was in zip(PLACES, before, strict=True)
    ]


def test_everything_is_put_back_also_after_an_error():
    before = what_is_there()
    with gpu(family=modeling_qwen3_moe):
        inside = changed(before)
    assert all(inside) and {"autocast", "matmul"} <= inside[0] and "linear" in inside[1]
    assert not any(changed(before))
    with pytest.raises(ZeroDivisionError), gpu(family=modeling_qwen3_moe):
        raise ZeroDivisionError
    assert not any(changed(before))


def test_one_thread_at_a_time_replaces_them():
    """Otherwise the first to leave would put back what the second then undoes."""
    before = what_is_there()
    entered, leave = Event(), Event()

    def other():
        with gpu(family=modeling_qwen3_moe):
            entered.set()

    thread = Thread(target=other)
    with gpu(family=modeling_qwen3_moe):
        thread.start()
        assert not entered.wait(0.2)
        leave.set()
    thread.join(10)
    assert entered.is_set() and not any(changed(before))
