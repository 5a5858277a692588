"""Measured beside predicted: what a run really takes, phase by phase, and what `qlora_helpers.memory` said before.

measurement = Measurement()
with measurement.phase("load"):
    model = load_model(name)
trainer = build_trainer(model, tokenizer, chats, folder, settings, hardware)
trainer.add_callback(MemoryCallback(measurement))
trainer.train()
print(compare(predict(shape_of(trainer), run_of(trainer), "t4"), measurement))
"""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from qlora_helpers.attention import REPEATED_KV
from qlora_helpers.hardware import detect
from qlora_helpers.memory import FineTuning, ModelShape, Prediction
from qlora_helpers.memory.prediction import EAGER_ONLY
from qlora_helpers.quiet import quieten

quieten()  # before bitsandbytes is imported

import bitsandbytes as bnb
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

GIB, MIB = 2**30, 2**20
LOAD, FIRST_STEP, STEADY_STEPS = "load", "first step", "steady steps"
TOLERANCE = 0.10  # a prediction that is farther off is marked
LOOK_EVERY = 0.01  # seconds between two looks at the main memory
# settings of TrainingArguments and SFTConfig that change the step in ways the predictor does not know
NOT_PREDICTED = ("use_liger_kernel", "activation_offloading", "packing", "padding_free", "deepspeed", "fsdp")
OUTSIDE = ("optimizer (paged)", "CUDA context")  # parts of a prediction that are not in torch's allocator


@dataclass(frozen=True)
class Phase:
    """What one phase took, in bytes; the GPU's figures are None where none was measured.

    Attributes:
        allocated_bytes: in torch's tensors when the phase ended, garbage collected.
        peak_allocated_bytes, peak_reserved_bytes: the most in torch's tensors, and the most that its allocator held for
            them; both since the phase began. What was there before the phase counts.
        device_used_bytes: in use on the whole card when the phase ended (`torch.cuda.mem_get_info`): this process with
            its CUDA context and paged states, and whatever else runs there.
        resident_bytes: the most main memory that this process was seen to hold, file pages mapped into it included. It
            is looked at every 10 ms; a shorter peak is missed.
    """

    allocated_bytes: int | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    device_used_bytes: int | None
    resident_bytes: int


class _ResidentMemory:
    """The most main memory of this process, looked at by a thread.

    The kernel's own peak cannot be set back without spoiling `hardware.peak_memory_bytes` for everyone else.
    """

    def __init__(self):
        self.process = psutil.Process()
        self.highest = 0
        self.look()
        # The thread holds no reference: it also ends when a run fails and nobody asks any more.
        threading.Thread(target=self._watch, args=(weakref.ref(self),), daemon=True).start()

    def look(self) -> int:
        self.highest = max(self.highest, self.process.memory_info().rss)
        return self.highest

    @staticmethod
    def _watch(reference) -> None:
        while (watched := reference()) is not None:
            watched.look()
            del watched
            time.sleep(LOOK_EVERY)


