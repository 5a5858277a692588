"""The records of the package: what a function gives stays as it was given."""

import dataclasses
import importlib

from tests import ROOT


def test_a_record_cannot_be_changed_after_its_checks_unless_it_is_filled_step_by_step():
    changed_later = {"Report", "Run", "Spike", "Voice"}  # the doctor's findings, what train gives, a spike that goes on
    records = set()
    for path in (ROOT / "qlora_helpers").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            module = importlib.import_module(name)
            records |= {
                one for one in vars(module).values() if dataclasses.is_dataclass(one) and one.__module__ == name
            }
    assert len(records) > 25
    assert {record.__name__ for record in records if not record.__dataclass_params__.frozen} == changed_later
