"""check() compares numbers the way it says."""

import re

import pytest
import torch

from qlora_helpers.course.checks import CheckFailed, check

NAN, INFINITY = float("nan"), float("inf")


def printed(capsys):
    return capsys.readouterr().out


# check: what holds


@pytest.mark.parametrize(
    ("got", "want", "way", "line"),
    [
        (0.0919, 0.0917, {"rel": 0.01}, "✓ n: 0.0917, within 1 % (measured 0.0919)\n"),
        (9.51234567, 9.60693264, {"rel": 0.03}, "✓ n: 9.61, within 3 % (measured 9.51)\n"),
        (5_700_000_000, 5_703_281_152, {"rel": 0.005}, "✓ n: 5,703,000,000, within 0.5 % (measured 5,700,000,000)\n"),
        (-1010, -1000, {"rel": 0.01}, "✓ n: -1,000, within 1 % (measured -1,010)\n"),
        (4.12695, 4.127, {"abs": 1e-4}, "✓ n: 4.127, within 0.0001 (measured 4.12695)\n"),
        (1e-9, 0, {"abs": 1e-8}, "✓ n: 0, within 1e-08 (measured 1e-09)\n"),
        (0, 0, {"rel": 0.1}, "✓ n: 0, within 10 %\n"),
        (torch.tensor(2.0), 2.0, {"rel": 0.1}, "✓ n: 2, within 10 %\n"),
        (12345678, 12345678, {"exact": True}, "✓ n: 12,345,678\n"),
        (4.5, 4.5, {"exact": True}, "✓ n: 4.5\n"),
        ("Easthaven", "Easthaven", {"exact": True}, "✓ n: Easthaven\n"),
        (True, True, {"exact": True}, "✓ n: True\n"),
        (None, None, {"exact": True}, "✓ n: None\n"),
        ((16, 64), (16, 64), {"exact": True}, "✓ n: (16, 64)\n"),
        (0.9312345, None, {"at_least": 0.9}, "✓ n: at least 0.9 (measured 0.931)\n"),
        (0.9, None, {"at_least": 0.9}, "✓ n: at least 0.9 (measured 0.9)\n"),
        (2e9, None, {"at_most": 4_000_000_000}, "✓ n: at most 4,000,000,000 (measured 2,000,000,000)\n"),
        (0.5, None, {"at_least": 0, "at_most": 1}, "✓ n: at least 0 and at most 1 (measured 0.5)\n"),
        (torch.tensor(0.25), None, {"at_least": 0}, "✓ n: at least 0 (measured 0.25)\n"),
        (INFINITY, None, {"at_least": 0}, "✓ n: at least 0 (measured inf)\n"),
    ],
)
def test_what_holds_prints_one_line_with_what_was_measured_in_brackets(got, want, way, line, capsys):
    check("n", got, want, **way)
    assert printed(capsys) == line


def test_equal_tensors_hold_bit_for_bit(capsys):
    check("codes", torch.arange(3), torch.arange(3), exact=True)
    assert printed(capsys) == "✓ codes: equal, bit for bit\n"


# check: what does not


@pytest.mark.parametrize(
    ("got", "want", "way", "message"),
    [
        (0.0930, 0.0917, {"rel": 0.01}, "n: got 0.093, want 0.0917, within 1 %"),
        (-1011, -1000, {"rel": 0.01}, "n: got -1,011, want -1,000, within 1 %"),
        (1000, -1000, {"rel": 0.01}, "n: got 1,000, want -1,000, within 1 %"),
        (4.5, 4.127, {"abs": 1e-4}, "n: got 4.5, want 4.127, within 0.0001"),
        (4.126, 4.127, {"abs": 1e-4}, "n: got 4.126, want 4.127, within 0.0001"),
        (12345679, 12345678, {"exact": True}, "n: got 12,345,679, want 12,345,678, exactly"),
        ("Westhaven", "Easthaven", {"exact": True}, "n: got Westhaven, want Easthaven, exactly"),
        (1, None, {"exact": True}, "n: got 1, want None, exactly"),
        (0.89, None, {"at_least": 0.9}, "n: got 0.89, want at least 0.9"),
        (1.5, None, {"at_most": 1}, "n: got 1.5, want at most 1"),
        (1.5, None, {"at_least": 0, "at_most": 1}, "n: got 1.5, want at least 0 and at most 1"),
        (-0.5, None, {"at_least": 0, "at_most": 1}, "n: got -0.5, want at least 0 and at most 1"),
    ],
)
def test_what_does_not_hold_raises_with_both_values_and_the_tolerance(got, want, way, message, capsys):
    with pytest.raises(CheckFailed) as caught:
        check("n", got, want, **way)
    assert str(caught.value) == message
    assert printed(capsys) == ""


def test_a_failed_check_is_an_assertion_error():
    assert issubclass(CheckFailed, AssertionError)


@pytest.mark.parametrize(
    "other",
    [torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2]), torch.tensor([1.0, NAN]), 1.0],
    ids=["value", "shape", "dtype", "nan", "no tensor"],
)
def test_tensors_that_differ_in_anything_are_not_exactly_equal(other):
    with pytest.raises(CheckFailed):
        check("weights", other, torch.tensor([1.0, 2.0]), exact=True)


