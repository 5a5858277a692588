"""Runs as tutorials write them, without the safeguards of `qlora_helpers.training.run`, to show what each fault does.

Both runs take the course's `Settings`, so that they differ from the course's own run only in the fault. The adapters
are float32 here, too; what bfloat16 does to them is another matter (lesson 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import peft
import torch
import transformers
import trl

from qlora_helpers import validation
from qlora_helpers.hardware import Hardware, given_or_detected
from qlora_helpers.settings import SCHEDULES, Settings
from qlora_helpers.training.trainer import no_progress_bars

if TYPE_CHECKING:
    from qlora_helpers.chats import Chat

__all__ = ["collator_run", "sft_run", "sft_trainer"]


def _common(folder: str | Path, settings: Settings, hardware: Hardware) -> dict:
    """The arguments that transformers.TrainingArguments and trl.SFTConfig have in common."""
    on_gpu = hardware.device == "cuda"
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup_steps,
        "lr_scheduler_type": SCHEDULES[settings.schedule],
        "max_grad_norm": settings.max_grad_norm or 0.0,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and hardware.compute_dtype == torch.bfloat16,
        "fp16": on_gpu and hardware.compute_dtype == torch.float16,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": settings.seed,
        "dataloader_pin_memory": on_gpu,
    }


def _lora(settings: Settings) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _run(trainer: transformers.Trainer) -> transformers.Trainer:
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.model.eval()
    return trainer


def sft_trainer(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    folder: str | Path,
    settings: Settings,
    *,
    assistant_only_loss: bool = False,
    max_length: int | None = 1024,
    plain_arguments: bool = False,
    hardware: Hardware | None = None,
) -> trl.SFTTrainer:
    """TRL's trainer with TRL's own defaults. It takes all that TRL takes.

    Args:
        rows: each with "messages", or with "text" that a chat template has rendered.
        assistant_only_loss, max_length: as `trl.SFTConfig` takes them; the values here are TRL's defaults.
        plain_arguments: pass `transformers.TrainingArguments`, which has neither of the two; TRL uses its defaults.

    Raises:
        ValueError: one of these three, or `hardware`, is of a wrong kind.
    """
    assistant_only_loss = validation.switch("assistant_only_loss", assistant_only_loss)
    plain_arguments = validation.switch("plain_arguments", plain_arguments)
    if max_length is not None:
        max_length = validation.whole("max_length", max_length, otherwise="None for any length")
    options = _common(folder, settings.for_rows(len(rows)), given_or_detected(hardware))
    if plain_arguments:
        config = transformers.TrainingArguments(**options)
    else:
        config = trl.SFTConfig(
            assistant_only_loss=assistant_only_loss, max_length=max_length, gradient_checkpointing=False, **options
        )
    with no_progress_bars():
        return trl.SFTTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=_lora(settings),
        )


def sft_run(*args: Any, **options: Any) -> trl.SFTTrainer:
    """Build the trainer of `sft_trainer` and train. Its model is in evaluation mode afterwards."""
    return _run(sft_trainer(*args, **options))


def collator_run(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    chats: list[Chat],
    folder: str | Path,
    settings: Settings,
    hardware: Hardware | None = None,
) -> transformers.Trainer:
    """transformers' own trainer with `DataCollatorForLanguageModeling(tokenizer, mlm=False)`, as used before TRL.

    The collator makes the labels: all tokens except those equal to `tokenizer.pad_token`. With TRL 1.16 it would fail,
    since TRL's rows already have labels, which it cannot pad.
    """
    options = _common(folder, settings.for_rows(len(chats)), given_or_detected(hardware))
    rows = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]
    transformers.set_seed(settings.seed)  # the adapters' initial values
    trainer = transformers.Trainer(
        model=peft.get_peft_model(model, _lora(settings)),
        args=transformers.TrainingArguments(**options),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for ids in rows]),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    return _run(trainer)