class Measurement:
    """The memory of a run, phase by phase, in the order in which the phases ended.

    Args:
        on_gpu: read the GPU's figures, too; by default if this machine's gear uses one.
    """

    def __init__(self, on_gpu: bool | None = None):
        self.on_gpu = detect().device == "cuda" if on_gpu is None else on_gpu
        self.phases: dict[str, Phase] = {}
        self.running: str | None = None
        self._resident: _ResidentMemory | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside the `with`; it is not recorded if it fails.

        Raises:
            RuntimeError: another phase is running. There is one peak at a time to read.
        """
        self.begin(name)
        try:
            yield
        except BaseException:
            self.drop()
            raise
        self.end()

    def begin(self, name: str, clean: bool = True) -> None:
        """Begin a phase; see `phase`. `clean` gives unused memory back first, so that no phase before is counted."""
        if self.running:
            raise RuntimeError(
                f"the phase {name!r} cannot begin while {self.running!r} is measured: end that one first"
            )
        if clean:
            gc.collect()
        if self.on_gpu:
            if clean:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.running, self._resident = name, _ResidentMemory()

    def end(self) -> None:
        """End the running phase and record it; one of the same name is replaced."""
        name, resident = self.running, self._resident.look()
        self.drop()
        peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if self.on_gpu else [None, None]
        gc.collect()
        allocated = used = None
        if self.on_gpu:
            allocated = torch.cuda.memory_allocated()
            free, total = torch.cuda.mem_get_info()
            used = total - free
        self.phases.pop(name, None)  # so that its new place is the last one
        self.phases[name] = Phase(allocated, *peaks, used, resident)

    def drop(self) -> None:
        """End the running phase and forget it."""
        self.running = self._resident = None

    def __str__(self) -> str:
        columns = ("after it", "peak", "peak reserved", "on the card", "main memory")
        lines = [f"{'measured':26}" + "".join(f"{column:>15}" for column in columns)]
        for name, phase in self.phases.items():
            sizes = vars(phase).values()
            lines.append(f"{name:26}" + "".join(f"{_size(size):>15}" for size in sizes))
        return "\n".join(lines)


class MemoryCallback(TrainerCallback):
    """Measures training: the first step that changes the weights, and all steps behind it.

    The optimizer makes its states in the first step, so the peak of a run is that of the steady steps. Steps whose
    gradients overflowed float16 change nothing; those before the first that does belong to it.
    """

    def __init__(self, measurement: Measurement | None = None):
        self.measurement = measurement or Measurement()

    def on_train_begin(self, args, state, control, **kwargs):
        if self.measurement.running in (FIRST_STEP, STEADY_STEPS):
            self.measurement.drop()  # training before this one failed
        self.measurement.begin(FIRST_STEP)
        self.steps = 0

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if getattr(optimizer, "step_was_skipped", False):
            return
        self.steps += 1
        if self.steps == 1:
            self.measurement.end()
            self.measurement.begin(STEADY_STEPS, clean=False)  # the allocator goes on as it would

    def on_train_end(self, args, state, control, **kwargs):
        if self.steps > 1:
            self.measurement.end()
        else:
            self.measurement.drop()


# The settings of a live run


def _model_of(trainer_or_model):
    return getattr(trainer_or_model, "model", None) if hasattr(trainer_or_model, "args") else trainer_or_model


def shape_of(trainer_or_model) -> ModelShape:
    """The shape of a live model, with or without adapters, or of a trainer's.

    Raises:
        ValueError: its architecture is none that the predictor knows.
    """
    model = _model_of(trainer_or_model)
    return ModelShape.from_config((model.get_base_model() if isinstance(model, PeftModel) else model).config)


def run_of(trainer_or_model, args=None, seq_len: int | None = None) -> FineTuning:
    """The settings that the predictor needs, read from a run that is ready to start.

    Args:
        trainer_or_model: a trainer, which has its arguments; or a model, adapters attached.
        args: the `TrainingArguments` or `SFTConfig`; needed with a model, by default those of the trainer.
        seq_len: tokens of a full sequence; by default the arguments' `max_length`.

    Raises:
        ValueError: the run cannot be told from what is given, or is of a kind that the predictor does not know: the
            message says which.
    """
    model = _model_of(trainer_or_model)
    args = args or getattr(trainer_or_model, "args", None)
    if args is None:
        raise ValueError("args is missing: a model does not know its batch size; pass the TrainingArguments")
    seq_len = seq_len or getattr(args, "max_length", None)
    if not seq_len:
        raise ValueError(f"seq_len is missing, and {type(args).__name__} has no max_length: pass seq_len")
    for name in NOT_PREDICTED:
        if value := getattr(args, name, None):
            raise ValueError(f"{name} is {value!r}: such a run is not predicted")
    shape, base = shape_of(model), model.get_base_model() if isinstance(model, PeftModel) else model
    four_bit = _four_bit_of(base, shape)
    lora = _lora_of(model, shape) if isinstance(model, PeftModel) else {}
    if four_bit and not lora:
        raise ValueError("model has 4-bit layers and no adapters: there is nothing to train; attach them first")
    method = "qlora" if four_bit else "lora" if lora else "full"
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad] if method == "full" else []
    if frozen:
        raise ValueError(f"model has frozen parameters such as {frozen[0]} and no adapters: this is not predicted")

    loaded_in = _name(base.get_input_embeddings().weight.dtype)
    without_autocast = four_bit.pop("compute_dtype", loaded_in)
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else without_autocast
    upcast = loaded_in == "float32" and compute != "float32"
    if upcast and method == "full":
        raise ValueError(
            f"model was loaded in float32 and computes in {compute}, all of it trained: this is not predicted"
        )
    return FineTuning(
        method=method,
        compute_dtype=compute,
        batch_size=args.per_device_train_batch_size,
        seq_len=seq_len,
        # prepare_model_for_kbit_training switches it on in the model alone
        gradient_checkpointing=bool(args.gradient_checkpointing or base.is_gradient_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        upcast_fp32=upcast,
        attention=_attention_of(base.config, shape),
        accumulation=args.gradient_accumulation_steps,
        **four_bit,
        **lora,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _the_only(values, what: str):
    """The one value that all layers agree on."""
    values = set(values)
    if len(values) != 1:
        raise ValueError(f"{what} differs between layers: {sorted(values)}. Only the same in all of them is predicted")
    return values.pop()


def _four_bit_of(base, shape: ModelShape) -> dict:
    """`double_quant`, `block_size` and `compute_dtype` of the 4-bit layers; empty where there are none."""
    if any(isinstance(module, bnb.nn.Linear8bitLt) for module in base.modules()):
        raise ValueError("model has 8-bit layers: this is not predicted; 4 or 16 bits are")
    layers = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not layers:
        return {}
    expected = shape.num_hidden_layers * len(shape.linears)
    if len(layers) != expected:
        raise ValueError(
            f"model has {len(layers)} layers in 4 bits, not the {expected} of its decoder: this is not predicted"
        )
    return {
        "double_quant": _the_only((layer.weight.quant_state.nested for layer in layers), "double_quant"),
        "block_size": _the_only((layer.weight.quant_state.blocksize for layer in layers), "block_size"),
        "compute_dtype": _the_only((_name(layer.compute_dtype) for layer in layers), "compute_dtype"),
    }


def _lora_of(model, shape: ModelShape) -> dict:
    """`lora_rank`, `lora_dropout`, `target_modules` and `adapter_dtype` of the adapters."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (".lora_A." in name or ".lora_B." in name)
    ]
    if not layers or others:
        found = others[0] if others else type(model).__name__
        raise ValueError(f"model trains something else than plain LoRA: {found}. This is not predicted")
    adapter = _the_only((name for _, layer in layers for name in layer.r), "the adapter's name")
    targets = [linear for linear in shape.linears if any(name.endswith(f".{linear.name}") for name, _ in layers)]
    if len(layers) != shape.num_hidden_layers * len(targets):
        raise ValueError("model has adapters in some decoder layers only, or beside the decoder: this is not predicted")
    return {
        "lora_rank": _the_only((layer.r[adapter] for _, layer in layers), "lora_rank"),
        "lora_dropout": _the_only(
            (getattr(layer.lora_dropout[adapter], "p", 0.0) for _, layer in layers), "lora_dropout"
        ),
        "target_modules": "all-linear"
        if len(targets) == len(shape.linears)
        else tuple(linear.name.rpartition(".")[2] for linear in targets),
        "adapter_dtype": _the_only((_name(layer.lora_A[adapter].weight.dtype) for _, layer in layers), "adapter_dtype"),
    }


