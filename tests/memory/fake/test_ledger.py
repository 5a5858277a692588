"""The ledger against real tensors and autograd's own rules."""

import pytest
import torch
import torch.nn.functional as F

from qlora_helpers.memory.fake.ledger import ALIVE, Ledger


def on_meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def test_a_storage_is_noted_once_in_whole_blocks_and_when_it_comes_and_goes():
    with Ledger() as ledger:
        first = on_meta(1_000)
        second = first.view(10, 100)[2:]  # the same memory
        third = on_meta(1, dtype=torch.uint8)
        assert (ledger.sizes, ledger.deaths) == ([4_096, 512], [ALIVE, ALIVE])
        del first
        assert ledger.deaths == [ALIVE, ALIVE]  # the view holds it
        del second
        assert ledger.births[0] < ledger.births[1] < ledger.deaths[0] < ledger.deaths[1] == ALIVE
        del third
    assert ledger.deaths[1] > ledger.deaths[0]


def test_memory_whose_address_is_used_again_is_another_entry():
    with Ledger() as ledger:
        for _ in range(50):
            on_meta(256)
    assert len(ledger.sizes) == 50 and all(
        birth < death < ALIVE for birth, death in zip(ledger.births, ledger.deaths, strict=True)
    )


def test_all_parts_of_a_result_are_noted():
    with Ledger() as ledger:
        kept = torch.native_dropout(on_meta(1_024), 0.5, True)
    assert ledger.sizes == [4_096, 4_096, 1_024] and ledger.deaths[1:] == [ALIVE, ALIVE]
    del kept
    assert ALIVE not in ledger.deaths


def test_kinds_are_those_of_the_innermost():
    with Ledger() as ledger:
        on_meta(1)
        with ledger.kind("outer"):
            on_meta(1)
            with pytest.raises(ZeroDivisionError), ledger.kind("inner"):
                on_meta(1)
                raise ZeroDivisionError
            on_meta(1)
        on_meta(1)
    assert ledger.kinds == [None, "outer", "inner", "outer", None]


def test_a_mark_is_a_moment_of_its_own_or_that_of_the_next_piece_of_memory():
    with Ledger() as ledger:
        first = on_meta(1)
        ledger.mark("now")
        ledger.mark("with the next", with_next=True)
        del first
        assert [name for _, name in ledger.marks] == ["now"]
        second = on_meta(1)
    (now, _), (then, name) = ledger.marks
    assert name == "with the next"
    assert ledger.births[0] < now < ledger.deaths[0] < then < ledger.births[1]
    del second


def test_what_a_kernel_takes_for_itself_is_there_all_at_once_and_gone():
    ledger = Ledger()
    ledger.brief((1, 1_000))
    assert ledger.sizes == [512, 1_024]
    assert max(ledger.births) < min(ledger.deaths) < ALIVE


def inside(function, *operands):
    """What the kernels of a function and of its backward pass take for themselves."""
    with Ledger() as ledger:
        before = []
        note = ledger.brief
        ledger.brief = lambda sizes: (before.append(sizes), note(sizes))
        out = function(*operands)
        assert not before
        out.backward(torch.empty_like(out))
    return before


def test_the_backward_kernels_that_take_more_than_they_give():
    x = on_meta(2, 8, 64, requires_grad=True)
    assert inside(lambda x: F.softmax(x, -1), x) == [(2 * 8 * 64 * 4,)]
    q = on_meta(1, 8, 200, 72, dtype=torch.bfloat16, requires_grad=True)
    k, v = (on_meta(1, 2, 200, 72, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    rows = 8 * 256  # of 128 tokens
    gradients = 8 * 200 * 72 * 2  # one per query head for keys and values each: they are summed up afterwards

    def flash(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    assert inside(flash, q, k, v) == [(rows * 4, rows * 96 * 4, gradients, gradients)]
    alike = (on_meta(1, 8, 200, 72, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    assert inside(flash, q, *alike) == [(rows * 4, rows * 96 * 4)]

    def efficient(q, k, v):
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]

    alike = (on_meta(1, 8, 200, 72, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    assert inside(efficient, q, *alike) == [(8 * 200 * 4,)]


# ---- Sums of gradients


class _Gives(torch.autograd.Function):
    """Its gradient is a new tensor, which somebody else may hold, too."""

    @staticmethod
    def forward(ctx, x, held, made):
        ctx.held, ctx.made = held, made
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        new = torch.empty_like(gradient)
        ctx.made.append(new.data_ptr())
        ctx.held and ctx.held[0].append(new)
        return new, None, None


def sum_of_two(device, first_held, second_held):
    """Backpropagate two gradients into one tensor; returns addresses of the two, and of their sum."""
    held, made, summed = [], [], []
    x = torch.ones(1_000, device=device, requires_grad=True)
    middle = x * 1
    middle.register_hook(lambda gradient: summed.append(gradient.data_ptr()))
    second = _Gives.apply(middle, [held] if second_held else None, made)
    first = _Gives.apply(middle, [held] if first_held else None, made)  # the last function goes back first
    (first + second).sum().backward()
    return made, summed[0]


@pytest.mark.parametrize("first_held", [False, True])
@pytest.mark.parametrize("second_held", [False, True])
def test_a_second_gradient_is_added_in_place_exactly_where_autograd_does_it(first_held, second_held):
    made, summed = sum_of_two("cpu", first_held, second_held)
    in_place = summed in made
    assert in_place == (not first_held)  # autograd's rule
    with Ledger() as ledger:
        ledger.in_backward = True
        sum_of_two("meta", first_held, second_held)
    assert (0 in ledger.sizes) == in_place
    assert ALIVE not in ledger.deaths


def test_other_sums_take_memory_of_their_own():
    with Ledger() as ledger:
        a, b = on_meta(1_000), on_meta(1_000)
        total = a + b  # in a forward pass
        del a
        ledger.in_backward = True
        with torch.no_grad():
            wide = on_meta(1, 1_000)
            other = wide + on_meta(1_000, 1)  # of other shapes
            del wide
    assert 0 not in ledger.sizes
    del b, total, other
