"""torch's allocator, simulated: every rule with a case that was computed by hand."""

import random
from itertools import count

import pytest

from qlora_helpers.memory.allocator import CachingAllocator, replay
from qlora_helpers.units import KIB, MIB


def held(allocator):
    return allocator.allocated, allocator.reserved


# Sizes


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest of the small pool
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # rounded up first: no longer below 10 MiB
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB is left, which is not more than 1 MiB: the request gets all of it
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # 1 MiB and 512 bytes are left, a block of their own
        (300 * MIB + 1, 302 * MIB - (2 * MIB - 512), 302 * MIB),
    ],
)
def test_one_request(size, allocated, reserved):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert held(allocator) == (allocated, reserved)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (allocated, reserved)
    allocator.free(0)
    assert held(allocator) == (0, reserved)
    allocator.empty_cache()
    assert held(allocator) == (0, 0)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (allocated, reserved)
    allocator.reset_peaks()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (0, 0)


def test_requests_share_a_segment_while_they_fit():
    small = replay([512 * KIB] * 4)
    assert held(small) == (2 * MIB, 2 * MIB)
    small.allocate(1)
    assert small.reserved == 4 * MIB
    large = replay([9 * MIB, 9 * MIB])  # 20 MiB take two of them, and 2 MiB are left
    assert large.reserved == 20 * MIB
    large.allocate(2 * MIB)
    assert held(large) == (20 * MIB, 20 * MIB)
    large.allocate(2 * MIB)
    assert large.reserved == 40 * MIB


def test_the_pools_lend_each_other_nothing():
    allocator = replay([40 * MIB, ~0, 1024])
    assert held(allocator) == (1024, 42 * MIB)
    allocator.free(1)
    allocator.allocate(2 * MIB)  # the small segment, of which all is free, would be large enough
    assert held(allocator) == (2 * MIB, 42 * MIB)


# Which block, and what is left of it


def test_the_smallest_block_that_is_large_enough_serves():
    # Segments of 40, 12 and 30 MiB are free. 11.5 MiB take the one of 12; 25 the one of 30, of which 5 are left;
    # 4 MiB those 5, whole, since only 1 MiB would be left; and 39 the one of 40.
    allocator = replay([40 * MIB, 12 * MIB, 30 * MIB, ~0, ~1, ~2])
    assert held(allocator) == (0, 82 * MIB)
    for size, allocated in ((11 * MIB + 512 * KIB, 12), (25 * MIB, 37), (4 * MIB, 42), (39 * MIB, 82)):
        allocator.allocate(size)
        assert held(allocator) == (allocated * MIB, 82 * MIB)
    allocator.allocate(2 * MIB)
    assert allocator.reserved == 102 * MIB


def test_a_small_rest_is_lost_for_a_large_request_and_kept_for_a_small_one():
    large = replay([20 * MIB, ~0, 19 * MIB])
    assert held(large) == (20 * MIB, 20 * MIB)
    small = replay([MIB - 512, 512, MIB])
    assert held(small) == (2 * MIB, 2 * MIB)


def test_of_equal_blocks_the_one_at_the_lowest_address_serves():
    # Segments of 30 and 40 MiB, of which 20 and 30 are in use: both have 10 free. When the next 10 are taken and the 20
    # and 30 freed, a request of 40 fits if the 10 were taken from the first segment, where it lies lower; else the first
    # has 30, and the second gave its 10.
    begun = [30 * MIB, 40 * MIB, ~0, ~1, 20 * MIB, 30 * MIB]

    def fits(size, **where):
        allocator = replay([*begun, 10 * MIB, ~2, ~3, size], CachingAllocator(**where))
        return allocator.reserved == 70 * MIB

    ascending = {"addresses": count(2**46, 2**30)}
    assert fits(40 * MIB, **ascending) and not fits(41 * MIB, **ascending)
    for descending in ({}, {"addresses": count(2**46, -(2**30))}):  # by default they descend, as on an H200
        assert fits(30 * MIB, **descending) and not fits(40 * MIB, **descending)


# Freed memory


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_free_neighbours_merge_in_any_order(order):
    allocator = replay([8 * MIB, 8 * MIB, 4 * MIB, *(~n for n in order)])
    assert held(allocator) == (0, 20 * MIB)
    allocator.allocate(20 * MIB)
    assert held(allocator) == (20 * MIB, 20 * MIB)


def test_what_lies_between_two_blocks_in_use_is_a_hole():
    allocator = replay([8 * MIB, 8 * MIB, 4 * MIB, ~1])
    allocator.allocate(9 * MIB)
    assert held(allocator) == (21 * MIB, 40 * MIB)
    allocator.allocate(7 * MIB)  # fits into the hole, all of which it gets
    assert held(allocator) == (29 * MIB, 40 * MIB)


