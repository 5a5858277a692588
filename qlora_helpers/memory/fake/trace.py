"""A training step of the libraries' own code on tensors without values, with all that it takes and gives back, part by part."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch

from qlora_helpers.memory.fake.four_bit import Fake4bit
from qlora_helpers.memory.fake.ledger import ALIVE, Ledger
from qlora_helpers.memory.fake.model import Prepared
from qlora_helpers.memory.fake.on_a_gpu import on_a_gpu
from qlora_helpers.memory.gpus import GPU
from qlora_helpers.memory.loaded import constant_sizes
from qlora_helpers.settings import DTYPES, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pass", "Standing", "trace_evaluation", "trace_step"]

_NOT_IN_ORDER = "its decoder layers do not run once each, one after another"


@dataclass(frozen=True)
class Pass:
    """What one pass through a model takes and gives back.

    The parts of a pass come in this order: what is before the decoder layers, each layer's forward part, the output head
    and its loss, its backward part, each layer's backward part from the last to the first, and the rest. With m layers
    there are 2 m + 4 parts.

    Attributes:
        layers: m.
        sizes: bytes of each piece of memory, one entry each.
        kinds: of each; "" for none.
        born_in, born_at: the part in which it came, and when within it.
        dies_in, dies_at: the same for its end; a part of -1 says that it outlives the pass.
        lengths: of each part.
    """

    layers: int
    sizes: np.ndarray
    kinds: np.ndarray
    born_in: np.ndarray
    born_at: np.ndarray
    dies_in: np.ndarray
    dies_at: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Standing:
    """A tensor that is there throughout the run.

    Attributes:
        layer: which of the prepared layers it belongs to; None for those outside the decoder.
        elements, width: of it; 4-bit weights count as they are packed.
        kind: "4-bit weights", "quantisation constants", "16-bit weights" or "adapters".
        loaded_width: that it was loaded in, if the run has made it wider.
        decoded: how many weights a 4-bit tensor stands for; they are loaded in 16 bits, and quantised one by one.
        trained: it has a gradient.
        embedding: it is that of the tokens.
        name: in the model as it is loaded; in a decoder layer with the number that the layer has there among the prepared
            ones. A buffer has none: it is made when the weights are there.
    """

    layer: int | None
    elements: int
    width: int
    kind: str
    loaded_width: int
    decoded: int = 0
    trained: bool = False
    embedding: bool = False
    name: str = ""


def _made_real(prepared: Prepared, adapter_dtype: torch.dtype | None) -> list[Standing]:
    """Give every parameter and buffer a storage, once; returns what there is then."""
    made: dict[int, tuple] = {}
    standing: list[Standing] = []
    owner = {id(module): place for place, layer in enumerate(prepared.layers) for module in layer.modules()}
    embeddings = prepared.model.get_input_embeddings()
    for path, module in prepared.model.named_modules():
        layer, path = owner.get(id(module)), _as_loaded(path)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                of_adapter = parameter.requires_grad and adapter_dtype is not None
                dtype = adapter_dtype if of_adapter else parameter.dtype
                values = torch.empty(parameter.shape, dtype=dtype)
                new = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
                made[id(parameter)] = new, parameter  # the old one, too, so that its id is not used again
                four_bit = isinstance(module, Fake4bit) and name == "weight"
                kind = "adapters" if of_adapter else "4-bit weights" if four_bit else "16-bit weights"
                width = values.element_size()
                decoded = module.weights if four_bit else 0
                is_table = module is embeddings and name == "weight"
                loaded = getattr(parameter, "loaded_width", width)
                trained = parameter.requires_grad
                standing.append(
                    Standing(
                        layer, parameter.numel(), width, kind, loaded, decoded, trained, is_table, f"{path}.{name}"
                    )
                )
            module._parameters[name] = made[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
                width = buffer.element_size()
                standing.append(Standing(layer, buffer.numel(), width, "16-bit weights", width))
        if isinstance(module, Fake4bit):
            sizes = constant_sizes(module.weights, module.double_quant, module.block_size)
            standing += [Standing(layer, size, 1, "quantisation constants", 1) for size in sizes]
    return standing


def _as_loaded(path: str) -> str:
    """A module's name without what PEFT puts around it."""
    return path.removeprefix("base_model.model.").removesuffix(".base_layer")


def _first_tensor(output) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    return next((part for part in output if isinstance(part, torch.Tensor)), None)


