"""The plan of a merge, and what a proof holds it against; the merges themselves are in tests/commands/test_merge.py."""

import json
from dataclasses import replace

import pytest

from qlora_helpers.adapters.proven_merge import EXPECTED, _faults, plan_merge
from qlora_helpers.adapters.same_answers import Likeness
from qlora_helpers.adapters.survival import Survival
from qlora_helpers.paths import data_path
from tests.support.faulty_adapters import BASE, SHIPPED, changed
from tests.support.short_runs import CPU

LIKE = Likeness(8, 8, 1.0, 0.0, True, "", 1.0, 1.0, 40, 4.0)
ALL = Survival(1.0, 1.0, "q_proj", 28, "16bit")


def test_what_is_expected_is_what_lesson_6_measured():
    rows = {row["way"]: row for row in json.loads(data_path("measured", "merging.json").read_text("utf-8"))["rows"]}
    for into, expected in EXPECTED.items():
        assert expected.measured[1] == pytest.approx(rows[into]["mean"] / rows["no adapter"]["mean"], abs=0.005)


def test_a_plan_says_what_will_be_done_and_why(tmp_path):
    plan = plan_merge(SHIPPED, tmp_path / "out", hardware=CPU)
    assert (plan.base, plan.into, plan.by_files) == (BASE, "dequantised", False) and "what was trained" in plan.why
    assert plan_merge(SHIPPED, tmp_path / "out", "16bit", hardware=CPU).by_files
    assert not plan_merge(
        changed(
            tmp_path / "dora",
            lambda t: (
                t
                | {
                    name.replace("lora_B.weight", "lora_magnitude_vector"): tensor[:, 0]
                    for name, tensor in t.items()
                    if "lora_B" in name
                }
            ),
            use_dora=True,
        ),
        tmp_path / "out",
        "16bit",
        hardware=CPU,
    ).by_files
    with pytest.raises(ValueError, match="into='8bit': choose one of 4bit, dequantised, 16bit"):
        plan_merge(SHIPPED, tmp_path / "out", "8bit")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FileExistsError, match="full is there already: name a new folder"):
        plan_merge(SHIPPED, tmp_path / "full")


@pytest.mark.parametrize(
    ("merged", "base", "survived", "said"),
    [
        (0.05, 1.0, ALL, ()),
        (0.05, 1.0, None, ()),
        (0.13, 1.0, ALL, ("its logits differ by 0.13 on average, and dequantised may have 0.12",)),
        (float("nan"), 1.0, ALL, ("its logits differ by nan", "it is nearer to the base")),
        (0.05, 0.04, ALL, ("it is nearer to the base (0.04 on average) than to the adapter (0.05)",)),
        (0.05, 1.0, replace(ALL, least=0.8), ("of B A, 80% is in the weights of q_proj, and dequantised keeps 90%",)),
    ],
)
def test_each_thing_that_does_not_hold_is_said(merged, base, survived, said):
    """The adapter changes logits by 1 on average, and their spread is 4: 3 % of it, 0.12, is more than 6 % of 1."""
    faults = _faults(
        "dequantised",
        LIKE,
        replace(LIKE, mean_logit_difference=merged),
        replace(LIKE, mean_logit_difference=base),
        survived,
    )
    assert len(faults) == len(said) and all(fault.startswith(start) for fault, start in zip(faults, said, strict=True))


def test_a_merge_that_was_trained_for_is_held_to_what_was_trained_and_not_to_what_survives():
    little = replace(ALL, share=0.1, least=0.0)
    near, far = (replace(LIKE, mean_logit_difference=by) for by in (0.05, 0.5))
    assert _faults("4bit", LIKE, near, LIKE, little, trained_for=True) == ()
    assert len(_faults("4bit", LIKE, far, LIKE, little, trained_for=True)) == 1
    assert len(_faults("4bit", LIKE, far, LIKE, little)) == 1  # of a plain run it is what survives that is too little


def test_other_tokens_of_the_prompts_do_not_hold():
    near = replace(LIKE, mean_logit_difference=0.01, same_prompt_tokens=False)
    assert _faults("16bit", LIKE, near, LIKE, None) == ("its tokenizer makes other tokens of the questions",)
