"""What each method takes, counted in the same way; and that lessons 1 and 7 say it in the same words."""

from dataclasses import replace

import jupytext
import pytest

from qlora_helpers.memory import find_shape, predict
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.methods import RUNS, memory_of_methods
from qlora_helpers.settings import GPU_RUN
from tests import ROOT

LLAMA_8B = find_shape("meta-llama/Llama-3.1-8B")
FOUND = {(run.settings.method, run.settings.optimizer): run for run in memory_of_methods(LLAMA_8B)}


@pytest.mark.parametrize(
    ("optimizer", "each", "paged"), [("paged_adamw_32bit", 12, 8), ("adamw_torch", 8, 0)], ids=lambda value: str(value)
)
def test_full_fine_tuning_keeps_so_many_bytes_for_each_parameter(optimizer, each, paged):
    run = FOUND["full", optimizer]
    assert run.kept == pytest.approx(each * LLAMA_8B.parameters, rel=1e-4)
    assert run.paged == pytest.approx(paged * LLAMA_8B.parameters, rel=1e-3)
    assert run.weights == run.gradients == 2 * LLAMA_8B.parameters


@pytest.mark.parametrize(("method", "base"), [("lora", 2 * LLAMA_8B.parameters), ("qlora", None)])
def test_adapters_in_float32_take_sixteen_bytes_for_each_of_their_parameters(method, base):
    run = FOUND[method, "paged_adamw_32bit"]
    base = base or predict(LLAMA_8B, replace(GPU_RUN, method=method)).loaded_bytes
    assert run.kept - base == pytest.approx(16 * LLAMA_8B.lora_parameters(16), rel=1e-4)


@pytest.mark.parametrize(("method", "optimizer"), RUNS)
def test_the_peak_has_no_paged_states_and_the_card_has_all(method, optimizer):
    run = FOUND[method, optimizer]
    p = predict(LLAMA_8B, replace(GPU_RUN, method=method, optimizer=optimizer))
    assert (run.peak, run.on_the_card) == (p.peak_allocated_bytes, p.device_bytes)
    assert run.peak > run.kept - run.paged - run.gradients and run.on_the_card > max(run.peak + run.paged, run.kept)
    assert (run.paged > 0) == optimizer.startswith("paged")


def test_another_run_is_counted_as_it_is_set():
    short, long = (
        memory_of_methods(LLAMA_8B, [("lora", "adamw_torch")], replace(GPU_RUN, max_length=length), "4090")[0]
        for length in (512, 2048)
    )
    assert short.kept == long.kept and short.peak < long.peak


def test_what_is_not_counted_here_is_refused():
    shape = AnyShape.from_config({"model_type": "olmo2", "num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"^shape=.*: give the shape of one of the families"):
        memory_of_methods(shape)
    with pytest.raises(ValueError, match=r"^num_gpus=2: must be 1"):
        memory_of_methods(LLAMA_8B, settings=replace(GPU_RUN, batch_size=2, num_gpus=2))


def test_lessons_1_and_7_show_the_same_table_and_say_the_same_of_it():
    said = []
    for name in ("01_memory_maths", "07_does_it_cost_quality"):
        cells = jupytext.read(ROOT / "notebooks" / "source" / f"{name}.py").cells
        (at,) = (number for number, cell in enumerate(cells) if "memory_of_methods(find_shape(" in cell.source)
        said.append((cells[at].source, cells[at + 1].source))
    assert said[0] == said[1] and said[0][1].startswith("*Kept* are")
