"""The tape counts what is alive as torch's allocator does, and keeps what autograd would keep."""

import pytest

from qlora_helpers.memory.tape import BLOCK, Tape, rounded


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 512), (512, 512), (513, 1_024), (1_024.5, 1_024)])
def test_requests_are_rounded_up_to_blocks(size, taken):
    assert rounded(size) == taken and taken % BLOCK == 0


def test_memory_is_counted_until_its_last_reference():
    tape = Tape()
    first = tape.new(1_024, 2)
    part = first.view(10)
    second = tape.new(512, 4, "tile")
    assert (tape.live, tape.peak, tape.peak_of) == (4_096, 4_096, {"tile": 2_048})
    assert (first.view().elements, part.elements, part.width, part.buffer) == (1_024, 10, 2, first.buffer)
    del first, second
    assert (tape.live, tape.live_of) == (2_048, {"tile": 0})
    del part
    assert (tape.live, tape.peak, tape.peak_of) == (0, 4_096, {"tile": 2_048})


def test_a_peak_remembers_what_there_was_of_each_kind_and_can_begin_again():
    tape = Tape()
    tile = tape.new(512, 1, "tile")
    more = tape.new(512, 1, "tile")
    del more
    held = tape.new(1_024, 1)
    assert (tape.peak, tape.peak_of) == (1_536, {"tile": 512})
    tape.forget_peak()
    same = tape.new(0, 1)
    assert (tape.peak, tape.peak_of) == (1_536, {"tile": 512})
    del tile, same
    more = tape.new(2_048, 1)
    assert (tape.peak, tape.peak_of) == (3_072, {"tile": 0})
    del held, more


def test_a_peak_of_equal_size_keeps_the_kinds_of_the_first():
    tape = Tape()
    tile = tape.new(512, 1, "tile")
    del tile
    plain = tape.new(512, 1)
    assert (tape.peak, tape.peak_of) == (512, {"tile": 512})
    del plain


def test_what_the_backward_pass_needs_stays_until_it_is_done():
    tape, seen = Tape(), []
    x = tape.source(512, 4)

    def backward(gradient, saved=x):
        seen.append((gradient.elements, tape.live))
        return (tape.new(512, 4),)

    y = tape.apply(256, 4, (x,), backward)
    del x, backward
    last = y.node
    del y
    assert tape.live == 2_048  # x is saved, y is not
    tape.backward(last, tape.new(256, 4))
    assert seen == [(256, 2_048 + 1_024)] and tape.live == 0 and tape.nodes == []


def test_an_operation_without_gradients_is_not_recorded_unless_its_weights_are_trained():
    tape = Tape()
    x = tape.new(512, 1)
    assert tape.apply(512, 1, (x,), lambda g: (g,)).node is None and tape.nodes == []
    kept = tape.new(512, 2)

    def backward(gradient):
        tape.keep_weight_gradient(tape.new(512, 4))
        return (None,)

    y = tape.with_weights(512, 1, (x,), backward)
    assert y.node.inputs == (None,) and tape.nodes == [y.node]
    tape.backward(y.node, kept)
    assert [gradient.buffer.size for gradient in tape.weight_gradients] == [2_048]


def test_a_second_gradient_of_a_tensor_is_added_in_place():
    tape, arrived = Tape(), []
    x = tape.source(512, 1)
    y = tape.apply(512, 1, (x,), lambda g: (arrived.append(g.buffer.size),) and (None,))
    twice = tape.apply(512, 1, (y, y), lambda g: (tape.new(512, 1), tape.new(1_024, 1)))
    tape.backward(twice.node, tape.new(512, 1))
    assert arrived == [512]  # the first, into which the second was added


def test_a_gradient_that_no_operation_asks_for_is_dropped():
    tape, passed = Tape(), []
    x, other = tape.source(512, 1), tape.new(512, 1)
    used = tape.apply(512, 1, (x, other), lambda g: passed.append("used") or (None, tape.new(512, 1)))
    tape.apply(512, 1, (x,), lambda g: passed.append("unused") or (None,))
    tape.backward(used.node, tape.new(512, 1))
    assert passed == ["used"]