def _attention_of(config, shape: ModelShape) -> str:
    """The predictor's name for the attention that a model runs on this machine."""
    used = config._attn_implementation
    if used == "eager":
        return "eager"
    if "flash" in used and shape.model_type in EAGER_ONLY:
        raise ValueError(f"attention is {used!r} in {shape.model_type}: this is not predicted; eager is")
    if used == REPEATED_KV or "flash" in used:
        return "sdpa"
    if used != "sdpa":
        raise ValueError(f"attention is {used!r}: this is not predicted; sdpa, eager and FlashAttention are")
    shared = shape.num_attention_heads != shape.num_key_value_heads
    if shared and torch.cuda.is_available():
        # only FlashAttention and cuDNN know shared key heads (qlora_helpers.attention)
        switched_on = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled()
        if not switched_on or torch.cuda.get_device_capability() < (8, 0):
            return "math"
    return "sdpa"


# Side by side


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def compare(prediction: Prediction, measurement: Measurement) -> str:
    """A table of what was predicted beside what was measured, its parts, and the phases.

    Predicted and measured peaks are those of the steady steps, the card's memory is that at their end. The difference
    is that of the prediction, in per cent of what was measured; one of more than 10 % is marked.

    Raises:
        ValueError: no steady step was measured.
    """
    phases = measurement.phases
    if STEADY_STEPS not in phases:
        raise ValueError(
            f"measurement has no {STEADY_STEPS!r} but {list(phases)}: train two steps or more with a MemoryCallback"
        )
    run, steady, load = prediction.run, phases[STEADY_STEPS], phases.get(LOAD)
    what = f"{run.method}, {run.batch_size} x {run.seq_len:,} tokens, predicted for a {prediction.gpu.name}"
    if measurement.on_gpu:
        lines = [f"{what}, measured on a {torch.cuda.get_device_name()}"]
    else:
        lines = [
            f"{what}.",
            "No GPU was measured here. The main memory below is the whole process's: no prediction stands beside it.",
        ]
    lines.append(f"{'':26}{'predicted':>15}{'measured':>15}{'difference':>15}")
    rows = {
        "after loading": (prediction.loaded_bytes, load.allocated_bytes if load else None),
        "peak, allocated": (prediction.peak_allocated_bytes, steady.peak_allocated_bytes),
        "peak, reserved": (prediction.peak_reserved_bytes, steady.peak_reserved_bytes),
        "on the card": (prediction.device_bytes, steady.device_used_bytes),
    }
    for name, (predicted, measured) in rows.items():
        line = f"{name:26}{_size(predicted):>15}{_size(measured):>15}"
        if measured:
            difference = predicted / measured - 1
            line += f"{difference:>+13.1%}".replace("%", " %")
            line += f"  over {TOLERANCE:.0%}".replace("%", " %") if abs(difference) > TOLERANCE else ""
        lines.append(line)
    lines += ["", f"The predicted peak ({prediction.peak_phase}):"]
    lines += [
        f"  {name:24}{_size(size):>15}" for name, size in prediction.parts.items() if size and name not in OUTSIDE
    ]
    outside = {name: prediction.parts[name] for name in OUTSIDE if prediction.parts.get(name)}
    lines += ["Beside torch's allocator:"] if outside else []
    lines += [f"  {name:24}{_size(size):>15}" for name, size in outside.items()]
    return "\n".join([*lines, "", str(measurement)])
