"""The names of the phases, and which of them have a moment at which a step's peak can occur."""

from qlora_helpers.memory import phases


def test_every_moment_belongs_to_a_phase_of_a_step_in_order():
    *of_a_step, last = phases.MOMENTS.values()
    places = [phases.IN_A_STEP.index(phase) for phase in of_a_step]
    assert places == sorted(places)
    assert set(of_a_step) == set(phases.IN_A_STEP) and last == phases.EVALUATION


def test_no_two_phases_have_one_name():
    names = [value for name in phases.__all__ if isinstance(value := getattr(phases, name), str)]
    assert len(names) == len(set(names)) == len(phases.__all__) - 2