def test_segments_do_not_merge():
    allocator = replay([10 * MIB, 10 * MIB, ~0, ~1, 20 * MIB])
    assert held(allocator) == (20 * MIB, 40 * MIB)


def test_only_segments_that_are_wholly_free_go_back_to_the_card():
    allocator = replay([8 * MIB, 8 * MIB, 32 * MIB, 1024, 1024, ~1, ~2, ~4])
    assert held(allocator) == (8 * MIB + 1024, 54 * MIB)
    allocator.empty_cache()
    assert held(allocator) == (8 * MIB + 1024, 22 * MIB)
    allocator.allocate(12 * MIB)  # what was free beside the block in use is still there
    assert allocator.reserved == 22 * MIB


# Out of memory


def test_with_a_limit_cached_segments_go_back_and_the_request_is_tried_again():
    allocator = replay([40 * MIB, 40 * MIB, 1024, ~0, ~2], CachingAllocator(limit=100 * MIB))
    assert held(allocator) == (40 * MIB, 82 * MIB)
    allocator.allocate(50 * MIB)  # 40 and 2 MiB go back first
    assert held(allocator) == (90 * MIB, 90 * MIB)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (90 * MIB, 90 * MIB)
    with pytest.raises(MemoryError, match=r"12\.0 MiB with 90\.0 MiB allocated and 90\.0 MiB reserved, of 100\.0 MiB"):
        allocator.allocate(12 * MIB)
    assert held(allocator) == (90 * MIB, 90 * MIB)
    assert allocator.allocate(10 * MIB) == 4  # the request that failed has no number
    assert allocator.reserved == 100 * MIB


def test_a_hole_does_not_help_a_request_that_is_larger():
    allocator = CachingAllocator(limit=20 * MIB)
    replay([9 * MIB, 2 * MIB, 9 * MIB, ~0, ~2], allocator)
    with pytest.raises(MemoryError):  # 18 of 20 MiB are free
        allocator.allocate(10 * MIB)


# Options


def test_above_max_split_size_blocks_are_not_split():
    # A free segment of 100 MiB is not lent to 50 MiB, nor to 79, but to 80.5, which is less than 20 MiB smaller.
    allocator = replay([100 * MIB, ~0], CachingAllocator(max_split_size=64 * MIB))
    allocator.allocate(50 * MIB)
    assert allocator.reserved == 150 * MIB
    allocator.allocate(79 * MIB)
    assert held(allocator) == (130 * MIB, 230 * MIB)
    allocator.allocate(80 * MIB)  # just too small
    assert held(allocator) == (210 * MIB, 310 * MIB)
    allocator.allocate(80 * MIB + 512)
    assert held(allocator) == (310 * MIB, 310 * MIB)
    replay([~1, 30 * MIB, 20 * MIB], allocator)  # below it, 50 MiB are split as ever
    assert held(allocator) == (310 * MIB, 310 * MIB)


def test_with_max_split_size_the_blocks_above_it_go_back_first():
    def begun(*events):
        return replay(events, CachingAllocator(max_split_size=64 * MIB, limit=300 * MIB))

    # One that is large enough: 120 MiB go back, not 70 nor 40.
    allocator = begun(40 * MIB, 70 * MIB, 120 * MIB, ~0, ~1, ~2, 90 * MIB)
    assert held(allocator) == (90 * MIB, (40 + 70 + 90) * MIB)
    # None is: the largest, until they are enough; the smallest stays.
    allocator = begun(40 * MIB, 70 * MIB, 80 * MIB, 90 * MIB, ~0, ~1, ~2, ~3, 150 * MIB)
    assert held(allocator) == (150 * MIB, (40 + 70 + 150) * MIB)
    # Not enough: all that is free goes.
    allocator = begun(40 * MIB, 70 * MIB, 80 * MIB, ~0, ~1, ~2, 290 * MIB)
    assert held(allocator) == (290 * MIB, 290 * MIB)


def test_the_size_of_large_segments():
    assert replay([2 * MIB], CachingAllocator(large_segment_size=64 * MIB)).reserved == 64 * MIB
    assert replay([10 * MIB], CachingAllocator(large_segment_size=64 * MIB)).reserved == 10 * MIB


def test_expandable_segments_grow_by_pages_and_have_no_holes_at_their_ends():
    allocator = CachingAllocator(expandable_segments=True)
    allocator.allocate(30 * MIB)
    assert held(allocator) == (30 * MIB, 40 * MIB)  # two pages of 20 MiB
    allocator.allocate(11 * MIB)  # 10 MiB are free, and one page more is mapped
    assert held(allocator) == (41 * MIB, 60 * MIB)
    allocator.allocate(19 * MIB - 512)  # 512 bytes are left, and split off, even here
    assert held(allocator) == (60 * MIB - 512, 60 * MIB)
    allocator.allocate(1024)
    assert held(allocator) == (60 * MIB + 512, 62 * MIB)
    replay([~0, ~1, ~2, ~3, 60 * MIB], allocator)  # one block again
    assert held(allocator) == (60 * MIB, 62 * MIB)


