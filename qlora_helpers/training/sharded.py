"""A model that is sharded over several GPUs: by accelerate and torch's FSDP 2, as transformers' trainer begins them.

FSDP 2 rather than 1, which the guides to QLoRA on several GPUs were written for:

- It keeps the model and its parameters' names, so that the adapters are found, saved and loaded as in any other run.
  FSDP 1 wraps the model in another one and its parameters in flat ones, and with 4-bit weights every adapter matrix in one of
  its own (`peft.utils.other.fsdp_auto_wrap_policy`).
- bitsandbytes (`Params4bit.__torch_function__`, `fix_4bit_weight_quant_state_from_module`) keeps what decodes a 4-bit weight
  with its layer while the weight is a shard, and accelerate (`fsdp2_prepare_model`) leaves such weights where they are
  instead of moving them to the meta device. So `cpu_ram_efficient_loading` has no effect, and each process reads the model.
- transformers saves and loads the adapters alone (`get_fsdp_ckpt_kwargs`), where FSDP 1 gathers the whole model for it.

The paged and 8-bit optimizers of bitsandbytes do not work on shards: their states cannot be gathered into a checkpoint.
The scales of 4-bit weights are not parameters, so that each GPU holds all of them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from transformers import TrainerCallback

from qlora_helpers import validation
from qlora_helpers.launch import Launch
from qlora_helpers.models.loading import check_storage
from qlora_helpers.settings import SHARDED_OPTIMIZERS, Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["HeadOnTheGPU", "ScalesOnTheGPU", "check_sharding", "prepare_sharding", "whole_weights"]


def check_sharding(model: PreTrainedModel | PeftModel, settings: Settings, launch: Launch) -> None:
    """Make sure that a run can be sharded as it was launched.

    Raises:
        ValueError: it cannot; the message says what to change.
    """
    if not settings.sharding:
        return
    if launch.fsdp_version not in (None, 2):
        raise ValueError(
            f"FSDP_VERSION={launch.fsdp_version}: a run is sharded with FSDP 2, which keeps the names of the adapters. Set "
            "fsdp_version: 2, as in data/accelerate/fsdp.yaml"
        )
    if settings.method == "full":
        cure = "full fine-tuning is not sharded here: adapters alone are gathered and saved. Use 'qlora' or 'lora'"
        raise validation.refuse("method", "full", cure)
    if settings.optimizer not in (None, *SHARDED_OPTIMIZERS):
        cure = f"with sharding='fsdp' choose one of {', '.join(SHARDED_OPTIMIZERS)}: bitsandbytes' optimizers take no shards"
        raise validation.refuse("optimizer", settings.optimizer, cure)
    for name in ("compile_layers", "activation_offloading", "liger_layers"):
        if getattr(settings, name):
            raise validation.refuse(name, True, "it was not tried with sharding='fsdp'. Leave out one of the two")
    check_storage(model)


def prepare_sharding(trainer: Trainer, compute_dtype: torch.dtype) -> None:
    """Set what accelerate's configuration leaves open, before the trainer shards the model.

    Gradients are summed in float32, and not in the compute dtype: they are small beside the weights. Checkpoints hold whole
    tensors, which any number of processes can load.

    Raises:
        ValueError: accelerate does not shard this run.
    """
    if not trainer.is_fsdp_enabled:
        raise ValueError(
            "sharding='fsdp': accelerate has not begun it for this run. Start the processes with "
            "accelerate launch --config_file data/accelerate/fsdp.yaml -m qlora_helpers run …"
        )
    plugin = trainer.accelerator.state.fsdp_plugin
    if compute_dtype != torch.float32:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, output_dtype=compute_dtype
        )
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.add_callback(ScalesOnTheGPU)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        trainer.add_callback(HeadOnTheGPU)


class ScalesOnTheGPU(TrainerCallback):
    """Bring the scales of 4-bit weights to where the weights are gathered and decoded.

    They are no parameters, which is why FSDP does not move them, and bitsandbytes moves them along with a whole weight: where
    the model was loaded into main memory, or its shards are kept there, nothing else makes sure of it.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in kwargs["model"].modules():
            if isinstance(layer, bnb.nn.Linear4bit) and layer.quant_state is not None:
                layer.quant_state.to(args.device)


class HeadOnTheGPU(TrainerCallback):
    """Gather an offloaded output head where the loss needs it, from the end of the decoder until the loss's gradient is known.

    TRL's fused loss takes the head's weight and does not run the head, so that FSDP does not gather it. TRL then gathers the
    shards where they lie; of an offloaded model that is main memory, and the loss is made there, on the CPU. With the 8B model
    and 2,048 tokens on each of two H200s that left 200 tokens/s of the 3,300 that there are with this callback.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"].get_base_model()
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            model.base_model.register_forward_hook(partial(_gather_until_its_gradient, head))


def _gather_until_its_gradient(head: FSDPModule, decoder: torch.nn.Module, args: tuple, output: Any) -> None:
    """A forward hook of the decoder, whose output the head is applied to."""
    head.unshard()
    if (hidden := output.last_hidden_state).requires_grad:
        hidden.register_hook(lambda gradient: head.reshard())


def whole_weights(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """The trained weights of a sharded model, gathered into main memory; {} in all processes but the first.

    All processes must call it together.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)
