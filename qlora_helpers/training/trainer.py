"""The trainer of a run: TRL's SFTTrainer for QLoRA, for LoRA on an unquantised base, or for full fine-tuning.

Trainable parameters are float32 in every run: TRL makes the adapters of a 4-bit base bfloat16, which would confound a
comparison, break float16 training and not survive a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import torch
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from qlora_helpers import validation
from qlora_helpers.chats import Chat, check_chats, check_texts, tokenized
from qlora_helpers.hardware import Hardware, given_or_detected
from qlora_helpers.launch import launch_of_this_process, settings_in
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.settings import GPU_OPTIMIZER, PREDICTOR_ONLY, SCHEDULES, SHARDED_OPTIMIZERS, Settings
from qlora_helpers.training.budget import in_whole_steps, kept_within, plan_of, use_segments_that_grow
from qlora_helpers.training.checkpoints import failed_writing_explained
from qlora_helpers.training.layer_options import (
    checkpoint_first,
    compile_layers,
    layers_that_can_be_checkpointed,
    use_liger,
)
from qlora_helpers.training.packing import PackingCollator, check_packing
from qlora_helpers.training.sharded import check_sharding, prepare_sharding, whole_weights
from qlora_helpers.training.together import ALONE, Together, begin_together
from qlora_helpers.training.whole_steps import ROW_ENDS, ShareOfStep, WithRowEnds, safer, split, without_loss

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_helpers.memory.budget import Plan

__all__ = ["build_trainer", "check_settings", "no_progress_bars"]


# in which a run that is out of memory falls back to a safer choice: later, something else takes the memory
FIRST_STEPS = 10


class _CheckpointAsAsked(TrainerCallback):
    """Say again which layers are checkpointed: the trainer switches all of them on when it starts. And note where it does."""

    def __init__(self, trainer: _Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.started_at = state.global_step
        self.trainer._use_memory_settings()


class _Trainer(SFTTrainer):
    """An SFTTrainer that keeps the loss of each step, and whose evaluations are exact and leave training as it is.

    The losses are kept as tensors: reading them at every step would hold up the GPU.

    Attributes:
        at_work: the settings that the run has now: those that were chosen for its memory budget, or fell back from them.
        plan: how they were chosen; None without a budget.
        started_at: the step after which this process began; that of the checkpoint, if it resumed one.
        peak_bytes: the most that was in tensors on the GPU while it trained within a budget; None before, or without one.
        together: the processes of the run.
    """

    def __init__(self, *args, settings: Settings, plan: Plan | None = None, together: Together = ALONE, **kwargs):
        self.together = together
        self.step_losses: list[tuple[int, torch.Tensor]] = []
        self.at_work, self.plan = settings, plan
        self.started_at, self.peak_bytes = 0, None
        self._operations_per_token: int | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args, **kwargs):
        with kept_within(self.plan):
            result = super().train(*args, **kwargs)
        if self.plan:
            self.peak_bytes = torch.cuda.max_memory_allocated()
        return result

    def training_step(self, model, inputs, num_items_in_batch=None):
        if isinstance(self.data_collator, WithRowEnds):
            loss = self._in_parts(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step + 1
        if self.step_losses and self.step_losses[-1][0] == step:  # with accumulation, each batch has part of the loss
            loss_so_far = self.step_losses.pop()[1]
            self.step_losses.append((step, loss_so_far + loss.detach()))
        else:
            self.step_losses.append((step, loss.detach()))
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss as SFTTrainer computes it, without its metrics, for each of which the CPU waits for the GPU."""
        inputs.pop(ROW_ENDS, None)  # of an evaluation
        if self.aux_loss_enabled or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with_fused_head = model  # SFTTrainer has put its own output head into it
        outputs = with_fused_head(**inputs, use_cache=False, fused_lm_head=True)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(tokens).clamp(min=1)
        # the trainer has counted the tokens of all processes, whose gradients are then averaged, and not summed
        return loss if num_items_in_batch is None else loss * self.together.launch.processes

    def _in_parts(self, model, inputs, num_items_in_batch):
        """A whole step in parts of as many rows as the settings say. The loss of each is a share of the step's."""
        while True:
            try:
                parts = list(split(inputs, self.at_work.batch_per_gpu))
                # all processes make as many, since they exchange gradients, and with sharding weights, at each
                parts += [without_loss(parts[-1])] * (self.together.largest(len(parts)) - len(parts))
                # by which TRL divides the loss of the experts' router
                self.current_gradient_accumulation_steps = len(parts)
                return sum(self._of_part(model, part, num_items_in_batch, part is parts[-1]) for part in parts)
            except torch.OutOfMemoryError as error:
                late = self.state.global_step - self.started_at >= FIRST_STEPS
                if self.plan is None or late or not (found := safer(self.at_work)):
                    raise
                said = str(error).splitlines()[0]
            # outside of the except block, whose traceback keeps the step's tensors
            self.at_work, words = found
            print(f"Out of GPU memory in step {self.state.global_step + 1}: it is made again with {words}. ({said})")
            model.zero_grad(set_to_none=True)
            self._use_memory_settings()
            torch.cuda.empty_cache()

    def _of_part(self, model, part, num_items_in_batch, last: bool):
        """The loss of a part, whose gradients are exchanged with those of the parts before it after the last one."""
        with nullcontext() if last else self.accelerator.no_sync(model):
            return super().training_step(model, part, num_items_in_batch)

    def _use_memory_settings(self) -> None:
        """Checkpoint the layers and keep their inputs as the settings at work say."""
        settings = self.at_work
        if settings.gradient_checkpointing and not self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
            if settings.method != "full":
                self.model.enable_input_require_grads()
        if settings.checkpointed_layers is not None or self.plan:
            checkpoint_first(self.model, settings)
        if settings.activation_offloading and not self.args.activation_offloading:
            self.maybe_activation_offload_context = get_act_offloading_ctx_manager(model=self.model)

    def floating_point_ops(self, inputs):
        """As transformers counts them, but without counting the model's parameters anew at every step."""
        tokens = inputs["input_ids"].numel()
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) // tokens
        return tokens * self._operations_per_token

    def evaluate(self, *args, **kwargs):
        """Evaluate without a trace in the random state, from which a data loader draws a number when it begins."""
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The mean loss of all answer tokens. transformers' is the mean of its batches, of however many tokens each."""
        self.model.eval()  # the next training step sets it back
        total, count = 0.0, 0
        for inputs in dataloader:
            tokens = (inputs["labels"][:, 1:] != -100).sum()
            loss, _, _ = self.prediction_step(self.model_wrapped, inputs, prediction_loss_only=True)
            total, count = total + loss.double() * tokens, count + tokens
        total, count = self.together.summed(torch.stack([total, count.double()]))
        metrics = {f"{metric_key_prefix}_loss": (total / count).item()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    def _get_dataloader(self, *args, **kwargs):
        """Each process reads all chats of a step, of which its collator takes a share (see `whole_steps.ShareOfStep`)."""
        loader = super()._get_dataloader(*args, **kwargs)
        if self.together.launch.processes > 1:
            # as the trainer does where a sampler knows of the other processes
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            loader.batch_sampler.even_batches = False
        return loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained; of a sharded model that alone is gathered, and not the base with it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_checkpoint(self, *args, **kwargs):
        with failed_writing_explained(Path(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    output_dir: Path,
    settings: Settings,
    hardware: Hardware,
    validation_chats: Sequence[Chat] = (),
    together: Together | None = None,
) -> SFTTrainer:
    """Build the SFTTrainer of a run, with the trainable parameters in float32.

    Args:
        chats: all of them are trained on; `settings.validation` takes none away.
        validation_chats: whose loss is measured before the first step, as often as `settings` say, and at the end.
        together: the processes of the run; by default those that this one was launched with.

    Raises:
        ValueError: the model is not of the kind that the settings describe; a setting has a value that only the
            predictor takes; or a chat has a fault that `read_chats` would find, is longer than `settings.max_length`
            tokens, or its answers cannot be told from the rest, as in `qlora_helpers.chats.tokenized`.
    """
    together = begin_together(given_or_detected(hardware)) if together is None else together
    launch = together.launch
    settings = settings_in(launch, settings)
    check_settings(model, settings, hardware)
    plan = plan_of(model, settings, hardware)
    at_work = plan.chosen.settings if plan else settings
    rows, validation_rows = _rows(chats, tokenizer, settings.max_length), None
    if validation_chats:
        try:
            validation_rows = datasets.Dataset.from_list(_rows(validation_chats, tokenizer, settings.max_length))
        except ValueError as error:
            raise ValueError(f"validation {error}") from None
    eval_steps = settings.evaluation_interval(len(rows)) if validation_rows else None
    names = ("gradient_checkpointing", "checkpointed_layers", "activation_offloading")
    chosen = {name: getattr(at_work, name) for name in names}
    # the chats of a step, and how many steps they make, are the settings' own, however a step is split
    as_asked = replace(settings.for_rows(len(rows)), **chosen)
    config = _config(output_dir, as_asked, hardware, eval_steps, at_work.batch_size, whole=in_whole_steps(settings))
    use_segments_that_grow(settings, hardware)
    set_seed(settings.seed)  # the adapters' initial values are drawn while the trainer is built
    with no_progress_bars():
        trainer = _Trainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=validation_rows,
            processing_class=tokenizer,
            peft_config=None if settings.method == "full" else _lora(settings),
            settings=at_work,
            plan=plan,
            together=together,
        )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # only now, since the trainer makes adapters bfloat16; float16 gradients could not be unscaled
            parameter.data = parameter.data.float()
    # our loss is that of all tokens of a step for every model; some have no use for their number in a loss of their own
    trainer.model_accepts_loss_kwargs = True
    _make_fast(trainer, [*rows, *(validation_rows or ())], hardware)
    if settings.sharding:
        prepare_sharding(trainer, hardware.compute_dtype)
    if not launch.leads:
        set_seed(settings.seed + launch.rank)  # the adapters are alike now; each process drops out other inputs
    return trainer


def _make_fast(trainer: _Trainer, rows: list[dict], hardware: Hardware) -> None:
    """Pack the rows, and change the layers, as the settings say.

    Args:
        rows: of training and of validation.
    """
    settings, model = trainer.at_work, trainer.model
    if settings.packing:
        pad = trainer.data_collator.pad_token_id
        if len(rows) > 1:
            check_packing(model, rows, pad)
        trainer.data_collator = PackingCollator(pad, settings.max_length)
    launch = trainer.together.launch
    if launch.processes > 1:
        trainer.data_collator = ShareOfStep(trainer.data_collator, launch.rank, launch.processes)
    if in_whole_steps(settings) or trainer.plan:
        trainer.data_collator = WithRowEnds(trainer.data_collator, keep_mask=trainer.aux_loss_enabled)
    if settings.liger_layers:
        use_liger(model)
    if settings.compile_layers:
        compile_layers(model, hardware.device, sizes_vary=settings.packing)
    if settings.checkpointed_layers is not None:
        layers_that_can_be_checkpointed(model)  # raises what would otherwise be raised when the run has begun
    if settings.checkpointed_layers is not None or trainer.plan:
        trainer.add_callback(_CheckpointAsAsked(trainer))


def check_settings(model: PreTrainedModel | PeftModel, settings: Settings, hardware: Hardware) -> None:
    """Make sure that the settings describe a run of this model on this machine.

    Raises:
        ValueError: they do not; the message names the setting and the cure.
    """
    if not isinstance(settings, Settings):
        raise validation.refuse("settings", settings, "give a Settings(...)")
    given_or_detected(hardware)
    quantised = getattr(model, "is_quantized", False)
    if settings.method == "qlora" and not quantised:
        cure = "the model has no 4-bit layers. Load it with quantization='nf4', or use 'lora'"
        raise validation.refuse("method", "qlora", cure)
    if settings.method == "lora" and quantised:
        cure = "the model has 4-bit layers. Load it with quantization=None, or use 'qlora'"
        raise validation.refuse("method", "lora", cure)
    if settings.method == "full" and quantised:
        cure = "4-bit weights cannot be trained. Load the model with quantization=None, or use 'qlora'"
        raise validation.refuse("method", "full", cure)
    for name in PREDICTOR_ONLY:
        used = Settings.__dataclass_fields__[name].default
        if getattr(settings, name) != used:
            cure = f"only the predictor takes it; training uses {used!r}. Leave it out"
            raise validation.refuse(name, getattr(settings, name), cure)
    if settings.optimizer is not None:
        validation.one_of("optimizer", settings.optimizer, [name.value for name in OptimizerNames], otherwise="None")
    if settings.method != "full" and settings.target_modules != "all-linear":
        _check_targets(model, settings.target_modules)
    check_sharding(model, settings, launch_of_this_process())
    gear = str(hardware.compute_dtype).removeprefix("torch.")
    if settings.compute_dtype not in (None, gear):
        cure = f"the {hardware.gear} gear computes in {gear}. Leave it out, or choose another gear with QLORA_GEAR"
        raise validation.refuse("compute_dtype", settings.compute_dtype, cure)


def _check_targets(model, targets: tuple[str, ...]) -> None:
    """PEFT passes over a name that matches nothing as long as another one does."""
    layers = [name for name, _ in linear_layers(model)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise validation.refuse(
                "target_modules", list(targets), f"{target!r} is no linear layer. There are {known}"
            )


def _rows(chats: list[Chat], tokenizer, max_length: int) -> list[dict]:
    """The chats as the trainer takes them: tokens, and which of them are the assistant's."""
    check_chats(chats)  # they need not come from `read_chats`
    check_texts(chats, tokenizer)
    rows = tokenized(chats, tokenizer)
    for number, row in enumerate(rows, start=1):
        if len(row["input_ids"]) > max_length:
            raise ValueError(
                f"chat {number} has {len(row['input_ids'])} tokens, over max_length={max_length}: its answer would be cut. "
                "Raise max_length or shorten the chat"
            )
    return rows


def _config(
    output_dir: Path, settings: Settings, hardware: Hardware, eval_steps: int | None, rows: int, whole: bool
) -> SFTConfig:
    """The trainer's own settings.

    Args:
        rows: of a batch of an evaluation.
        whole: the trainer takes all chats of a step as one batch.

    Batches are those of all processes together, each of which takes its share of every one.
    """
    accumulation = 1 if whole else settings.accumulation
    on_gpu = hardware.device == "cuda"
    dtype = hardware.compute_dtype
    config = SFTConfig(
        output_dir=str(output_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size * settings.accumulation // accumulation,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_grad_norm or 0.0,  # the trainer takes 0 for no clipping
        optim=settings.optimizer or _usual_optimizer(settings, on_gpu),
        max_length=settings.max_length,
        assistant_only_loss=False,  # the rows already mark the assistant's tokens; TRL would look for them itself
        packing=False,  # TRL's changes which chats a step has; see qlora_helpers.training.packing
        gradient_checkpointing=settings.gradient_checkpointing,
        activation_offloading=settings.activation_offloading and on_gpu,
        use_cpu=not on_gpu,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        logging_steps=settings.log_steps or max(1, settings.steps // 20),
        disable_tqdm=True,  # else the trainer shows a progress table of its own in a notebook
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        eval_on_start=eval_steps is not None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        logging_nan_inf_filter=False,  # it would show the mean of earlier losses instead of a NaN
        report_to="none",
        seed=settings.seed,
        data_seed=settings.seed,  # as by default; but the processes draw other dropout, and must not draw other orders
        ddp_find_unused_parameters=False,  # all adapters take part in each step
        dataloader_pin_memory=on_gpu,
    )
    if config.n_gpu > 1:
        config._n_gpu = 1  # in a notebook: see `qlora_helpers.training.together.check_launch`
    return config


def _usual_optimizer(settings: Settings, on_gpu: bool) -> str:
    if settings.sharding:
        return SHARDED_OPTIMIZERS[0]
    return GPU_OPTIMIZER if on_gpu else "adamw_torch"


def _lora(settings: Settings) -> LoraConfig:
    targets = settings.target_modules
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`, which shows one for each pass over the rows."""
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