def test_expandable_segments_give_back_whole_pages_and_map_them_again():
    allocator = CachingAllocator(expandable_segments=True)
    replay([10 * MIB, 60 * MIB, 10 * MIB, ~1], allocator)  # 80 MiB: four pages, of which 10 to 70 MiB are free
    assert held(allocator) == (20 * MIB, 80 * MIB)
    allocator.empty_cache()  # the pages from 20 to 60 MiB
    assert held(allocator) == (20 * MIB, 40 * MIB)
    allocator.allocate(10 * MIB)  # there are two holes of this size
    assert held(allocator) == (30 * MIB, 40 * MIB)
    allocator.allocate(31 * MIB)
    # 40 MiB unmapped and 10 free after it have room, at a lower address than the end: two pages are enough
    assert held(allocator) == (61 * MIB, 80 * MIB)


def test_an_expandable_segment_prefers_a_hole_to_its_end():
    # The free end is smaller than the hole, and would be the best fit, if it could not grow.
    allocator = CachingAllocator(expandable_segments=True)
    replay([30 * MIB, 2 * MIB, 22 * MIB, ~0], allocator)  # 60 MiB mapped: a hole of 30 and 6 at the end
    allocator.allocate(5 * MIB)
    allocator.allocate(6 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.allocate(20 * MIB)  # 19 are left of the hole: the end grows
    assert allocator.reserved == 80 * MIB


def test_expandable_segments_with_a_limit():
    allocator = CachingAllocator(limit=80 * MIB, expandable_segments=True)
    replay([30 * MIB, 30 * MIB, ~0], allocator)
    with pytest.raises(MemoryError):
        allocator.allocate(60 * MIB)
    assert held(allocator) == (30 * MIB, 40 * MIB)  # what could go back has gone: the page from 0 to 20 MiB
    allocator.allocate(30 * MIB)
    assert held(allocator) == (60 * MIB, 60 * MIB)


# Bad input


def test_what_is_not_held_is_not_freed():
    allocator = replay([1024, 0])
    allocator.free(0)
    with pytest.raises(ValueError, match=r"handle=0.*given back before"):
        allocator.free(0)
    allocator.free(1)
    with pytest.raises(ValueError, match=r"handle=1.*given back before"):
        allocator.free(1)
    with pytest.raises(ValueError, match=r"handle=2.*no request has it"):
        replay([~2], allocator)


@pytest.mark.parametrize("size", [-1, 1.5, "8", None, True])
def test_a_size_is_a_whole_number(size):
    with pytest.raises(ValueError, match="size="):
        CachingAllocator().allocate(size)


@pytest.mark.parametrize(
    "options",
    [
        {"max_split_size": 19 * MIB},
        {"max_split_size": "64"},
        {"limit": -1},
        {"large_segment_size": 10 * MIB},
        {"expandable_segments": 1},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CachingAllocator(**options)


# Any sequence


@pytest.mark.parametrize("options", [{}, {"expandable_segments": True}, {"max_split_size": 32 * MIB}])
@pytest.mark.parametrize("seed", range(4))
def test_no_memory_is_lost(options, seed):
    """Blocks tile their segments, free neighbours are one block, and the counts are what the blocks add up to."""
    draw, allocator, live = random.Random(seed), CachingAllocator(limit=2_000 * MIB, **options), []
    for step in range(3_000):
        if live and (draw.random() < 0.5 or len(live) > 200):
            allocator.free(live.pop(draw.randrange(len(live))))
        elif step % 500 == 0:
            allocator.empty_cache()
        else:
            try:
                live.append(allocator.allocate(int(2 ** draw.uniform(8, 27))))
            except MemoryError:
                assert not any(block.previous is None and block.next is None for block in _free(allocator))
        if step % 100 == 0:
            _check(allocator)
    for handle in live:
        allocator.free(handle)
    assert allocator.allocated == 0
    allocator.empty_cache()
    assert allocator.reserved == 0 < allocator.peak_allocated < allocator.peak_reserved


def _free(allocator):
    return [block for pool in (allocator._small, allocator._large) for block in pool.blocks.values()]


def _check(allocator):
    used, free = [block for block in allocator._live.values() if block], _free(allocator)
    unmapped = [block for pool in (allocator._small, allocator._large) for block in pool.unmapped]
    assert allocator.allocated == sum(block.size for block in used)
    assert allocator.reserved == sum(block.size for block in used + free)
    for pool in (allocator._small, allocator._large):
        assert pool.keys == sorted(pool.blocks)
    known = {id(block) for block in used + free + unmapped}
    for block in used + free + unmapped:
        following = block.next
        if following is not None:
            assert id(following) in known and following.previous is block and following.pool is block.pool
            assert block.address + block.size == following.address
            assert block.state != following.state or block.state == 0
