"""What the report of a run says of its figures, and of the machine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qlora_helpers.commands.run_report import put_together, reset_peak_memory, what_to_change
from qlora_helpers.commands.run_request import Request
from qlora_helpers.settings import Settings
from qlora_helpers.statistics import Interval
from tests.support.short_runs import CPU


def report_and_scores(validation, training, cut_off=0, change=(-1.0, 0.1)):
    report = {"validation_history": list(enumerate(validation)), "loss_history": list(enumerate(training, start=1))}
    after = SimpleNamespace(cut_off=cut_off, rows=[None] * 4)
    return report, SimpleNamespace(after=after, loss_change=Interval(*change, 4))


@pytest.mark.parametrize(
    ("measured", "verdict", "names"),
    [
        (report_and_scores([3.0, 2.0], [3.0, 1.0]), "kept", []),
        (report_and_scores([], [3.0, 1.0]), "less sure", []),
        (report_and_scores([3.0, 3.1], [3.0, 1.0]), "kept", ["overfits"]),
        (report_and_scores([3.0, 3.0], [3.0, 2.9]), "kept", ["hardly learns"]),
        (report_and_scores([3.0, 2.9], [3.0, 2.9], change=(-0.1, 0.2)), "kept", ["hardly learns"]),
        (report_and_scores([3.0, 2.0], [3.0, 1.0], cut_off=3), "forgotten", ["never ends", "forgets"]),
        (report_and_scores([3.0, 2.0], [3.0, 1.0], cut_off=2), "broken", ["diverges"]),
        ((report_and_scores([3.0, 2.0], [3.0, 1.0])[0], None), "kept", []),  # nothing was asked
    ],
)
def test_a_bad_figure_names_what_to_change_first(measured, verdict, names):
    assert [change.name for change in what_to_change(*measured, SimpleNamespace(verdict=verdict))] == names


def test_the_peak_of_the_training_is_not_that_of_the_questions_before(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    reset_peak_memory()
    assert called == ["empty", "reset"]


@pytest.mark.parametrize("gear", ["cpu", "t4"])
def test_the_report_names_the_machine(gear):
    hardware = replace(CPU, gear=gear, gpu_name="Tesla T4", cores=3)
    data, kept = SimpleNamespace(described={"data_rows": 4}), SimpleNamespace(as_dict=lambda: {"facts": 5})
    found = put_together(Request(data="faq.csv"), data, Settings(), hardware, None, None, kept)
    assert found["hardware"] == ("3 processor cores" if gear == "cpu" else "Tesla T4") and found["gear"] == gear
    assert (found["data_rows"], found["forgetting"], found["scores"]) == (4, {"facts": 5}, None)
    assert (
        found["predicted_memory_bytes"] is None
        and found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )
