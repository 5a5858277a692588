"""One fine-tuning run through TRL's SFTTrainer: LoRA on a 4-bit base (QLoRA) or on an unquantised one.

Which of the two it is depends on the model alone (`qlora_helpers.models.load_model`); everything else is the same, so
that a comparison compares what it says. In particular the adapters are float32 in every run: TRL makes them bfloat16
when the base is 4-bit, which would confound the comparison, break float16 training and not survive a resume.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_helpers.chats import Chat, count_tokens
from qlora_helpers.hardware import Hardware, detect
from qlora_helpers.quiet import quieten

quieten()

import datasets
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer


@dataclass(frozen=True)
class Settings:
    """The knobs of a run. The defaults are those of the course's run with the shipped model.

    Attributes:
        steps: optimizer steps.
        batch_size: chats per step.
        learning_rate: the peak; linear warm-up over `warmup_steps`, then linear decay to zero.
        rank, alpha, dropout, target_modules: of LoRA; see `peft.LoraConfig`.
        max_length: the longest chat in tokens. A longer one is refused, not cut.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        optimizer: a name that transformers' `optim` takes; None for paged 8-bit AdamW on a GPU and AdamW on a CPU.
        save_steps: write a checkpoint every so many steps; None for none.
        seed: of the adapters' first values, the order of the chats, and dropout.
    """

    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 15
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    max_length: int = 64
    gradient_checkpointing: bool = False
    optimizer: str | None = None
    save_steps: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "learning_rate", "rank", "alpha", "max_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: must be at least 0 and less than 1")
        if self.save_steps is not None and self.save_steps < 1:
            raise ValueError(f"save_steps={self.save_steps!r}: must be 1 or more, or None for no checkpoints")


@dataclass
class Run:
    """A finished run.

    Attributes:
        model: the PEFT model, adapters attached, in evaluation mode.
        history: (step, loss) as logged, the loss averaged over the steps since the last entry.
        seconds: in `trainer.train()`.
        trainable_parameters, all_parameters: as PEFT counts them.
        adapter_path: the folder with the saved adapter.
    """

    model: torch.nn.Module
    history: list[tuple[int, float]] = field(repr=False)
    seconds: float
    trainable_parameters: int
    all_parameters: int
    adapter_path: Path


class _Recorder(TrainerCallback):
    """Collect the loss, and hand the history to whoever draws it."""

    def __init__(self, on_loss: Callable[[list[tuple[int, float]]], None] | None):
        self.history: list[tuple[int, float]] = []
        self.on_loss = on_loss

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            # the state's own log, which a resumed run finds in its checkpoint
            self.history = [(entry["step"], float(entry["loss"])) for entry in state.log_history if "loss" in entry]
            if self.on_loss:
                self.on_loss(self.history)


class _Bar(TrainerCallback):
    """A progress bar with the loss behind it, in place of the trainer's, which prints a dictionary beside it."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end; None if there is none.

    `trainer_state.json` is written last, so a checkpoint is whole if it parses. A whole one that lacks its optimizer,
    scheduler or random state would be resumed silently from zero by the trainer; it is refused here.

    Raises:
        ValueError: the newest whole checkpoint lacks one of its parts.
    """
    numbered = [(int(p.name.partition("-")[2]), p) for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit()]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue  # cut off while it was written
        missing = [n for n in ("optimizer.pt", "scheduler.pt", "rng_state.pth") if not (path / n).exists()]
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}: a run resumed from it would not be the same run. "
                "Delete this checkpoint to resume from the one before it"
            )
        return path
    return None


def _where_to_start(output_dir: Path, steps: int, resume: bool) -> Path | None:
    """The checkpoint from which to go on, or None for the start; refuse to overwrite or to redo a run."""
    has_adapter = (output_dir / "adapter").exists()
    if not resume:
        if has_adapter or any(output_dir.glob("checkpoint-*")):
            raise FileExistsError(
                f"output_dir={str(output_dir)!r} holds a run already: name a new folder, or pass resume=True"
            )
        return None
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is None:
        if has_adapter:
            raise ValueError(f"the run in {output_dir} is finished and left no checkpoint: load its adapter")
        return None
    done = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    if done >= steps:
        raise ValueError(
            f"the run in {output_dir} is finished ({done} of {steps} steps): load its adapter, or raise steps"
        )
    return checkpoint


def build_trainer(model, tokenizer, chats: list[Chat], output_dir: Path, settings: Settings, hardware: Hardware):
    """The SFTTrainer of a run, its adapters in float32.

    Raises:
        ValueError: a chat is longer than `settings.max_length` tokens.
    """
    for number, chat in enumerate(chats, start=1):
        if (length := count_tokens(chat, tokenizer)) > settings.max_length:
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
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="linear",
        optim=settings.optimizer or ("paged_adamw_8bit" if on_gpu else "adamw_torch"),
        max_length=settings.max_length,
        assistant_only_loss=True,
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=not on_gpu,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        logging_steps=max(1, settings.steps // 20),
        disable_tqdm=True,  # else a notebook gets a progress table of the trainer's own
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        report_to="none",
        seed=settings.seed,
        dataloader_pin_memory=on_gpu,
    )
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
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in chats]),
            processing_class=tokenizer,
            peft_config=lora,
        )
    finally:
        if bars:
            datasets.enable_progress_bars()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # after the trainer: it casts them to bfloat16 itself
    return trainer


def train(
    model,
    tokenizer,
    chats: list[Chat],
    output_dir: str | Path,
    settings: Settings | None = None,
    *,
    hardware: Hardware | None = None,
    resume: bool = False,
    progress_bar: bool = False,
    on_loss: Callable[[list[tuple[int, float]]], None] | None = None,
) -> Run:
    """Fine-tune a model on chats with LoRA, the loss on the assistant's tokens alone; save the adapter.

    Args:
        model: from `load_model`. It is changed: adapters are put into it.
        chats: each a list of messages (`qlora_helpers.chats.read_chats`).
        output_dir: gets `adapter/`, and `checkpoint-N/` if `settings.save_steps` is set.
        resume: go on from the last whole checkpoint in `output_dir`; from the start if there is none.
        progress_bar: show one, for a terminal.
        on_loss: called with the history so far each time the loss is logged, for a live plot.

    Raises:
        FileExistsError: `output_dir` holds a run already, and `resume` is not set.
        ValueError: a chat is too long; the last checkpoint lacks a part; the run in `output_dir` is finished.
    """
    settings, hardware, output_dir = settings or Settings(), hardware or detect(), Path(output_dir)
    if not chats:
        raise ValueError("chats is empty: there is nothing to learn")
    checkpoint = _where_to_start(output_dir, settings.steps, resume)
    trainer = build_trainer(model, tokenizer, chats, output_dir, settings, hardware)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress_bar:
        trainer.add_callback(_Bar)
    recorder = _Recorder(on_loss)
    trainer.add_callback(recorder)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    trainable, total = trainer.model.get_nb_trainable_parameters()
    adapter_path = output_dir / "adapter"
    trainer.model.save_pretrained(adapter_path)
    trainer.model.eval()
    return Run(trainer.model, recorder.history, seconds, trainable, total, adapter_path)
