"""The rule that finds loss spikes."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from qlora_helpers.chats import read_chats
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.spikes import NATS, SHARE, SPREADS, WINDOW, SpikeWatch, find_spikes
from tests.support.short_runs import run

# the loss of every step: the course's own run (300 steps of 16), and runs of 200 steps with smaller batches
HEALTHY = json.loads((Path(__file__).parent / "healthy_losses.json").read_text())


def numbered(losses):
    return list(enumerate(losses, start=1))


# The rule


def noisy(count, level, spread, seed=0):
    draw = random.Random(seed)
    return [level + draw.gauss(0, spread) for _ in range(count)]


def test_a_made_up_spike_is_named_with_its_step():
    losses = noisy(60, level=1.0, spread=0.05)
    losses[40] = 3.0
    (spike,) = find_spikes(numbered(losses))
    assert (spike.step, spike.loss, spike.peak, spike.steps) == (41, 3.0, 3.0, 1)
    assert spike.usual == statistics.median(losses[20:40])
    assert str(spike) == f"loss spike at step 41: 3, where {spike.usual:.4g} is usual (limit {spike.limit:.4g})"


def test_the_limit_is_the_rule_computed_by_hand():
    before = [2.0, 2.2, 1.9, 2.1, 2.4]  # median 2.1; distances 0.1, 0.1, 0.2, 0, 0.3: median 0.1
    limit = 2.1 + max(SPREADS * 1.4826 * 0.1, SHARE * 2.1, NATS)
    assert find_spikes(numbered([*before, limit - 1e-6])) == []
    (spike,) = find_spikes(numbered([*before, limit + 1e-6]))
    assert spike.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "losses",
    [
        [10 * 0.95**step for step in range(100)],  # falling
        noisy(500, level=1.0, spread=0.1),
        [0.05, 0.04, 0.05, 0.06, 0.05, 0.2],  # four times the usual, yet not a spike
        [1.0, 1.0, 9.0],  # too early to tell
        [],
    ],
)
def test_what_is_not_a_spike(losses):
    assert find_spikes(numbered(losses)) == []


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_none(name):
    assert len(HEALTHY[name]) >= 200
    assert find_spikes(numbered(HEALTHY[name])) == []


def test_the_losses_called_healthy_are_those_of_the_course_s_run(tmp_path):
    seen = []

    def watch(history):
        seen.append(history[-1][1])
        stop_at(3)(history)

    chats = read_chats(data_path("chats", "train.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Settings(log_steps=1), chats, on_loss=watch)
    assert seen == pytest.approx(HEALTHY["standard"][:3], rel=0.01)


def test_steps_in_a_row_are_one_spike_whose_losses_do_not_count_as_usual():
    losses = [*noisy(30, 1.0, 0.05), 5.0, 8.0, 6.0, *noisy(10, 1.0, 0.05, seed=1), 5.0]
    first, second = find_spikes(numbered(losses))
    assert (first.step, first.loss, first.peak, first.steps) == (31, 5.0, 8.0, 3)
    assert second.step == 44 and second.usual == pytest.approx(1.0, abs=0.05)


def test_a_level_that_stays_is_one_spike_and_the_new_usual():
    losses = [*noisy(30, 1.0, 0.05), *noisy(100, 7.0, 0.05), 30.0]
    first, second = find_spikes(numbered(losses))
    assert (first.step, first.steps) == (31, WINDOW)
    assert second.step == 131 and second.usual == pytest.approx(7.0, abs=0.1)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_nan_or_infinite_is_refused(loss):
    with pytest.raises(ValueError, match=rf"loss={loss!r} at step 3: a spike is a finite loss"):
        SpikeWatch().add(3, loss)


def stop_at(step):
    def stop(history):
        if history[-1][0] == step:
            raise KeyboardInterrupt

    return stop
