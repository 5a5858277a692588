"""CUDA's autocast on tensors without values, against torch's own on the CPU and against the lists that torch is built from."""

import re
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qlora_helpers.memory.fake import autocast
from qlora_helpers.memory.fake.autocast import Autocast, autocast_is_on
from qlora_helpers.memory.fake.ledger import ALIVE, Ledger

BF16 = torch.bfloat16


@pytest.fixture
def cuda():
    """Autocast as on CUDA."""
    rules = Autocast()
    with ExitStack() as stack:
        for place, name, new in rules.changes():
            stack.enter_context(mock.patch.object(place, name, new))
        yield rules


def on_meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


PRODUCTS = {
    "linear": (lambda x, w: F.linear(x, w), (4, 8), (6, 8)),
    "linear with a bias": (lambda x, w: F.linear(x, w, bias=w[:, 0]), (4, 8), (6, 8)),
    "matmul": (lambda x, w: torch.matmul(x, w), (4, 8), (8, 6)),
    "@": (lambda x, w: x @ w, (4, 8), (8, 6)),
    "x.matmul": (lambda x, w: x.matmul(w), (4, 8), (8, 6)),
    "mm": (lambda x, w: torch.mm(x, w), (4, 8), (8, 6)),
    "bmm": (lambda x, w: torch.bmm(x, w), (2, 4, 8), (2, 8, 6)),
    "addmm": (lambda x, w: torch.addmm(x[:, :1], x, w), (4, 8), (8, 6)),
    "baddbmm": (lambda x, w: torch.baddbmm(x[:, :, :1], x, w), (2, 4, 8), (2, 8, 6)),
    "einsum": (lambda x, w: torch.einsum("ij,jk->ik", x, w), (4, 8), (8, 6)),
    "einsum of a list": (lambda x, w: torch.einsum("ij,jk->ik", [x, w]), (4, 8), (8, 6)),
    "conv1d": (lambda x, w: F.conv1d(x, w), (2, 8, 5), (6, 8, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("what", PRODUCTS)
def test_products_are_narrow_as_in_torchs_own_autocast(what, dtype, request):
    product, x_shape, w_shape = PRODUCTS[what]
    with torch.autocast("cpu", dtype=BF16):
        real = product(torch.ones(x_shape, dtype=dtype), torch.ones(w_shape))
    request.getfixturevalue("cuda")
    with torch.autocast("cuda", dtype=BF16):
        ours = product(on_meta(x_shape, dtype=dtype), on_meta(w_shape))
    assert (ours.dtype, ours.shape) == (real.dtype, real.shape) and real.dtype == BF16
    if dtype == torch.float32:
        assert product(on_meta(x_shape), on_meta(w_shape)).dtype == torch.float32  # outside


def lists_of_torch() -> dict[str, set[str]]:
    """The lists of functions that torch's autocast is built from."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    found = {}
    for name, body in re.findall(r"#define (AT_FORALL_\w+)\(_\)((?:.*\\\n)*.*)", header.read_text(encoding="utf-8")):
        found[name.removeprefix("AT_FORALL_")] = set(re.findall(r"_\((\w+)", body))
    return found


def test_the_functions_are_on_torchs_own_lists():
    lists = lists_of_torch()
    plain = {name.strip("_").replace("rmatmul", "matmul") for _, names in autocast._PRODUCTS for name in names}
    assert plain <= lists["LOWER_PRECISION_FP"]
    assert {name.strip("_") for name in autocast._IN_FLOAT32} <= lists["FP32"]
    assert {*autocast._INTO_FLOAT32, "softmax"} <= lists["FP32_SET_OPT_DTYPE"]
    assert {"softplus", "layer_norm", "rms_norm"} <= lists["FP32"]


WIDE = {
    "pow": lambda x: torch.pow(x, 3.0),
    "x.pow": lambda x: x.pow(2),
    "**": lambda x: x**2,
    "rsqrt": lambda x: x.rsqrt(),
    "exp": lambda x: torch.exp(x),
    "log": lambda x: torch.log(x),
    "softplus": lambda x: F.softplus(x),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "torch.softmax": lambda x: torch.softmax(x, -1),
    "x.softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (8,), x[0], x[0]),
    "rms_norm": lambda x: F.rms_norm(x, (8,), x[0]),
    "sum": lambda x: x.sum(-1),
    "cumsum": lambda x: torch.cumsum(x, -1),
}


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("what", WIDE)
def test_functions_of_the_float32_lists_give_float32_under_autocast_alone(what, dtype, cuda):
    x = on_meta(4, 8, dtype=dtype)
    function = WIDE[what]
    with torch.autocast("cuda", dtype=dtype):
        assert function(x).dtype == torch.float32
        assert function(on_meta(4, 8)).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert function(x).dtype == dtype
    assert function(x).dtype == dtype


def test_softmax_in_half_precision_is_one_kernel_and_in_bfloat16_a_copy_first(cuda):
    for dtype, sizes in ((torch.float16, [4_096]), (BF16, [4_096, 4_096])):
        x = on_meta(1, 1_024, dtype=dtype)
        with torch.autocast("cuda", dtype=dtype), Ledger() as ledger:
            F.softmax(x, dim=-1)
        assert ledger.sizes == sizes
        with Ledger() as ledger:
            assert F.softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float32  # a layer asks for it
        assert ledger.sizes == sizes


def made_by_two_products(weight, times=2):
    x = on_meta(2, 1_024, dtype=BF16)
    with Ledger() as ledger:
        with torch.autocast("cuda", dtype=BF16):
            for _ in range(times):
                torch.mm(x, weight)
            inside = [size for size, death in zip(ledger.sizes, ledger.deaths, strict=True) if death == ALIVE]
        kept_after = [size for size, death in zip(ledger.sizes, ledger.deaths, strict=True) if death == ALIVE]
    return ledger.sizes.count(2 * 1_024 * 1_024), inside, kept_after


def test_the_copy_of_a_trained_weight_is_made_once_and_kept_until_the_end(cuda):
    narrow = 2 * 1_024 * 1_024
    trained = torch.nn.Parameter(on_meta(1_024, 1_024))
    with torch.no_grad():
        assert made_by_two_products(trained) == (1, [narrow], [])
    frozen = torch.nn.Parameter(on_meta(1_024, 1_024), requires_grad=False)
    assert made_by_two_products(frozen) == (2, [], [])
    already_narrow = torch.nn.Parameter(on_meta(1_024, 1_024, dtype=BF16))
    with torch.no_grad():
        assert made_by_two_products(already_narrow) == (0, [], [])


def test_an_inner_autocast_ends_without_forgetting_the_outers_copies(cuda):
    weight, x = torch.nn.Parameter(on_meta(8, 8)), on_meta(2, 8)
    with torch.autocast("cuda", dtype=BF16):
        F.linear(x, weight)
        with torch.autocast("cuda", enabled=False):
            assert not autocast_is_on() and not torch.is_autocast_enabled("cuda")
            assert F.linear(x, weight).dtype == torch.float32
        assert autocast_is_on() and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == BF16
        assert len(cuda._copies) == 1
    assert not cuda._copies and not autocast_is_on()


def test_only_what_torch_casts_is_cast(cuda):
    with torch.autocast("cuda", dtype=BF16):
        assert cuda.cast(on_meta(2, dtype=torch.float64)).dtype == torch.float64
        assert cuda.cast(on_meta(2, dtype=torch.long)).dtype == torch.long
        assert cuda.cast("ij,jk->ik") == "ij,jk->ik"
        assert [x.dtype for x in cuda.cast([on_meta(2), on_meta(2)])] == [BF16, BF16]


def test_checkpointing_recomputes_under_the_autocast_of_the_forward_pass(cuda):
    dtypes = []

    def layer(x):
        out = F.linear(x, weight)
        dtypes.append(out.dtype)
        return F.linear(out, weight)

    weight, x = torch.nn.Parameter(on_meta(8, 8)), on_meta(2, 8, requires_grad=True)
    with torch.autocast("cuda", dtype=BF16):
        out = checkpoint(layer, x, use_reentrant=False).float().sum()
    out.backward()
    assert dtypes == [BF16, BF16]
    assert weight.grad.dtype == torch.float32
