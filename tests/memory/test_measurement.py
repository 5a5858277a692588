"""The memory that a run takes, phase by phase."""

import threading
import time

import numpy as np
import pytest

from qlora_helpers.memory.measurement import Measurement, MemoryCallback
from qlora_helpers.units import MIB
from tests.memory.made_up import steps


def test_a_run_is_recorded_phase_by_phase(trained):
    _, measurement = trained
    assert list(measurement.phases) == ["load", "first step", "steady steps"]
    assert measurement.running is None


def test_on_a_cpu_there_is_main_memory_and_nothing_else(trained):
    for phase in trained[1].phases.values():
        assert phase.resident_bytes > 100 * MIB  # torch alone takes that
        others = {value for name, value in vars(phase).items() if name != "resident_bytes"}
        assert others == {None}


def test_the_main_memory_of_a_phase_is_its_peak_not_its_end():
    measurement = Measurement(on_gpu=False)
    with measurement.phase("before"):
        pass
    with measurement.phase("much"):
        much = np.ones(40 * MIB)  # 320 MiB, returned to the system at once
        time.sleep(0.1)
        del much
    with measurement.phase("after"):
        pass
    before, much, after = (phase.resident_bytes for phase in measurement.phases.values())
    assert much > before + 300 * MIB > after


def looking():
    """How many threads sample main memory, half a second after they should have ended."""
    time.sleep(0.5)
    return sum("_watch" in thread.name for thread in threading.enumerate())


def test_the_thread_that_looks_ends_with_its_phase_and_with_a_run_that_fails():
    measurement = Measurement(on_gpu=False)
    with pytest.raises(ZeroDivisionError), measurement.phase("failing"):
        assert looking() == 1
        _ = 1 / 0
    assert looking() == 0
    assert measurement.phases == {} and measurement.running is None
    callback = MemoryCallback(Measurement(on_gpu=False))
    callback.on_train_begin(None, None, None)  # and then training fails
    assert looking() == 1
    del callback
    assert looking() == 0


def test_one_phase_at_a_time():
    measurement = Measurement(on_gpu=False)
    with (
        measurement.phase("load"),
        pytest.raises(RuntimeError, match="'more' cannot begin while 'load' is being measured"),
        measurement.phase("more"),
    ):
        pass


@pytest.mark.parametrize(
    ("skipped", "phases"),
    [
        ([False, False, False], ["first step", "steady steps"]),
        ([True, True, False, True, False], ["first step", "steady steps"]),
        ([True, False], ["first step"]),
        ([True, True], []),
    ],
)
def test_the_first_step_lasts_until_the_weights_change(skipped, phases):
    callback = MemoryCallback(Measurement(on_gpu=False))
    steps(callback, skipped)
    assert list(callback.measurement.phases) == phases and callback.measurement.running is None


def test_training_again_replaces_what_a_failed_or_finished_run_has_left():
    callback = MemoryCallback(Measurement(on_gpu=False))
    callback.on_train_begin(None, None, None)  # and then it fails
    for _ in range(2):
        steps(callback, [False, False])
        assert list(callback.measurement.phases) == ["first step", "steady steps"]
