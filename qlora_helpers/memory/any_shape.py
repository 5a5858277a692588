"""The shape of any model that transformers can build, from its config.

`ModelShape` knows a few families by heart, and answers without torch. For every other one the libraries are asked: the
model is built without values, and what it has is counted.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.memory.shape import is_named

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["AnyShape"]

_NO_SHAPE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map", "quantization_config")


@dataclass(frozen=True)
class AnyShape:
    """A model of any family. Make one with `AnyShape.from_config`; sizes count elements.

    Attributes:
        text: its config as JSON, so that shapes can be compared.
        skip: modules that are not in 4 bits although the others are, as the config of a quantised model lists them; None
            for those that transformers leaves out by itself.
        name: of the model; does not count in comparisons.
        assumed: what the config left out and was completed, in sentences.
    """

    text: str
    skip: tuple[str, ...] | None = None
    name: str = field(default="", compare=False)
    assumed: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_config(cls, config: dict, name: str = "", skip: Collection[str] | None = None) -> AnyShape:
        """The shape of the model of a config.

        Args:
            config: a dict as in a `config.json`. A `quantization_config` in it is passed over.
            name, skip: see the class.

        Raises:
            ValueError: the installed transformers does not know the family, or has no language model of it.
        """
        family = config.get("model_type")
        known = _known_families()
        if not isinstance(family, str) or family not in known:
            cure = f"the installed transformers ({_version()}) knows {len(known)} families, and this is none of them"
            raise validation.refuse("model_type", family, f"{cure}; a newer one may")
        kept = {key: value for key, value in config.items() if key not in _NO_SHAPE}
        try:
            text = json.dumps(kept, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config holds something that JSON cannot: {error}") from error
        except RecursionError:
            raise ValueError("config is nested too deeply: give the config.json of a model") from None
        return cls(text, None if skip is None else tuple(skip), name)

    @cached_property
    def config(self) -> dict:
        """As in a `config.json`."""
        return json.loads(self.text)

    @property
    def config_of_a_load(self) -> dict:
        """The config with what it says about modules that stay as they are when the others are in 4 bits."""
        if self.skip is None:
            return self.config
        entry = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": list(self.skip)}
        return self.config | {"quantization_config": entry}

    @property
    def _model(self) -> PreTrainedModel:
        """The model without values: to count, and to look into."""
        try:
            return _model(self.text)
        except Exception as error:
            whose = f"{self.name or 'the model'} ({self.model_type})"
            what = " ".join(str(error).split())
            raise ValueError(
                f"{whose}: transformers {_version()} cannot build it: {type(error).__name__}: {what}. Compare its config "
                "with the config.json of a model of this family, and give what is missing or wrong"
            ) from error

    @cached_property
    def _text_config(self) -> PretrainedConfig:
        config = self._model.config.get_text_config(decoder=True)
        heads, key_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        of_sizes = all(isinstance(count, int) and count > 0 for count in (heads, key_heads))
        if of_sizes and heads % key_heads:  # tensors without values are not asked
            raise validation.refuse("num_key_value_heads", key_heads, f"must divide num_attention_heads={heads}")
        return config

    def _of_text(self, *names: str) -> int | None:
        for name in names:
            value = getattr(self._text_config, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def vocab_size(self) -> int:
        return self._of_text("vocab_size") or 0

    @property
    def hidden_size(self) -> int:
        return self._of_text("hidden_size", "d_model", "n_embd") or 0

    @property
    def num_hidden_layers(self) -> int:
        return self._of_text("num_hidden_layers") or 0

    @property
    def num_attention_heads(self) -> int:
        return self._of_text("num_attention_heads") or 0

    @property
    def num_key_value_heads(self) -> int:
        return self._of_text("num_key_value_heads", "num_attention_heads") or 0

    @property
    def max_position_embeddings(self) -> int | None:
        return self._of_text("max_position_embeddings")

    @cached_property
    def parameters(self) -> int:
        """All parameters; one that two layers share counts once."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @cached_property
    def largest_tensor(self) -> int:
        """Elements of the largest parameter."""
        return max(parameter.numel() for parameter in self._model.parameters())

    @cached_property
    def eager_only(self) -> bool:
        """Whether transformers has no `scaled_dot_product_attention` for it."""
        return not getattr(self._model, "_supports_sdpa", False)

    @cached_property
    def four_bit_layers(self) -> int:
        """How many layers are in 4 bits once the model is loaded so."""
        from qlora_helpers.models.four_bit_rule import quantised_layers

        return len(quantised_layers(self._model, self.skip))

    def lora_parameters(self, rank: int, target_modules: str | Collection[str] = "all-linear") -> int:
        """Trainable parameters of LoRA, as PEFT makes it.

        Raises:
            ValueError: PEFT refuses these layers.
        """
        from qlora_helpers.memory.fake.prediction import parameters_per_rank

        targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
        return rank * parameters_per_rank(self, targets)

    def refuse_unknown(self, target_modules: str | Collection[str]) -> None:
        """Make sure that each name is that of a module: PEFT passes over others as long as one matches.

        Raises:
            ValueError: no module has such a name.
        """
        if target_modules == "all-linear":
            return
        names = [name for name, _ in self._model.named_modules()]
        for target in target_modules:
            if not any(is_named(name, target) for name in names):
                cure = f"no layer is called {target!r}"
                if known := self.linear_names():  # there are none in a GPT-2, whose layers are of a class of their own
                    cure += f". The decoder's are {', '.join(known)}"
                raise validation.refuse("target_modules", list(target_modules), cure)

    def linear_names(self) -> tuple[str, ...]:
        """The last part of the name of each kind of linear layer in the decoder, in order."""
        from torch import nn

        from qlora_helpers.models.decoder_layers import decoder_layers

        found = decoder_layers(self._model)
        layers = found[1] if found else [self._model]
        names = (
            name.rpartition(".")[2]
            for layer in layers
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        )
        return tuple(dict.fromkeys(names))


@lru_cache(maxsize=1)
def _known_families() -> frozenset[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # without torch

    return frozenset(CONFIG_MAPPING_NAMES)


def _version() -> str:
    import transformers

    return transformers.__version__


@lru_cache(maxsize=8)
def _model(text: str) -> PreTrainedModel:
    """The model without values: to count, and to look into."""
    from qlora_helpers.models.meta import meta_model  # only here: it takes seconds to import

    return meta_model(json.loads(text), attention="sdpa")
