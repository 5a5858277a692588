"""Units of memory, and sizes in words."""

import pytest

from qlora_helpers.units import GB, GIB, KIB, MIB, in_words


def test_each_unit_is_so_many_of_the_one_before():
    assert (KIB, MIB // KIB, GIB // MIB) == (1_024, 1_024, 1_024)
    assert GB == 1_000_000_000


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0.0 MiB"),
        (1_572_864, "1.5 MiB"),
        (GIB - MIB, "1023.0 MiB"),
        (GIB, "1.00 GiB"),
        (-5 * GIB // 4, "-1.25 GiB"),
        (None, "-"),
    ],
)
def test_sizes_below_a_gib_are_in_mib(size, words):
    assert in_words(size) == words
