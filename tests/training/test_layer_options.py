"""Compiled layers, layers that are not checkpointed, and liger's: each learns what a plain run learns."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from qlora_helpers.settings import Settings
from qlora_helpers.training import layer_options
from qlora_helpers.training.layer_options import layers_of
from tests.support.short_runs import SHORT, assert_learnt_the_same, run, trainer_of

PLAIN = replace(SHORT, dropout=0.0, save_steps=None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain") / "run", PLAIN)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "checkpointed_layers": 2},
        {"gradient_checkpointing": True, "activation_offloading": True},  # on a CPU there is nowhere to move them to
    ],
    ids=lambda options: "-".join(options),
)
def test_checkpointing_changes_nothing_that_is_learnt(options, plain, tmp_path):
    assert_learnt_the_same(plain, run(tmp_path / "run", replace(PLAIN, **options)), 1e-6, 1e-6)


@pytest.mark.parametrize("first", [0, 1, 3, 4, 9])
def test_the_first_layers_are_checkpointed_and_no_others(first, tmp_path):
    settings = Settings(steps=1, rank=4, gradient_checkpointing=True, checkpointed_layers=first)
    trainer = trainer_of(tmp_path, settings=settings)
    again = []
    for layer in layers_of(trainer.model):
        layer.mlp.register_forward_pre_hook(lambda *_, layer=layer: again.append(layer))
    trainer.train()
    ran = [again.count(layer) for layer in layers_of(trainer.model)]
    assert ran == [2] * min(first, 4) + [1] * (4 - min(first, 4))


@pytest.mark.everything
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"packing": True, "max_length": 256}])
def test_compiled_layers_learn_the_same_and_are_compiled_once(options, plain, tmp_path, capfd):
    torch.compiler.reset()
    counters.clear()
    compiled = run(tmp_path / "run", replace(PLAIN, compile_layers=True, **options))
    assert "torch.compile does not work here" not in (said := capfd.readouterr().out), said
    assert_learnt_the_same(plain, compiled)
    # the trial, the layer, and the layer once more for sizes that change; in evaluation it runs as it is or is one more
    assert 2 <= counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"]


def test_where_there_is_no_compiler_that_is_said_and_the_run_goes_on(plain, tmp_path, monkeypatch, capsys):
    def compile(function):
        def call(*args):
            raise RuntimeError("no C++ compiler was found\nand more lines")

        return call

    monkeypatch.setattr(layer_options.torch, "compile", compile)
    assert_learnt_the_same(plain, run(tmp_path / "run", replace(PLAIN, compile_layers=True)), 1e-6, 1e-6)
    said = "torch.compile does not work here, so the layers run as they are (no C++ compiler was found)"
    assert said in capsys.readouterr().out


def test_the_reason_is_the_error_within_what_dynamo_raises():
    """Its own first line is "backend='inductor' raised:", which helps nobody."""
    compiler = CppCompileError(["g++", "x.cpp"], "x.cpp: In function f\nx.cpp:1:2: fatal error: omp.h: No such file\n")
    for inner, said in (
        (compiler, "C++ compile error; x.cpp:1:2: fatal error: omp.h: No such file"),
        (InvalidCxxCompiler(), "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError(), "ValueError"),
    ):
        error = BackendCompilerFailed(layer_options.torch.compile, InductorError(inner, None), None)
        assert layer_options._in_one_line(error) == said


def test_a_layer_that_cannot_be_compiled_is_said_once_and_runs_as_it_is(plain, tmp_path, monkeypatch, capsys):
    def compile(function):
        def call(*args, **kwargs):
            if function.__name__ == "forward":
                raise layer_options.TorchDynamoException("a kernel that is too new")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(layer_options.torch, "compile", compile)
    assert_learnt_the_same(plain, run(tmp_path / "run", replace(PLAIN, compile_layers=True)), 1e-6, 1e-6)
    said = "LlamaDecoderLayer cannot be compiled here, so it runs as it is (a kernel that is too new)"
    assert capsys.readouterr().out.count(said) == 1


def test_without_liger_kernel_that_is_said_and_the_run_goes_on(plain, tmp_path, capsys):
    assert_learnt_the_same(plain, run(tmp_path / "run", replace(PLAIN, liger_layers=True)), 1e-6, 1e-6)
    assert "liger-kernel is not installed, so the layers stay as they are" in capsys.readouterr().out


def test_layers_that_have_no_switch_of_their_own_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_options, "GradientCheckpointingLayer", type("Other", (), {}))
    with pytest.raises(
        ValueError, match="checkpointed_layers='LlamaDecoderLayer': these layers can be checkpointed only"
    ):
        trainer_of(tmp_path, settings=replace(SHORT, gradient_checkpointing=True, checkpointed_layers=2))


def test_all_or_none_need_no_switches(monkeypatch, tmp_path):
    """A budget that checkpoints all layers or none is no reason to refuse a model."""
    trainer = trainer_of(tmp_path, settings=replace(SHORT, gradient_checkpointing=True))
    model, every = trainer.model, Settings(gradient_checkpointing=True)
    for settings, wanted in ((every, True), (Settings(), False), (every, True)):
        layer_options.checkpoint_first(model, settings)
        assert {layer.gradient_checkpointing for layer in layers_of(model)} == {wanted}
    monkeypatch.setattr(layer_options, "GradientCheckpointingLayer", type("Other", (), {}))
    layer_options.checkpoint_first(model, Settings())
    assert all(layer.gradient_checkpointing for layer in layers_of(model))  # left as they were
    with pytest.raises(ValueError, match="checkpointed_layers"):
        layer_options.checkpoint_first(model, replace(every, checkpointed_layers=2))
