"""A step on tensors without values, part by part."""

from dataclasses import replace

import pytest

from qlora_helpers.memory.fake.model import prepare
from qlora_helpers.memory.fake.trace import trace_evaluation, trace_step
from qlora_helpers.memory.tape import rounded
from tests.memory.fake.models import GPU, LLAMA, RUN


def traced(run):
    prepared = prepare(LLAMA, run, GPU)
    return prepared, *trace_step(prepared, run, GPU)


def outliving(run):
    return int(run.sizes[run.dies_in == -1].sum())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_of_a_pass_is_marked_and_takes_something(checkpointing):
    prepared, _, (step,) = traced(replace(RUN, gradient_checkpointing=checkpointing))
    m = step.layers
    assert m == len(prepared.layers) == 3 and len(step.lengths) == 2 * m + 4
    assert (step.lengths > 0).all()
    taken = [int(step.sizes[step.born_in == part].sum()) for part in range(2 * m + 3)]
    assert min(taken) > 0
    # every moment lies within its part
    assert (step.born_at < step.lengths[step.born_in]).all()
    inside = step.dies_in >= 0
    assert (step.dies_at[inside] < step.lengths[step.dies_in[inside]]).all()


def test_checkpointing_leaves_activations_to_the_backward_pass():
    """Without it a layer's forward part takes what its backward part gives back; with it, it is gone at once."""
    kept = {}
    for checkpointing in (False, True):
        _, _, (step,) = traced(replace(RUN, gradient_checkpointing=checkpointing))
        m = step.layers
        in_second = step.born_in == 2
        kept[checkpointing] = int(step.sizes[in_second & (step.dies_in > m + 2)].sum())
    one_input = rounded(2 * 64 * 64 * 2)  # batch, tokens, width, bytes
    assert kept[True] == one_input < kept[False] / 5


def test_the_gradients_outlive_the_first_pass_and_a_later_one_adds_to_them():
    run = replace(RUN, accumulation=3)
    prepared, standing, passes = traced(run)
    gradients = sum(rounded(entry.elements * entry.width) for entry in standing if entry.trained)
    assert len(passes) == 2 and outliving(passes[0]) == gradients and outliving(passes[1]) == 0
    (only,) = traced(RUN)[2]
    assert outliving(only) == gradients
    trained = [parameter for parameter in prepared.model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


def test_what_is_there_throughout_is_every_tensor_once():
    prepared, standing, _ = traced(RUN)
    assert sum(entry.trained for entry in standing) == 2 * 7 * 3
    four_bit = [entry for entry in standing if entry.kind == "4-bit weights"]
    assert len(four_bit) == 7 * 3 and all(entry.decoded == 2 * entry.elements for entry in four_bit)
    constants = [entry for entry in standing if entry.kind == "quantisation constants"]
    assert len(constants) == 5 * 7 * 3  # with double quantisation
    assert {entry.layer for entry in four_bit} == {0, 1, 2}
    assert {entry.layer for entry in standing if entry.embedding} == {None}
    assert {entry.width for entry in standing if entry.kind == "adapters"} == {4}
    parameters = {id(parameter): parameter for parameter in prepared.model.parameters()}
    buffers = [buffer for _, buffer in prepared.model.named_buffers()]
    assert len(standing) - len(constants) == len(parameters) + len(buffers)


def test_shared_embeddings_are_there_once():
    run = replace(RUN, method="full")
    prepared = prepare(LLAMA | {"tie_word_embeddings": True}, run, GPU)
    standing, _ = trace_step(prepared, run, GPU)
    assert [entry.elements for entry in standing].count(1_000 * 64) == 1


def test_an_evaluation_keeps_nothing_and_has_no_backward_pass():
    run = replace(RUN, eval_batch_size=3)
    prepared = prepare(LLAMA, run, GPU)
    trace_step(prepared, run, GPU)
    evaluation = trace_evaluation(prepared, run, GPU)
    m = evaluation.layers
    assert outliving(evaluation) == 0
    assert (evaluation.lengths[: m + 2] > 0).all() and (evaluation.lengths[m + 2 : -1] == 0).all()
    in_second = evaluation.born_in == 2
    assert evaluation.sizes[in_second].max() >= rounded(3 * 64 * 128 * 2)  # a batch of three in the MLP
