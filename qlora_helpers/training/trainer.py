"""The trainer of a run: TRL's SFTTrainer with LoRA on a 4-bit base (QLoRA) or on an unquantised one, or with all weights.

What is trained is float32 in every run: TRL makes the adapters of a 4-bit base bfloat16, which would confound a comparison,
break float16 training and not survive a resume.
"""

from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from qlora_helpers.chats import Chat, lengths_of
from qlora_helpers.hardware import Hardware
from qlora_helpers.settings import SCHEDULES, Settings


class _Trainer(SFTTrainer):
    """An SFTTrainer that keeps the loss of each step, as tensors: reading them at every step would hold the GPU up."""

    def __init__(self, *args, **kwargs):
        self.step_losses: list[tuple[int, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step + 1
        if self.step_losses and self.step_losses[-1][0] == step:  # with accumulation each batch has a part of the loss
            loss_so_far = self.step_losses.pop()[1]
            self.step_losses.append((step, loss_so_far + loss.detach()))
        else:
            self.step_losses.append((step, loss.detach()))
        return loss


def build_trainer(model, tokenizer, chats: list[Chat], output_dir: Path, settings: Settings, hardware: Hardware):
    """The SFTTrainer of a run, what it trains in float32.

    Raises:
        ValueError: a chat is longer than `settings.max_length` tokens; or all weights of a 4-bit model are to be trained.
    """
    full = settings.method == "full"
    if full and getattr(model, "is_quantized", False):
        raise ValueError(
            "method='full': 4-bit weights cannot be trained. Load the model with quantization=None, or use 'lora'"
        )
    for number, length in enumerate(lengths_of(chats, tokenizer), start=1):
        if length > settings.max_length:
            raise ValueError(
                f"chat {number} has {length} tokens, over max_length={settings.max_length}: its answer would be cut. "
                "Raise max_length or shorten the chat"
            )
    on_gpu = hardware.device == "cuda"
    dtype = hardware.compute_dtype
    config = SFTConfig(
        output_dir=str(output_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_grad_norm or 0.0,  # the trainer takes 0 for no clipping
        optim=settings.optimizer or ("paged_adamw_8bit" if on_gpu else "adamw_torch"),
        max_length=settings.max_length,
        assistant_only_loss=True,
        packing=False,  # it is meant for FlashAttention, which a T4 has not
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=not on_gpu,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        logging_steps=settings.log_steps or max(1, settings.steps // 20),
        disable_tqdm=True,  # else a notebook gets a progress table of the trainer's own
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.keep_checkpoints,
        logging_nan_inf_filter=False,  # it would show the mean of the losses before in place of a NaN
        report_to="none",
        seed=settings.seed,
        dataloader_pin_memory=on_gpu,
    )
    if config.n_gpu > 1:
        print(f"{config.n_gpu} GPUs are here. This run uses the first one: TRL refuses to split a batch over several.")
        config._n_gpu = 1
    targets = settings.target_modules
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    set_seed(settings.seed)  # the adapters' first values are drawn while the trainer is built
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        trainer = _Trainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in chats]),
            processing_class=tokenizer,
            peft_config=None if full else lora,
        )
    finally:
        if bars:
            datasets.enable_progress_bars()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # after the trainer, which makes adapters bfloat16 itself; float16 gradients could not be unscaled
            parameter.data = parameter.data.float()
    return trainer
