"""The decoder layers of any model: which of them are alike, and a model that has only a few of each kind.

A decoder repeats few kinds of layer: all alike, or with and without a window, dense and with experts, attention and state
space. What one of a kind takes, the others take, too; so a step needs to run only some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from qlora_helpers.models.decoder_layers import counts_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["kinds_of", "representatives", "shorten"]

_PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx", "block_idx")  # say where a layer is, not what


def _signature(layer: nn.Module) -> tuple:
    """What decides the memory of a layer: its modules, their shapes, and their settings."""
    parts = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            # numbers with a fraction scale values, and decide no shape
            if key not in _PLACES and not key.startswith("_") and isinstance(value, int | str | bool | None)
        )
        shapes = tuple((key, tuple(p.shape), p.dtype) for key, p in module.named_parameters(recurse=False))
        parts.append((name, type(module).__name__, shapes, settings))
    return tuple(parts)


def kinds_of(layers: Sequence[nn.Module], checkpointed: int) -> tuple[int, ...]:
    """A number for each layer, the same for layers that take the same memory.

    Args:
        checkpointed: so many of the first layers are checkpointed, and differ from the others. The last of them differs,
            too: a checkpointed layer keeps what the one before it returns.
    """
    numbers: dict[tuple, int] = {}
    last = len(layers) - 1
    return tuple(
        numbers.setdefault((_signature(layer), place < checkpointed, min(place + 1, last) < checkpointed), len(numbers))
        for place, layer in enumerate(layers)
    )


def representatives(kinds: Sequence[int]) -> list[int]:
    """The places of the layers that are run: the first, the last, and one of each kind between them.

    The one between is followed by one of its own kind where there is any, since layers hand memory to each other.
    """
    last = len(kinds) - 1
    chosen = {0, last} if kinds else set()
    for kind in dict.fromkeys(kinds[1:last]):
        places = [place for place in range(1, last) if kinds[place] == kind]
        chosen.add(next((place for place in places if kinds[place + 1] == kind), places[0]))
    return sorted(chosen)


def shorten(model: PreTrainedModel, name: str, places: Sequence[int], long_config: bool = False) -> None:
    """Leave only these of a model's decoder layers, and as much in each list of its config that has an entry per layer.

    Args:
        long_config: the config counts as many layers as before, which a model needs that has something for each of them
            outside of them; the entries of the layers that are left come first.
    """
    parent, _, child = name.rpartition(".")
    layers = model.get_submodule(name)
    before = len(layers)
    setattr(model.get_submodule(parent), child, nn.ModuleList(layers[place] for place in places))
    # of the decoder and what it is made of, not of other parts such as a vision tower
    configs = [model.config.get_text_config(decoder=True), model.config]
    configs += [module.config for module in model.get_submodule(parent).modules() if hasattr(module, "config")]
    for config in {id(config): config for config in configs}.values():
        _shorten_config(config, before, places, long_config)


def _shorten_config(config: PretrainedConfig, before: int, places: Sequence[int], long_config: bool) -> None:
    values = vars(config)
    counts = [key for key, value in values.items() if counts_layers(key, value) and value == before]
    if getattr(config, "num_hidden_layers", None) == before:
        counts = ["num_hidden_layers"]
    if not counts:
        return  # of another part, such as a vision tower
    for key, value in list(values.items()):
        if isinstance(value, list | tuple) and len(value) == before:
            entries = [value[place] for place in places]
            setattr(config, key, type(value)([*entries, *value[len(entries) :]] if long_config else entries))
    if spec := values.get("_heterogeneity_spec"):  # what some layers have of their own
        own = {new: spec.per_layer_overrides[old] for new, old in enumerate(places) if old in spec.per_layer_overrides}
        values["_heterogeneity_spec"] = replace(spec, per_layer_overrides=own)
    if not long_config:
        for key in counts:
            setattr(config, key, len(places))
