"""torch's CUDA caching allocator, simulated: what a run reserves, from the order in which it allocates and frees.

torch takes memory from the card in segments, hands it out in blocks, and keeps what is freed for the next request. What
it has taken is *reserved*; what tensors hold is *allocated*. Reserved memory is more, because a free block can be too
small for the next request, and how much more depends on the order of the requests alone.

The rules, of one stream, are those of torch 2.11 to 2.13, from c10/cuda/CUDACachingAllocator.cpp (read in two states
that lie around these releases: ataerabbi-meta/pytorch, ac90d12b, and mara-werils/pytorch, 20c4398a; the functions
`malloc`, `alloc_found_block`, `get_free_block`, `alloc_block`, `free_block`, `try_merge_blocks`,
`release_available_cached_blocks`, `release_blocks`), and the sizes from c10/core/AllocatorConfig.h, torch 2.13:

- A request is rounded up to 512 bytes. Up to 1 MiB it is served by the small pool, above by the large one; the pools
  never lend each other memory.
- The smallest free block that is large enough serves it; of equal ones, the one at the lowest address.
- If there is none, the card is asked for a new segment: 2 MiB for a small request; 20 MiB for one below 10 MiB; else the
  request, rounded up to 2 MiB.
- What is left of a block becomes a free block of its own: always in the small pool, and in the large one if it is more
  than 1 MiB. Otherwise the request gets the whole block, and all of it counts as allocated.
- A freed block merges with the free blocks beside it, within its segment.
- If the card has no more, segments that are wholly free go back to it, and the request is tried once more.
- Above `max_split_size`, blocks are never split, and serve only requests that are almost as large.

What is left out: several streams, garbage collection (`garbage_collection_threshold`, off by default), rounding to
powers of two (`roundup_power2_divisions`, off by default), the memory pools of CUDA graphs.

**Addresses.** Only the choice between free blocks of the same size depends on where a segment lies, and only the driver
knows that. On an H200 nearly every new segment lay below the last one, and so it is here by default.

**Measured** on an H200 with torch 2.11 (data/measured/allocator.json, by `data/scripts/measure/allocator.py`): in 39 traces
with 161,271 events, under three settings, reserved and allocated memory agree after every event where the simulator is told
the addresses of the real segments. Without them, each below the last, reserved memory agrees after 97 % of the events,
and the peak is 4 MiB off at most, or 0.07 %. With each above the last it would agree after 84 %.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from sys import maxsize

from qlora_helpers import validation
from qlora_helpers.units import MIB, in_words

__all__ = ["CachingAllocator", "replay"]

ROUND = 512  # bytes: the size of every block is a multiple
SMALL = 1 * MIB  # the largest request of the small pool
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
OWN_SEGMENT = 10 * MIB  # from this size on, a request gets a segment of its own size
ROUND_LARGE = 2 * MIB  # and the segment is rounded up to it
# A free block's key orders blocks by size, then by address, which has 48 bits as on the card.
ADDRESS_BITS = 48
# The address space of an expandable segment; torch's has 1.125 times the card's memory. Other segments begin at the top, and
# go down. Neither is ever used up.
ADDRESS_SPACE, TOP = 2**44, 2**47

USED, FREE, UNMAPPED = 0, 1, 2


class _Block:
    """A part of a segment, between its neighbours."""

    __slots__ = ("address", "next", "pool", "previous", "size", "state")

    def __init__(self, pool: _Pool, address: int, size: int, previous: _Block | None, following: _Block | None) -> None:
        self.pool, self.address, self.size, self.state = pool, address, size, USED
        self.previous, self.next = previous, following
        if previous is not None:
            previous.next = self
        if following is not None:
            following.previous = self

    def remove(self) -> None:
        """Take it out of the segment: a neighbour has its memory now."""
        if self.previous is not None:
            self.previous.next = self.next
        if self.next is not None:
            self.next.previous = self.previous


class _Pool:
    """The free blocks of the small or the large requests."""

    def __init__(self, page: int, least_rest: int, split_below: int) -> None:
        self.keys: list[int] = []  # sorted
        self.blocks: dict[int, _Block] = {}
        self.unmapped: list[_Block] = []  # of expandable segments, by address
        self.page = page  # what expandable segments grow by
        self.least_rest, self.split_below = least_rest, split_below

    def add(self, block: _Block) -> None:
        block.state = FREE
        key = block.size << ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def take(self, block: _Block) -> None:
        key = block.size << ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]
        block.state = USED

    def add_unmapped(self, block: _Block) -> None:
        block.state = UNMAPPED
        insort(self.unmapped, block, key=_address)


def _address(block: _Block) -> int:
    return block.address


class CachingAllocator:
    """What torch's allocator does with a sequence of requests, on one card.

    Attributes:
        allocated, reserved: bytes now, as `torch.cuda.memory_allocated()` and `memory_reserved()` give them.
        peak_allocated, peak_reserved: the most since the start or since `reset_peaks()`.
    """

    def __init__(
        self,
        max_split_size: int | None = None,
        limit: int | None = None,
        expandable_segments: bool = False,
        large_segment_size: int = LARGE_SEGMENT,
        addresses: Iterator[int] | None = None,
    ) -> None:
        """
        Args:
            max_split_size: bytes, a multiple of 1 MiB: torch's option `max_split_size_mb`. None for no such limit.
            limit: what the card has for torch, in bytes; None for as much as is asked for.
            expandable_segments: torch's option of the same name: one segment for each pool, which grows by pages.
            large_segment_size: bytes: torch's option `large_segment_size_mb`.
            addresses: where the new segments lie, one after the other; by default each lies below the last one. Not for
                expandable segments, of which each pool has one.

        Raises:
            ValueError: a size is not allowed.
        """
        least = validation.whole("large_segment_size", large_segment_size, at_least=OWN_SEGMENT + MIB)
        if max_split_size is not None:
            validation.whole("max_split_size", max_split_size, at_least=least, otherwise="None for no limit")
        if limit is not None:
            validation.whole("limit", limit, at_least=0, otherwise="None for no limit")
        self._expandable = validation.switch("expandable_segments", expandable_segments)
        self._max_split_size = maxsize if max_split_size is None else max_split_size
        self._any_fit = max_split_size is None and not expandable_segments
        self._limit = maxsize if limit is None else limit
        self._large_segment_size = large_segment_size
        self._addresses = addresses
        self._lowest_address = TOP
        self._small = _Pool(SMALL_SEGMENT, ROUND, maxsize)
        self._large = _Pool(
            large_segment_size,
            ROUND if expandable_segments else SMALL + ROUND,
            maxsize if expandable_segments else self._max_split_size,
        )
        if expandable_segments:
            for pool in (self._small, self._large):
                pool.add_unmapped(_Block(pool, 0, ADDRESS_SPACE // pool.page * pool.page, None, None))
        self._live: dict[int, _Block | None] = {}
        self._count = 0
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0

    def reset_peaks(self) -> None:
        """Let the peaks begin again from what is held now."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def allocate(self, size: int) -> int:
        """Serve a request.

        Args:
            size: bytes; 0 takes nothing, as in torch.

        Returns:
            Its handle: 0 for the first request that is served, 1 for the second, and so on.

        Raises:
            MemoryError: the card has not enough, even after what is wholly free went back to it.
            ValueError: size is no whole number, 0 or more.
        """
        handle = self._count
        if type(size) is not int or size < 1:
            size = validation.whole("size", size, at_least=0)
            if size == 0:
                self._live[handle] = None
                self._count += 1
                return handle
        size = (size + ROUND - 1) & -ROUND
        pool = self._small if size <= SMALL else self._large
        keys = pool.keys
        at = bisect_left(keys, size << ADDRESS_BITS)
        if self._any_fit and at < len(keys):
            block = pool.blocks.pop(keys.pop(at))
        else:
            block = self._fitting(pool, size, at) or self._new(pool, size)
        rest = block.size - size
        if rest >= pool.least_rest and size < pool.split_below:
            front = _Block(pool, block.address, size, block.previous, block)
            block.address += size
            block.size = rest
            block.state = FREE
            key = rest << ADDRESS_BITS | block.address
            insort(keys, key)
            pool.blocks[key] = block
            block = front
        else:
            block.state = USED
        self._live[handle] = block
        self._count += 1
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return handle

    def free(self, handle: int) -> None:
        """Give a request's memory back to the allocator, which keeps it.

        Raises:
            ValueError: no memory is held under this handle.
        """
        try:
            block = self._live.pop(handle)
        except KeyError:
            given = "it was given back before" if 0 <= handle < self._count else "no request has it"
            raise validation.refuse("handle", handle, f"no memory is held under it: {given}") from None
        if block is None:
            return
        self.allocated -= block.size
        pool = block.pool
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.state == FREE:
                pool.take(neighbour)
                neighbour.remove()
                block.size += neighbour.size
                if neighbour.address < block.address:
                    block.address = neighbour.address
        pool.add(block)

    def empty_cache(self) -> None:
        """Give the segments that are wholly free back to the card, as `torch.cuda.empty_cache()` does."""
        for pool in (self._large, self._small):
            for block in [pool.blocks[key] for key in pool.keys]:
                if self._expandable:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    self._release(block)

    def _fitting(self, pool: _Pool, size: int, at: int) -> _Block | None:
        """The free block for a request, where it is more than the first that is large enough; None if there is none."""
        keys, blocks = pool.keys, pool.blocks
        if at == len(keys):
            return None
        if self._expandable:
            # a block that can grow counts with what it can grow to
            while at + 1 < len(keys) and _can_grow_to(blocks[keys[at + 1]]) < _can_grow_to(blocks[keys[at]]):
                at += 1
        block, most = blocks[keys[at]], self._max_split_size
        too_large = block.size >= most if size < most else block.size >= size + self._large_segment_size
        if too_large:
            return None
        pool.take(block)
        return block

    def _new(self, pool: _Pool, size: int) -> _Block:
        """A block from the card, which is large enough for the request."""
        block = self._grow(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._grow(pool, size)
        if block is None:
            self.empty_cache()
            block = self._grow(pool, size)
        if block is None:
            raise MemoryError(
                f"out of memory: a request of {in_words(size)} with {in_words(self.allocated)} allocated and "
                f"{in_words(self.reserved)} reserved, of {in_words(self._limit)}"
            )
        return block

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        if self._expandable:
            return self._expand(pool, size)
        if size <= SMALL:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment = self._large_segment_size
        else:
            segment = (size + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE
        if not self._reserve(segment):
            return None
        return _Block(pool, self._new_address(segment), segment, None, None)

    def _reserve(self, size: int) -> bool:
        if self.reserved + size > self._limit:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _new_address(self, size: int) -> int:
        if self._addresses is not None:
            return next(self._addresses)
        self._lowest_address -= size
        return self._lowest_address

    def _release(self, block: _Block) -> None:
        block.pool.take(block)
        self.reserved -= block.size

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Give back free blocks above `max_split_size`, the largest first, until they make up the request."""
        if self._max_split_size == maxsize:
            return False
        wanted = max(size, self._max_split_size)
        at = bisect_left(pool.keys, wanted << ADDRESS_BITS)
        if at < len(pool.keys) and not self._expandable:
            self._release(pool.blocks[pool.keys[at]])
            return True
        released = 0
        while not self._expandable and released < wanted and pool.keys:
            block = pool.blocks[pool.keys[-1]]
            if block.size < self._max_split_size:
                break
            self._release(block)
            released += block.size
        return released >= wanted

    # ---- expandable segments

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Map pages at the lowest address that has room for the request."""
        block = self._room(pool, size)
        if block.state == UNMAPPED:
            block = self._map(block, min(size, block.size))
        while block is not None and block.size < size:
            unmapped = block.next
            block = self._map(unmapped, min(size - block.size, unmapped.size))
        if block is not None:
            pool.take(block)
        return block

    def _room(self, pool: _Pool, size: int) -> _Block:
        """The first of the free and unmapped blocks, one after the other, that have room for the request."""
        for block in pool.unmapped:
            first = block.previous if block.previous is not None and block.previous.state == FREE else block
            room, part = 0, first
            while room < size and part is not None and part.state != USED:
                room += part.size
                part = part.next
            if room >= size:
                return first
        raise AssertionError("the address space of an expandable segment has no end")

    def _map(self, block: _Block, size: int) -> _Block | None:
        """Map the first pages of an unmapped block. Returns the free block that they are part of."""
        pool = block.pool
        size = -(-size // pool.page) * pool.page
        if not self._reserve(size):
            return None
        pool.unmapped.remove(block)
        if size < block.size:
            rest = _Block(pool, block.address + size, block.size - size, block, block.next)
            pool.add_unmapped(rest)
            block.size = size
        return self._merged(block, FREE)

    def _unmap(self, block: _Block) -> None:
        """Give back the pages that lie wholly within a free block."""
        pool = block.pool
        end = block.address + block.size
        first, last = -(-block.address // pool.page) * pool.page, end // pool.page * pool.page
        if first >= last:
            return
        pool.take(block)
        if block.address < first:
            pool.add(_Block(pool, block.address, first - block.address, block.previous, block))
        if last < end:
            pool.add(_Block(pool, last, end - last, block, block.next))
        block.address, block.size = first, last - first
        self.reserved -= block.size
        self._merged(block, UNMAPPED)

    def _merged(self, block: _Block, state: int) -> _Block:
        """Put a block among the free or the unmapped ones, with the neighbours of the same kind."""
        pool = block.pool
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.state == state:
                if state == FREE:
                    pool.take(neighbour)
                else:
                    pool.unmapped.remove(neighbour)
                neighbour.remove()
                block.size += neighbour.size
                block.address = min(block.address, neighbour.address)
        (pool.add if state == FREE else pool.add_unmapped)(block)
        return block


def _can_grow_to(block: _Block) -> int:
    following = block.next
    return block.size + (following.size if following is not None and following.state == UNMAPPED else 0)


def replay(events: Iterable[int], allocator: CachingAllocator | None = None) -> CachingAllocator:
    """Let an allocator serve a sequence of requests.

    Args:
        events: a number of 0 or more allocates as many bytes; `~n`, which is negative, frees the allocation number n
            that the allocator served, counted from 0.
        allocator: goes on from where it is; by default a new one.

    Returns:
        The allocator, with its peaks.

    Raises:
        MemoryError: the allocator has a limit, and a request does not fit.
        ValueError: what is freed is not held.
    """
    allocator = CachingAllocator() if allocator is None else allocator
    allocate, free = allocator.allocate, allocator.free
    for event in events:
        if event < 0:
            free(~event)
        else:
            allocate(event)
    return allocator
