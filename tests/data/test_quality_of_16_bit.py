"""QLoRA compared with LoRA on the same weights unquantised. This is the tests' only 16-bit run."""

import json
import os
from pathlib import Path

import pytest

from data.scripts.measure import tiny_llama as measure
from tests import ROOT

SCORES = json.loads((ROOT / "data" / "tiny-llama" / "scores.json").read_text())


def exact_match_of_nf4() -> float:
    """From lesson 4's run in this session, or from a run here if there is none."""
    reports = sorted(Path(os.environ["QLORA_RUNS"]).rglob("lesson-04-*/report.json"))
    print("NF4: from lesson 4's run" if reports else "NF4: trained here, since lesson 4 has not been run")
    return json.loads(reports[0].read_text())["exact_match_after"] if reports else measure.fine_tuned("NF4")["after"]


@pytest.mark.everything
def test_qlora_reaches_92_percent_of_16_bit_lora():
    sixteen_bit = measure.fine_tuned("16 bit")
    nf4 = exact_match_of_nf4()
    assert sixteen_bit["before"] < 0.2
    assert sixteen_bit["after"] == pytest.approx(SCORES["exact_match_after"]["16 bit"], abs=0.03)
    assert nf4 == pytest.approx(SCORES["exact_match_after"]["NF4"], abs=0.03)
    assert nf4 >= 0.85
    assert nf4 / sixteen_bit["after"] >= 0.92
