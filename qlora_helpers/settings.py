"""The settings of a run: one description for training, the memory predictor and the command line."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qlora_helpers import validation
from qlora_helpers.units import GB, GIB

__all__ = [
    "ATTENTION",
    "BLOCK_SIZES",
    "DTYPES",
    "GPU_OPTIMIZER",
    "GPU_RUN",
    "LOGITS",
    "MEMORY_SETTINGS",
    "METHODS",
    "OF_SEVERAL_GPUS",
    "PREDICTOR_ONLY",
    "SCHEDULES",
    "SHARDED_OPTIMIZERS",
    "SHARDING",
    "SWITCHES",
    "WARMUP_STEPS",
    "Settings",
]

METHODS = ("qlora", "lora", "full")
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # with the bytes per element
ATTENTION = ("sdpa", "math", "eager")
LOGITS = ("tiled", "whole")
SHARDING = ("fsdp",)
SWITCHES = ("activation_offloading", "packing", "compile_layers", "liger_layers", "expandable_segments")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes'
# transformers' name for each. Its own "constant" has no warm-up, whatever warmup_steps says.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
STEPS = 300  # where the settings name neither steps nor epochs
WARMUP_STEPS = 15  # where the settings name none
LEAST_EVALUATIONS = 10  # in a run, where the settings do not say how often
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb)", re.IGNORECASE)
_LARGEST_SEED = 2**32 - 1  # numpy's


@dataclass(frozen=True)
class Settings:
    """The settings of a fine-tuning run. The defaults are those of the course's run with the shipped model.

    Attributes:
        method: "qlora" trains adapters on a frozen 4-bit base, "lora" on an unquantised one; "full" trains all weights
            of an unquantised model.
        steps: how many optimizer steps to train for; None for 300, or for what `epochs` come to.
        epochs: how many times to go through the training chats, instead of `steps`; it may be a fraction.
        batch_size: how many sequences go through the model at once, on all GPUs together.
        accumulation: how many batches make one optimizer step (gradient accumulation).
        max_length: the longest sequence in tokens. Training refuses a longer chat; it does not truncate it. The
            predictor assumes that every sequence is this long.
        learning_rate: its peak, after a linear warm-up; then it follows the schedule.
        warmup_steps: optimizer steps of warm-up, at most `steps`; None for 15, or all steps of a shorter run.
        schedule: of the learning rate after the warm-up: "linear" or "cosine" decay to zero, or "constant".
        max_grad_norm: gradients with a larger norm are clipped to this one; None for no clipping.
        rank: the rank of the two LoRA matrices. "full" uses neither this nor alpha, dropout and target_modules.
        alpha: LoRA's output is scaled by alpha / rank. Where this course compares ranks, alpha is twice the rank unless it says
            otherwise, so that the factor alpha / rank stays the same. With a fixed alpha this factor falls as the rank grows, so
            that at one learning rate the step of an adapter changes with its rank. The default is fixed: it does not follow
            the rank.
        dropout: LoRA dropout, the share of a layer's inputs that its adapter does not see, drawn anew at each step.
        target_modules: the layers that get adapters: "all-linear", or a list of names (q_proj,v_proj on the command line).
        merge_aware: the share of the steps, the last ones, that train with the weights that a merge into the 4-bit base
            will give (`qlora_helpers.training.merge_aware`), so that nothing is lost when the adapter is merged; None for
            no such steps. It is for a run whose adapter will be merged into 4 bits, and for no other use of it. Lesson 6
            takes 0.3, and shows when it pays. It needs "qlora" and a dropout of 0.
        gradient_checkpointing: keep only each layer's input, and recompute the rest in the backward pass.
        checkpointed_layers: with gradient_checkpointing: how many decoder layers are checkpointed, from the first on; None
            for all of them. Each one that is not takes more memory and saves a forward pass through it.
        activation_offloading: with gradient_checkpointing of all layers: keep their inputs in main memory between the
            forward and the backward pass (TRL's option of that name).
        packing: put the chats of a step one after the other into rows of up to max_length tokens, each chat seeing only
            itself, instead of padding each to the longest. A step has the same chats, and no more of them than
            batch_size rows go through the model at once.
        compile_layers: compile each decoder layer with torch.compile. The first steps take seconds to minutes longer.
        liger_layers: replace norms, rotary embeddings and MLPs by liger-kernel's, where that package is installed.
        expandable_segments: let torch's allocator grow its segments, which leaves less memory unused between tensors.
        memory_budget: choose batch_size, accumulation, checkpointed_layers and activation_offloading for the fastest run
            that fits: "auto" for all free memory of the GPU, or bytes, or a text such as "16GiB". The chats of a step
            stay the same. None to leave these settings as they are.
        optimizer: a name that transformers' `optim` takes; None for paged 8-bit AdamW on a GPU, and AdamW on a CPU or with
            sharding.
        compute_dtype: of matrix products, and of all weights that are not in 4 bits; None for what the GPU does best:
            bfloat16, or below compute capability 8.0 float16, and float32 for "full". Training takes it from the
            machine's gear.
        double_quant: store the scales of 4-bit weights in 8 bits.
        save_steps: write a checkpoint every N steps; None for none.
        save_minutes: write a checkpoint at the end of a step when N minutes have passed since the last one; None for
            none.
        keep_checkpoints: how many of the newest checkpoints to keep. With two, a kill while one is being written leaves
            the other. With validation, the one with the lowest validation loss is kept beside them.
        log_steps: log loss and gradient norm every N steps; None for twenty times per run. On a GPU, logging waits for
            the step to end.
        validation: what the run is validated on: a share of the chats, which are then not trained on
            (`qlora_helpers.chats.split`), or the path of a chat file; None for no validation. The model that is saved is
            that of the step with the lowest validation loss.
        eval_steps: measure the validation loss every N steps, and after the last one; None for once per epoch or ten
            times per run, whichever is more often.
        patience: stop after this many evaluations in a row in which the validation loss was not lower than ever
            before; None to make all steps.
        seed: decides the adapters' initial values, the order of the chats, dropout, and which chats are held out.
        adapter_dtype: of LoRA's weights. Plain TRL makes them bfloat16 in a 4-bit model; this course trains float32 ones.
        block_size: how many 4-bit weights share a scale. transformers has no option for any other than 64.
        attention: "sdpa", "math" (torch's math kernel, the only one that a T4 has for grouped-query attention) or
            "eager". Below compute capability 8.0, "sdpa" means this course's gear, which always uses the
            memory-efficient kernel. transformers has no "sdpa" for Gemma 2 and GPT-J: for these it means "eager".
        upcast_fp32: whether `peft.prepare_model_for_kbit_training` was called, which makes 16-bit weights float32.
        logits: "tiled" as TRL's output head makes them, piece by piece; or "whole", one for each token and each entry of
            the vocabulary, as transformers' own Trainer and other stacks do.
        eval_batch_size: of evaluations within the run, on each GPU; None to leave them out of the prediction.
        num_gpus: how many GPUs, each with a process of its own, a step is made on. Each takes batch_size / num_gpus of the
            sequences, so that a run learns the same on any number of them.
        sharding: "fsdp" to split parameters, gradients and optimizer states over the GPUs; None for a whole copy on each.
        cpu_offload: with sharding: keep each GPU's share of them in main memory while it is not in use.

    In a run of epochs, `steps` and `warmup_steps` are None until `for_rows` has counted the steps. The six
    from `adapter_dtype` to `eval_batch_size` describe runs outside this course: the predictor takes any value, training only
    the default.

    Raises:
        ValueError: names the field, its value, and what is allowed.
    """

    method: str = "qlora"
    steps: int | None = None  # a number once it is checked, but for a run of epochs
    epochs: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    max_length: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int | None = None  # as `steps`
    schedule: str = "linear"
    max_grad_norm: float | None = 1.0
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | Iterable[str] = "all-linear"
    merge_aware: float | None = None
    gradient_checkpointing: bool = False
    checkpointed_layers: int | None = None
    activation_offloading: bool = False
    packing: bool = False
    compile_layers: bool = False
    liger_layers: bool = False
    expandable_segments: bool = False
    memory_budget: int | str | None = None
    optimizer: str | None = None
    compute_dtype: str | None = None
    double_quant: bool = True
    save_steps: int | None = None
    save_minutes: float | None = None
    keep_checkpoints: int = 2
    log_steps: int | None = None
    validation: float | str | None = None
    eval_steps: int | None = None
    patience: int | None = None
    seed: int = 0
    adapter_dtype: str = "float32"
    block_size: int = 64
    attention: str = "sdpa"
    upcast_fp32: bool = False
    logits: str = "tiled"
    eval_batch_size: int | None = None
    num_gpus: int = 1
    sharding: str | None = None
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        self._hold(validation.one_of, "method", METHODS)
        self._check_the_step()
        self._check_the_gpus()
        self._check_the_adapters()
        self._check_the_run()

    def _hold(self, checked_by, name: str, *how, **options) -> None:
        """Check a field and keep what the check returns, such as an int instead of a numpy integer."""
        object.__setattr__(self, name, checked_by(name, getattr(self, name), *how, **options))

    def _hold_unless_none(self, checked_by, name: str, *how, **options) -> None:
        if getattr(self, name) is not None:
            self._hold(checked_by, name, *how, **options)

    def _check_the_step(self) -> None:
        for name in ("batch_size", "accumulation", "max_length"):
            self._hold(validation.whole, name)
        self._hold(validation.one_of, "attention", ATTENTION)
        self._hold(validation.one_of, "logits", LOGITS)
        self._hold_unless_none(validation.whole, "eval_batch_size", otherwise="None for no evaluation")
        self._check_speed_and_memory()
        self._hold_unless_none(validation.one_of, "compute_dtype", DTYPES, otherwise="None for the GPU's default")
        if not (self.optimizer is None or (isinstance(self.optimizer, str) and self.optimizer)):
            raise validation.refuse("optimizer", self.optimizer, "name one that transformers' optim takes, or None")
        if self.optimizer:
            object.__setattr__(self, "optimizer", "".join(self.optimizer))  # a plain text

    def _check_speed_and_memory(self) -> None:
        self._hold(validation.switch, "gradient_checkpointing")
        for name in SWITCHES:
            self._hold(validation.switch, name)
        self._hold_unless_none(validation.whole, "checkpointed_layers", at_least=0, otherwise="None for all")
        if self.checkpointed_layers is not None and not self.gradient_checkpointing:
            cure = "needs gradient_checkpointing=True; None leaves it open"
            raise validation.refuse("checkpointed_layers", self.checkpointed_layers, cure)
        if self.activation_offloading and (not self.gradient_checkpointing or self.checkpointed_layers is not None):
            cure = "needs gradient_checkpointing=True and checkpointed_layers=None: what other layers keep is too much to move"
            raise validation.refuse("activation_offloading", True, cure)
        self._hold_unless_none(_budget, "memory_budget")

    def _check_the_gpus(self) -> None:
        self._hold(validation.whole, "num_gpus")
        self._hold_unless_none(validation.one_of, "sharding", SHARDING, otherwise="None for a whole copy on each GPU")
        self._hold(validation.switch, "cpu_offload")
        if self.batch_size % self.num_gpus:
            more = -(-self.batch_size // self.num_gpus) * self.num_gpus
            cure = f"must divide batch_size={self.batch_size}, so that each GPU gets as many sequences; batch_size={more} would do"
            raise validation.refuse("num_gpus", self.num_gpus, cure)
        if self.cpu_offload and not self.sharding:
            raise validation.refuse("cpu_offload", True, "needs sharding='fsdp', whose shards it moves")

    def _check_the_adapters(self) -> None:
        self._hold(validation.whole, "rank")
        self._hold(validation.number, "alpha", above=0)
        self._hold(validation.number, "dropout", at_least=0, below=1)
        self._hold(validation.one_of, "adapter_dtype", DTYPES)
        self._hold(validation.switch, "upcast_fp32")
        self._hold(validation.switch, "double_quant")
        self._hold(validation.whole, "block_size", among=BLOCK_SIZES)
        object.__setattr__(self, "target_modules", _targets(self.target_modules))
        self._check_merge_aware()

    def _check_merge_aware(self) -> None:
        self._hold_unless_none(_share_of_steps, "merge_aware")
        if self.merge_aware is None:
            return
        needs = {
            "method": ("qlora", "only an adapter of a 4-bit base is rounded when it is merged"),
            "dropout": (0, "a merged layer has no dropout"),
            "compile_layers": (False, "its layers are not compiled"),
            "memory_budget": (None, "its memory is not predicted"),
            "sharding": (None, "a layer's weights are rounded whole"),
        }
        for name, (needed, reason) in needs.items():
            if getattr(self, name) != needed:
                raise validation.refuse("merge_aware", self.merge_aware, f"needs {name}={needed!r}: {reason}")

    def _check_the_run(self) -> None:
        self._check_the_length()
        self._hold(validation.number, "learning_rate", above=0)
        self._check_the_warm_up()
        self._hold(validation.one_of, "schedule", SCHEDULES)
        self._hold_unless_none(validation.number, "max_grad_norm", above=0, otherwise="None for no clipping")
        self._hold_unless_none(validation.whole, "log_steps", otherwise="None for twenty times per run")
        self._hold_unless_none(validation.whole, "save_steps", otherwise="None for no checkpoints")
        self._hold_unless_none(validation.number, "save_minutes", at_least=0, otherwise="None for no checkpoints")
        self._hold_unless_none(_held_out, "validation")
        self._hold_unless_none(validation.whole, "eval_steps", otherwise="None for a usual number")
        self._hold_unless_none(validation.whole, "patience", otherwise="None to make all steps")
        self._hold(validation.whole, "seed", at_least=0, at_most=_LARGEST_SEED)
        try:
            self._hold(validation.whole, "keep_checkpoints", at_least=2)
        except ValueError as error:
            raise ValueError(f"{error}; with fewer, a kill can leave none") from None

    def _check_the_length(self) -> None:
        self._hold_unless_none(validation.number, "epochs", above=0, otherwise="None for a run of steps")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", STEPS)
        self._hold_unless_none(validation.whole, "steps", otherwise=f"None for {STEPS}, or for a run of epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs:g}: a run has one length. Give one of them")

    def _check_the_warm_up(self) -> None:
        if self.steps is None:  # checked against them once they are counted
            self._hold_unless_none(validation.whole, "warmup_steps", at_least=0, otherwise=f"None for {WARMUP_STEPS}")
            return
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(WARMUP_STEPS, self.steps))
        # transformers takes a number below 1 for a share of the run, and never ends a warm-up longer than the run
        otherwise = f"None for {WARMUP_STEPS} (all steps of a shorter run)"
        try:
            self._hold(validation.whole, "warmup_steps", at_least=0, at_most=self.steps, otherwise=otherwise)
        except ValueError as error:
            counts = f"It counts steps, and is no share of them: the run has {self.steps}"
            raise ValueError(f"{error}. {counts}") from None

    @property
    def batch_per_gpu(self) -> int:
        """How many sequences go through the model at once on each GPU."""
        return self.batch_size // self.num_gpus

    def steps_per_epoch(self, rows: int) -> int:
        """The optimizer steps of one pass over this many training chats, as transformers counts them.

        The last batch of an epoch may be smaller, and the last step may have fewer batches: no chat is left out, and no
        step reaches into the next epoch.

        Raises:
            ValueError: `rows` is no positive whole number.
        """
        batches = -(-validation.whole("rows", rows) // self.batch_size)
        return -(-batches // self.accumulation)

    def for_rows(self, rows: int) -> "Settings":
        """These settings with `steps` counted and no `epochs`, for a run on this many training chats.

        A part of a step counts as a step, as in transformers' `num_train_epochs`. Settings that have steps stay as they
        are.

        Raises:
            ValueError: `rows` is no positive whole number, or `warmup_steps` is more than the steps.
        """
        per_epoch = self.steps_per_epoch(rows)
        if self.epochs is None:
            return self
        return replace(self, steps=math.ceil(self.epochs * per_epoch), epochs=None)

    def evaluation_interval(self, rows: int) -> int:
        """The steps from one evaluation to the next, in a run with validation on this many training chats.

        Raises:
            ValueError: `rows` is no positive whole number.
        """
        usual = min(self.steps_per_epoch(rows), -(-self.for_rows(rows).steps // LEAST_EVALUATIONS))
        return self.eval_steps or usual


def _budget(name: str, value: object) -> int | str:
    """Bytes, or "auto"."""
    if isinstance(value, str) and "".join(value).strip().lower() == "auto":
        return "auto"
    allowed = 'must be "auto", a number of bytes, or a text such as "16GiB", or None to leave the settings as they are'
    if isinstance(value, str):
        if not (found := _SIZE.fullmatch(value.strip())):
            raise validation.refuse(name, value, allowed)
        size = float(found[1]) * (GIB if found[2].lower() == "gib" else GB)
        size = int(size) if math.isfinite(size) else 0
    else:
        size = value
    try:
        return validation.whole(name, size)
    except ValueError:
        raise validation.refuse(name, value, allowed) from None


def _held_out(name: str, value: object) -> float | str:
    """A share of the chats, or the path of a file."""
    if isinstance(value, str | os.PathLike) and (path := os.fspath(value)) and isinstance(path, str):
        return "".join(path)  # a plain text
    try:
        return validation.number(name, value, above=0, below=1)
    except ValueError:
        allowed = "must be a share of the chats, more than 0 and less than 1, or the path of a chat file, or None"
        raise validation.refuse(name, value, allowed) from None


def _share_of_steps(name: str, value: object) -> float:
    try:
        return validation.number(name, value, above=0, at_most=1)
    except ValueError:
        allowed = "must be a share of the steps, more than 0 and at most 1, or None for no such steps"
        raise validation.refuse(name, value, allowed) from None


def _targets(value: object) -> str | tuple[str, ...]:
    """The names of adapted layers as one tuple, so that equal settings are equal; or "all-linear"."""
    if isinstance(value, str) and value == "all-linear":
        return "all-linear"
    names = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        cure = 'must be "all-linear", or a list of names such as ["q_proj", "v_proj"]'
        raise validation.refuse("target_modules", value, cure)
    names = ["".join(name) for name in names]  # plain texts, where they are numpy's
    return tuple(sorted(names) if isinstance(value, set | frozenset) else names)


# What decides the memory of a usual run of a model from the Hub on one GPU; how it learns is left as in the course's own.
GPU_RUN = Settings(batch_size=1, max_length=2_048, dropout=0.05, gradient_checkpointing=True)

# The memory of a run depends on these settings and on no others.
MEMORY_SETTINGS = (
    "method", "batch_size", "max_length", "accumulation", "rank", "dropout", "target_modules", "gradient_checkpointing",
    "optimizer", "compute_dtype", "double_quant", "adapter_dtype", "block_size", "attention", "upcast_fp32",
    "checkpointed_layers", "activation_offloading", "packing", "compile_layers", "liger_layers", "expandable_segments",
    "logits", "eval_batch_size", "num_gpus", "sharding", "cpu_offload",
)  # fmt: skip

OF_SEVERAL_GPUS = ("num_gpus", "sharding", "cpu_offload")  # what a run on one GPU does not use

GPU_OPTIMIZER = "paged_adamw_8bit"  # on a GPU, where the settings name none
SHARDED_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")  # with sharding; the first where the settings name none

# Training takes only the defaults of these, the predictor any value (see `Settings`).
PREDICTOR_ONLY = (
    "adapter_dtype", "block_size", "attention", "upcast_fp32", "logits", "eval_batch_size",
)  # fmt: skip