@contextmanager
def _watched(layers: list[torch.nn.Module], ledger: Ledger) -> Iterator[None]:
    """Mark the parts of a pass: forward by the layers' hooks, backward by the gradients of what they return.

    A layer that is run again in the backward pass is not marked again.
    """
    last = len(layers) - 1

    def begins(place: int) -> Callable:
        def hook(module, args):
            if ledger.marks and ledger.marks[-1][1] == (f"F{place - 1}" if place else "P"):
                ledger.mark(f"F{place}")
            elif not ledger.in_backward:
                raise RuntimeError(_NOT_IN_ORDER)

        return hook

    def ends(place: int) -> Callable:
        def hook(module, args, output):
            if ledger.marks[-1][1] != f"F{place}":
                return
            if place == last:  # what the layer was given is dropped only when it has returned
                ledger.mark("H", with_next=True)
            out = _first_tensor(output)
            if out is not None and out.requires_grad:
                out.register_hook(lambda gradient: ledger.mark(f"B{place}"))

        return hook

    handles = [layer.register_forward_pre_hook(begins(place)) for place, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(ends(place)) for place, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batch(model, batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    """A full batch as TRL's collator makes it; a model with images wants to know that none of the tokens is one."""
    names = inspect.signature(model.forward).parameters
    batch = {
        name: torch.ones(batch_size, tokens, dtype=torch.long) for name in ("input_ids", "labels", "attention_mask")
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in names and hasattr(model.config, "vision_config"):
            batch[name] = torch.zeros(batch_size, tokens, dtype=torch.long)
    return batch


def _run(prepared: Prepared, settings: Settings, gpu: GPU, body: Callable) -> tuple[list[Standing], Ledger]:
    ledger, model = Ledger(), prepared.model
    full, family = settings.method == "full", sys.modules[type(_base(model)).__module__]
    with (
        on_a_gpu(ledger, settings.attention, gpu.compute_capability, family, prepared.routed),
        mock.patch.object(Fake4bit, "ledger", ledger),
        torch.device("meta"),
        ledger,
        _watched(prepared.layers, ledger),
    ):
        standing = _made_real(prepared, None if full else getattr(torch, settings.adapter_dtype))
        body(model, ledger)
    return standing, ledger


def trace_step(prepared: Prepared, settings: Settings, gpu: GPU) -> tuple[list[Standing], list[Pass]]:
    """Run the passes of a step: one; or, with accumulation, the first, and another that adds to its gradients.

    Returns:
        What is there throughout the run, and the passes. In both, only the prepared layers are counted.
    """
    of_base = inspect.unwrap(_base(prepared.model))

    def body(model, ledger):
        model.train()
        for _ in range(min(settings.accumulation, 2)):
            ledger.mark("P")
            batch = _batch(of_base, settings.batch_size, settings.max_length)
            if settings.logits == "tiled":
                batch["fused_lm_head"] = True
            with torch.autocast("cpu", dtype=getattr(torch, settings.compute_dtype), enabled=_autocast(settings)):
                loss = model(**batch).loss
            del batch
            ledger.mark("L")
            ledger.in_backward = True
            loss.backward()
            ledger.in_backward = False
            ledger.mark("E")
            del loss
        ledger.mark("end")

    standing, ledger = _run(prepared, settings, gpu, body)
    return standing, _passes(ledger, len(prepared.layers))


def trace_evaluation(prepared: Prepared, settings: Settings, gpu: GPU) -> Pass:
    """Run one batch of an evaluation."""
    of_base = inspect.unwrap(_base(prepared.model))

    def body(model, ledger):
        model.eval()
        ledger.mark("P")
        batch = _batch(of_base, settings.eval_batch_size, settings.max_length)
        if settings.logits == "tiled":
            batch["fused_lm_head"] = True
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype=getattr(torch, settings.compute_dtype), enabled=_autocast(settings)),
        ):
            output = model(**batch)
        del batch
        ledger.mark("E")
        del output
        ledger.mark("end")

    return _passes(_run(prepared, settings, gpu, body)[1], len(prepared.layers))[0]


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _autocast(settings: Settings) -> bool:
    return DTYPES[settings.compute_dtype] == 2


def _passes(ledger: Ledger, layers: int) -> list[Pass]:
    """The ledger's entries, sorted into passes and their parts."""
    last = 2 * layers + 3
    part_of = {"P": 0, "H": layers + 1, "L": layers + 2, "E": last}
    part_of |= {f"F{place}": 1 + place for place in range(layers)}
    part_of |= {f"B{place}": last - 1 - place for place in range(layers)}
    births, deaths = np.array(ledger.births), np.array(ledger.deaths)
    sizes, kinds = np.array(ledger.sizes), np.array([kind or "" for kind in ledger.kinds])
    starts = [place for place, (_, name) in enumerate(ledger.marks) if name == "P"]
    passes = []
    for first, after in zip(starts, [*starts[1:], len(ledger.marks) - 1], strict=True):
        marks = ledger.marks[first:after]
        forward = [name for _, name in marks if name[0] == "F"]
        if forward != [f"F{place}" for place in range(layers)]:
            raise RuntimeError(_NOT_IN_ORDER)
        begin, end = marks[0][0], ledger.marks[after][0]
        times = np.array([time for time, _ in marks])
        parts = np.array([part_of[name] for _, name in marks])
        lengths = np.zeros(last + 1, dtype=np.int64)
        np.add.at(lengths, parts, np.diff([*times, end]))
        here = (births >= begin) & (births < end)
        born, dies = births[here], np.minimum(deaths[here], ALIVE)
        of_birth = np.searchsorted(times, born, side="right") - 1
        inside = dies < end
        of_death = np.searchsorted(times, np.where(inside, dies, begin), side="right") - 1
        passes.append(
            Pass(
                layers,
                sizes[here],
                kinds[here],
                parts[of_birth],
                born - times[of_birth],
                np.where(inside, parts[of_death], np.where(dies == ALIVE, -1, last)),
                np.where(inside, dies - times[of_death], np.where(dies == ALIVE, 0, lengths[last] - 1)),
                lengths,
            )
        )
    return passes
