"""A model's decoder layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["counts_layers", "decoder_layers"]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """The name and the list of a model's decoder layers; None if they cannot be told.

    It is the list with the most parameters among those that are as long as the text part's config says; where none is, as
    in a decoder whose config counts the encoder's layers too, among those as long as any other count of layers in it.
    """
    config = model.config.get_text_config(decoder=True)
    counts = {value for name, value in vars(config).items() if counts_layers(name, value)}
    for wanted in ({getattr(config, "num_hidden_layers", None)}, counts):
        found = [
            (sum(parameter.numel() for parameter in module.parameters()), name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) in wanted
        ]
        if found:
            _, name, layers = max(found, key=lambda entry: entry[0])
            return name, layers
    return None


def counts_layers(name: str, value: object) -> bool:
    """Whether a field of a config looks like a number of layers."""
    return "layers" in name and isinstance(value, int) and not isinstance(value, bool) and value > 1
