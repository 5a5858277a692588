"""How answers are decoded: what is refused, and how long they may be."""

import pytest

from qlora_helpers.decoding import Decoding


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be a whole number, 1 or more, or None for 512"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5: must be a whole number"),
        ({"temperature": -1}, "temperature=-1: must be a number, 0.01 to 10, or 0 for greedy decoding"),
        ({"temperature": 0.001}, "temperature=0.001: must be a number, 0.01 to 10"),
        ({"temperature": 11}, "temperature=11: must be a number, 0.01 to 10"),
        ({"temperature": float("nan")}, "temperature=nan: must be a number"),
        ({"temperature": "hot"}, "temperature='hot': must be a number"),
        ({"temperature": False}, "temperature=False: must be a number"),
        ({"seed": -1}, "seed=-1: must be a whole number, 0 to 4294967295"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_name(value, said):
    with pytest.raises(ValueError, match="^" + said.replace(".", r"\.")):
        Decoding(**value)


def test_an_answer_is_as_long_as_asked_or_half_the_context():
    assert Decoding().limit(256) == 128
    assert Decoding().limit(1_024) == Decoding().limit(4_096) == Decoding().limit(None) == 512
    assert Decoding(max_new_tokens=255).limit(256) == 255
    assert Decoding(max_new_tokens=9_999).limit(None) == 9_999
    with pytest.raises(ValueError, match="max_new_tokens=256: must be less than the model's context of 256 tokens"):
        Decoding(max_new_tokens=256).limit(256)
