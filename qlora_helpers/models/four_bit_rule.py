"""Which layers `load_in_4bit` puts into 4 bits, as transformers itself decides it.

transformers replaces a layer by one in 4 bits if it is an `nn.Linear` (or GPT-2's `Conv1D`) and its name is not on a list:
the output head, whatever is tied to another weight, and what the config names. A subclass of `nn.Linear` stays as it is, and
so does every other parameter, whatever its size. The rule is not written down here again: the library is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["quantised_layers", "replace_layers"]


def quantised_layers(model: PreTrainedModel, skip: Sequence[str] | None = None) -> list[str]:
    """The names of the layers that are in 4 bits once a model of this kind is loaded with `load_in_4bit=True`.

    Args:
        model: an unquantised model of transformers, without adapters; one on the "meta" device is enough. It stays as it is.
        skip: the config's `llm_int8_skip_modules`; None for transformers' own list.

    Returns:
        Names as in `model.named_modules()`, in their order.
    """
    before = dict(model.named_modules())
    attributes = dict(vars(model))
    try:
        replace_layers(model, BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=_listed(skip)))
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, bnb.nn.Linear4bit) and module is not before.get(name)
        ]
    finally:
        for name, module in list(model.named_modules()):
            if name and module is not before.get(name):
                model.set_submodule(name, before[name])
        vars(model).clear()
        vars(model).update(attributes)


def replace_layers(
    model: PreTrainedModel,
    quantization_config: BitsAndBytesConfig,
    dtype: torch.dtype | None = None,
    pre_quantized: bool = False,
) -> None:
    """Do to a model without values what transformers does to it before it reads weights: put 4-bit layers in their places.

    Args:
        model: on the "meta" device; changed in place. Its `hf_quantizer` then has the names that stay, as after loading.
        quantization_config: with `load_in_4bit=True`.
        dtype: of the biases of the new layers; by default the model's.
        pre_quantized: whether the weights were saved in 4 bits.
    """
    quantizer = Bnb4BitHfQuantizer(quantization_config, pre_quantized=pre_quantized)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype or model.dtype)  # as transformers does around it, so that biases have it
    try:
        with _no_word_of_eetq():
            quantizer.preprocess_model(model=model, dtype=dtype or model.dtype, device_map=None)
    finally:
        torch.set_default_dtype(kept)
    model.hf_quantizer = quantizer


@contextmanager
def _no_word_of_eetq() -> Iterator[None]:
    """transformers' message for a model in which it finds nothing to quantise names another library, and is ours to say."""
    logger = logging.getLogger("transformers.integrations.bitsandbytes")
    kept = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(kept)


def _listed(skip: Sequence[str] | None) -> list[str] | None:
    return None if skip is None else list(skip)
