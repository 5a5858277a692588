"""A whole model put together from a few of its layers takes what it takes when all of them run."""

from dataclasses import replace

import numpy as np
import pytest

from qlora_helpers.memory.fake.ledger import ALIVE
from qlora_helpers.memory.fake.model import prepare
from qlora_helpers.memory.fake.trace import trace_evaluation, trace_step
from qlora_helpers.memory.fake.whole import Timeline, whole_pass
from tests.memory.fake.models import DEEPSEEK, GEMMA3, GPT_OSS, GPU, LLAMA, QWEN3_MOE, RUN

ATTENTION = ("q_proj", "o_proj")
RUNS = {
    "checkpointing": RUN,
    "no checkpointing": replace(RUN, gradient_checkpointing=False),
    "the first two checkpointed": replace(RUN, checkpointed_layers=2),
    "the first four checkpointed": replace(RUN, checkpointed_layers=4),
    "all but one checkpointed": replace(RUN, checkpointed_layers=5),
    "accumulation": replace(RUN, accumulation=2),
    "lora": replace(RUN, method="lora", gradient_checkpointing=False, logits="whole"),
    "full": replace(RUN, method="full"),
    "upcast": replace(RUN, upcast_fp32=True),
}
CASES = [(LLAMA, how) for how in RUNS] + [(GEMMA3, how) for how in RUNS]
CASES += [(config, how) for config in (QWEN3_MOE, DEEPSEEK, GPT_OSS) for how in list(RUNS)[:3]]


def timelines(config, run, whole):
    if config is GPT_OSS:
        run = replace(run, attention="eager")
    if config not in (LLAMA, GEMMA3) and run.method != "full":
        run = replace(run, target_modules=ATTENTION)
    prepared = prepare(config, run, GPU, whole=whole)
    passes = trace_step(prepared, run, GPU)[1]
    if run.eval_batch_size:
        passes.append(trace_evaluation(prepared, run, GPU))
    return [whole_pass(step, prepared.template) for step in passes], len(prepared.layers)


def held_after(timeline):
    return int(timeline.sizes[timeline.deaths == ALIVE].sum())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "how"), CASES, ids=[f"{config['model_type']}, {how}" for config, how in CASES])
def test_a_few_layers_give_the_memory_of_all(config, how):
    some, few = timelines(config, RUNS[how], whole=False)
    every, all_of_them = timelines(config, RUNS[how], whole=True)
    assert few < all_of_them == config["num_hidden_layers"]
    for ours, real in zip(some, every, strict=True):
        assert ours.layers == real.layers
        assert held_after(ours) == held_after(real)
        peaks, expected = ours.peaks(), real.peaks()
        assert list(peaks) == list(expected)
        most = max(size for size, _ in expected.values())
        for part in expected:
            assert peaks[part][0] == pytest.approx(expected[part][0], abs=0.005 * most), part
        assert max(peaks.values())[0] == pytest.approx(most, rel=0.002)


def test_an_evaluation_is_put_together_too():
    run = replace(RUN, eval_batch_size=4)
    (_, some), _ = timelines(GEMMA3, run, whole=False)
    (_, every), _ = timelines(GEMMA3, run, whole=True)
    assert max(some.peaks().values())[0] == pytest.approx(max(every.peaks().values())[0], rel=0.002)
    assert some.layers == 9 and held_after(some) == 0


def test_more_layers_keep_more_without_checkpointing():
    """The comparison above would see if the layers between were left out."""
    run = RUNS["no checkpointing"]
    prepared = prepare(LLAMA, run, GPU)
    (step,) = trace_step(prepared, run, GPU)[1]
    peaks = [max(whole_pass(step, [0, *[1] * between, 2]).peaks().values())[0] for between in (1, 4, 7)]
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0] > 0.1 * peaks[0]


def test_a_timeline_in_order():
    timeline = Timeline(0, np.array([10, 5, 7]), np.array(["", "", ""]), np.array([0, 4, 8]), np.array([6, 10, ALIVE]))
    which, change, parts = timeline.events()
    assert which.tolist() == [0, 1, 0, 2, 1] and change.tolist() == [10, 5, -10, 7, -5] and set(parts.tolist()) == {0}
    assert timeline.peaks() == {0: (15, 4)}
    assert timeline.alive_at(5).tolist() == [0, 1] and timeline.alive_at(20).tolist() == [2]
