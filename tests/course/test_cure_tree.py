"""The words of lesson 9's tree of cures."""

import pytest

from qlora_helpers.course.cure_tree import branches_of_cures

GROUPS = ("load", "forward", "eager attention", "float32 copies", "backward, batch", "optimizer")
TRAINING = {group: (10.0 + row, 5.0 + row, 0.5 + row / 10) for row, group in enumerate(GROUPS)}


def test_each_place_has_its_cure_and_what_was_measured_of_it():
    branches = dict(branches_of_cures(TRAINING, (21.08, 6.89), (18.42, 3.36)))
    assert len(branches) == 9
    assert branches["forward"] == "gradient checkpointing\n11.0 → 6.0 GiB, 0.60 times the tokens/s"
    assert branches["load"].endswith("\n10.0 → 5.0 GiB, 0.50 times the tokens/s (batch of 1)")
    assert branches["optimizer step"].endswith("15.0 → 10.0 GiB, 1.00 times the tokens/s")
    assert branches["evaluation"].endswith("\n21.1 → 6.9 GiB")
    assert branches["merging"].endswith("\n18.4 → 0 GiB, and 3.4 GiB of main memory")


@pytest.mark.parametrize("wrong", [{"load": (1.0, 1.0, 1.0)}, TRAINING | {"saving": (1.0, 1.0, 1.0)}])
def test_a_missing_or_unknown_group_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^training="):
        branches_of_cures(wrong, (1, 1), (1, 1))
