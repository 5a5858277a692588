"""What autograd keeps for a backward pass."""

import torch

from qlora_helpers.memory.saved_for_backward import most_saved


def squares(times, keep):
    """Each keeps 4,000 bytes: the input, whose square is taken."""
    kept = []
    for _ in range(times):
        loss = (torch.ones(1000, requires_grad=True) * 2).square().sum()
        kept.append(loss if keep else loss.item())
    return len(kept)


def test_a_graph_that_is_held_grows_and_one_that_is_let_go_does_not():
    once = most_saved(squares, 1, True)
    assert once.result == 1 and once.most_bytes >= 4000
    assert most_saved(squares, 5, True).most_bytes >= 5 * 4000
    assert (
        most_saved(squares, 5, False).most_bytes <= once.most_bytes * 2
    )  # the next one is made before the last is gone


def test_an_operation_that_keeps_its_output_is_let_go_too():
    def sigmoids(times):
        for _ in range(times):
            torch.ones(1000, requires_grad=True).sigmoid()

    assert most_saved(sigmoids, 5).most_bytes == most_saved(sigmoids, 1).most_bytes == 4000


def test_without_gradients_nothing_is_kept():
    assert most_saved(torch.no_grad()(squares), 3, True).most_bytes == 0


def test_a_storage_counts_once():
    weight = torch.ones(1000, requires_grad=True)
    assert most_saved(lambda: weight.square() + weight.square()).most_bytes == 4000


def test_the_backward_pass_gets_back_what_was_kept():
    weight = torch.ones(3, requires_grad=True)
    most_saved(lambda: (weight**3).sum().backward())
    assert weight.grad.tolist() == [3, 3, 3]