def test_tensors_on_two_devices_are_not_held_bit_for_bit():
    with pytest.raises(ValueError, match=r"check\('weights'\): got is on meta, want on cpu.*both on one device"):
        check("weights", torch.ones(2, device="meta"), torch.ones(2), exact=True)


@pytest.mark.parametrize(
    "way",
    [
        {"want": 1.0, "rel": 0.1},
        {"want": 1.0, "abs": 0.1},
        {"want": 1.0, "exact": True},
        {"want": NAN, "exact": True},
        {"at_least": 0},
        {"at_most": 0},
        {"at_least": 0, "at_most": 1},
    ],
    ids=str,
)
def test_nan_never_holds(way):
    with pytest.raises(CheckFailed, match="got nan"):
        check("loss", NAN, **way)


@pytest.mark.parametrize("way", [{"rel": 0.1}, {"abs": 0.1}], ids=str)
def test_infinity_is_near_nothing(way):
    with pytest.raises(CheckFailed):
        check("loss", INFINITY, 1.0, **way)


# check: misuse


@pytest.mark.parametrize(
    ("want", "way"),
    [
        (INFINITY, {"rel": 0.1}),
        (-INFINITY, {"rel": 0.1}),
        (INFINITY, {"abs": 0.1}),
        (NAN, {"rel": 0.1}),
        (NAN, {"abs": 0.1}),
        (1e308, {"rel": 10}),
        (10**400, {"rel": 0.1}),
        ("4.5", {"rel": 0.1}),
    ],
    ids=str,
)
def test_what_nothing_or_everything_would_be_near_to_is_refused(want, way):
    for got in (1.0, INFINITY, -1e300):
        with pytest.raises(
            ValueError, match=r"check\('n'\): want=.* has no numbers near it: pass exact=True, or a bound"
        ):
            check("n", got, want, **way)


@pytest.mark.parametrize(
    ("way", "bound"),
    [({"at_least": -INFINITY}, "at_least=-inf"), ({"at_most": INFINITY}, "at_most=inf"), ({"at_least": NAN}, "at_least=nan"),
     ({"at_most": "1"}, "at_most='1'"), ({"at_least": 0, "at_most": INFINITY}, "at_most=inf"), ({"at_least": True}, "at_least=True")],
    ids=str,
)  # fmt: skip
def test_a_bound_that_bounds_nothing_is_refused(way, bound):
    with pytest.raises(ValueError, match=rf"check\('n'\): {bound} must be a finite number"):
        check("n", 1.0, **way)


@pytest.mark.parametrize("exact", ["no", 1, 0, None])
def test_exact_is_a_switch(exact):
    with pytest.raises(ValueError, match=f"^exact={exact!r}: must be True or False"):
        check("n", 1, 1, exact=exact)


def test_what_is_no_number_is_near_no_number():
    for got in ("4.5", None, [4.5]):
        with pytest.raises(CheckFailed, match=r"n: got .*4.5.*|n: got None, want 4.5, within"):
            check("n", got, 4.5, rel=0.1)
        with pytest.raises(CheckFailed, match=r"n: got .*, want at least 1"):
            check("n", got, at_least=1)


@pytest.mark.parametrize(("got", "holds"), [(90, True), (110, True), (89.99, False), (110.01, False)])
def test_a_tolerance_reaches_as_far_as_it_says(got, holds, capsys):
    for way in ({"rel": 0.1}, {"abs": 10}):
        if holds:
            check("n", got, 100, **way)
        else:
            with pytest.raises(CheckFailed):
                check("n", got, 100, **way)


@pytest.mark.parametrize(
    "way",
    [
        {"want": 1},
        {"want": 1, "exact": False},
        {"want": 1, "rel": 0.1, "abs": 0.1},
        {"want": 1, "rel": 0.1, "exact": True},
        {"want": 1, "abs": 0.1, "at_most": 2},
        {"at_least": 0, "exact": True},
    ],
    ids=str,
)
def test_no_way_or_several_ways_at_once_are_refused(way):
    with pytest.raises(ValueError, match=r"check\('n'\): use exactly one of"):
        check("n", 1, **way)


@pytest.mark.parametrize("way", [{"rel": 0.1}, {"abs": 0.1}, {"want": 1, "at_least": 0}], ids=str)
def test_a_missing_or_a_needless_want_is_refused(way):
    with pytest.raises(ValueError, match="pass want with rel, abs or exact, and no want with at_least or at_most"):
        check("n", 1, **way)


@pytest.mark.parametrize("tolerance", [0, -0.1, NAN, INFINITY, True, "0.1", 10**400])
@pytest.mark.parametrize("word", ["rel", "abs"])
def test_a_tolerance_that_is_no_positive_number_is_refused(word, tolerance):
    with pytest.raises(
        ValueError,
        match=rf"{word}={re.escape(repr(tolerance))[:40]}.* must be a positive number; for equality, exact=True",
    ):
        check("n", 1, 1, **{word: tolerance})
