"""The options of a LoraConfig that a merge takes; any other must have PEFT's default, and is refused by its name.

A list of options that do harm is out of date with each release of PEFT, and the merge is then wrong without a word. So
these are lists of what was held against the logits of the live model, kind by kind (`tests/adapters/test_kinds.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import peft

__all__ = ["DEFAULTS", "IN_MEMORY", "PLAIN", "check_options"]

DEFAULTS: dict[str, Any] = peft.LoraConfig().to_dict()

# where an adapter comes from, how it was trained, which layers it has, how large it is and by what it is scaled
PLAIN = frozenset(
    (
        "alpha_pattern auto_mapping base_model_name_or_path eva_config exclude_modules inference_mode init_lora_weights "
        "layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version "
        "qalora_group_size r rank_pattern revision target_modules task_type use_rslora"
    ).split()
)

# what PEFT's own layers merge rightly, too
IN_MEMORY = PLAIN | frozenset(
    (
        "bias corda_config ensure_weight_tying fan_in_fan_out kasa_config loftq_config lora_ga_config modules_to_save "
        "monteclora_config target_parameters trainable_token_indices use_bdlora use_dora use_qalora velora_config"
    ).split()
)


def check_options(said: str, config: dict[str, Any], taken: Collection[str]) -> None:
    """Refuse an adapter with an option that a merge does not take.

    Args:
        said: what the caller calls the adapter, such as "adapter='runs/1/adapter'".
        config: from its adapter_config.json, or `LoraConfig.to_dict()`.
        taken: the options that may have any value.

    Raises:
        ValueError: it is not a LoRA adapter, or another option has not PEFT's default; the message names the option.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{said} has peft_type={config.get('peft_type')!r}: only LoRA is merged here")
    for key, value in sorted(config.items()):
        # off is None, False or {}; a newer PEFT may write options that this one does not have
        if key in taken or (value or None) == (DEFAULTS.get(key) or None):
            continue
        if key not in DEFAULTS:
            writer = config.get("peft_version", "another version")
            cure = f"PEFT {peft.__version__} does not know it; the adapter was written by {writer}: install that PEFT"
        elif key in IN_MEMORY:
            cure = "a merge from file to file does not do that: merge it with merge() instead"
        else:
            cure = "a merge would be wrong or impossible: keep the adapter beside its base, with load_adapter"
        raise ValueError(f"{said} has {key}={value!r}: {cure}")
