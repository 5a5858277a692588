"""What can be done with the decoder layers of a model before it is trained: checkpoint some, compile them, use liger's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_liger_kernel_available

from qlora_helpers import validation
from qlora_helpers.models.decoder_layers import decoder_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from qlora_helpers.settings import Settings

__all__ = [
    "checkpoint_first",
    "compile_layers",
    "compiled_until_the_end",
    "layers_of",
    "layers_that_can_be_checkpointed",
    "use_liger",
    "why_no_compiler",
]

_COMPILED = "_compiled_for_a_run"  # marks the classes that `compile_layers` makes


def layers_of(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """The decoder layers of a model, with or without adapters.

    Raises:
        ValueError: they cannot be told from the rest of the model.
    """
    found = decoder_layers(model.get_base_model() if hasattr(model, "get_base_model") else model)
    if found is None:
        kind = type(model).__name__
        raise ValueError(
            f"model={kind}: which of its modules are the decoder layers cannot be told. Leave the option out"
        )
    return list(found[1])


def layers_that_can_be_checkpointed(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """The decoder layers, each of which has its own switch.

    Raises:
        ValueError: they have none.
    """
    layers = layers_of(model)
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise validation.refuse(
            "checkpointed_layers", type(layers[0]).__name__, "these layers can be checkpointed only all"
        )
    return layers


def checkpoint_first(model: PreTrainedModel | PeftModel, settings: Settings) -> None:
    """Checkpoint as many of the first layers as the settings say, in a model whose checkpointing is switched on.

    For all or none, layers without a switch of their own are left to the model's.

    Raises:
        ValueError: the settings name a number, and the layers have no switches.
    """
    first = settings.checkpointed_layers
    if first is not None:
        layers = layers_that_can_be_checkpointed(model)
    else:
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        first = len(layers) if settings.gradient_checkpointing else 0
    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = place < first


def why_no_compiler(device: str) -> str:
    """Why torch.compile does not work here, in one line; "" if it does. It compiles something small, which takes seconds."""
    try:
        torch.compile(lambda x: torch.nn.functional.silu(x) * 2 + 1)(torch.ones(64, device=device))
    except Exception as error:  # whatever the compilers raise: a missing one, a card that is too old, a full disk
        return _in_one_line(error)
    return ""


def compile_layers(model: PreTrainedModel | PeftModel, device: str, sizes_vary: bool = False) -> bool:
    """Compile each decoder layer, when it first runs. Layers that are alike are compiled once.

    A checkpointed layer is compiled within its checkpoint, so that what is compiled does not depend on it.

    Where this machine cannot compile, that is said in one line, and the layers stay as they are.

    Args:
        device: the one they run on, "cpu" or "cuda".
        sizes_vary: batches have other numbers of rows and tokens each time: compile for any at once, not for the first.

    Returns:
        Whether they will be compiled.
    """
    if reason := why_no_compiler(device):
        print(f"compile_layers=True: torch.compile does not work here, so the layers run as they are ({reason})")
        return False
    compiled: dict[type, type] = {}
    for layer in layers_of(model):
        kind = type(layer)
        if kind not in compiled:
            compiled[kind] = _compiled(kind, sizes_vary)
        layer.__class__ = compiled[kind]
    return True


@contextmanager
def compiled_until_the_end(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Undo `compile_layers` after the block: other uses of the model have other shapes, and it could not be pickled."""
    try:
        yield
    finally:
        for layer in layers_of(model):
            if _COMPILED in type(layer).__dict__:
                layer.__class__ = type(layer).__base__


def _compiled(kind: type[nn.Module], sizes_vary: bool) -> type[nn.Module]:
    """A class of layers like another, whose forward pass is compiled.

    As a subclass of transformers' layers it gets their checkpointing, which older versions do in `__call__` and newer ones in
    a `forward` around the layer's own.
    """
    plain = getattr(kind.forward, "__wrapped__", kind.forward)
    at_work = {"forward": torch.compile(plain)}

    def forward(self, *args, **kwargs):
        if sizes_vary:
            for value in args:
                torch._dynamo.maybe_mark_dynamic(value, (0, 1))
        try:
            layers_forward = at_work["forward"]
            return layers_forward(self, *args, **kwargs)
        except TorchDynamoException as error:
            if at_work["forward"] is plain:
                raise
            print(
                f"compile_layers=True: {kind.__name__} cannot be compiled here, so it runs as it is ({_in_one_line(error)})"
            )
            at_work["forward"] = plain
            return plain(self, *args, **kwargs)

    return type(kind)(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, _COMPILED: True})


def _in_one_line(error: Exception) -> str:
    """What went wrong, without the command and the output of a compiler, which take pages."""
    while (inner := getattr(error, "inner_exception", None)) is not None:  # Dynamo's first line names the backend alone
        error = inner
    lines = str(error).strip().splitlines()
    of_the_compiler = [line.strip() for line in lines[1:] if "error: " in line]
    return "; ".join(lines[:1] + of_the_compiler[:1]) or type(error).__name__


def use_liger(model: PreTrainedModel | PeftModel) -> bool:
    """Replace norms, rotary embeddings and MLPs by liger-kernel's.

    Where the package is not installed, that is said in one line, and the model stays as it is.

    Returns:
        Whether they were replaced.
    """
    if not is_liger_kernel_available():
        print(
            "liger_layers=True: liger-kernel is not installed, so the layers stay as they are (pip install liger-kernel)"
        )
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if (kind := model.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # it would say nothing
        print(
            f"liger_layers=True: liger-kernel has nothing for models of the type {kind}, so the layers stay as they are"
        )
        return False
    # the losses stay TRL's, whose output head is patched in already
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    return True
