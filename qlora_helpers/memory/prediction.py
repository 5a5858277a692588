"""Predict the peak memory of a fine-tuning run, part by part, from the shape of the model: no GPU, no torch, no download.

The predicted step is that of TRL's SFTTrainer (1.16) with PEFT, bitsandbytes and transformers 5, on full
sequences without padding, from the second step on. What autograd keeps is not fitted: `layers` runs one decoder layer with
sized tensors, and `step` puts the step together. What cannot be derived is a constant here, with the place where it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qlora_helpers import validation
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.gpus import GPU, find_gpu
from qlora_helpers.memory.layers import LayerSettings
from qlora_helpers.memory.loaded import loaded_bytes, weights_by_part
from qlora_helpers.memory.shape import FAMILIES, ModelShape
from qlora_helpers.memory.sharding import (
    GATHERED,
    HOST_TRAINING,
    NCCL_BYTES,
    Gathered,
    check_sharding,
    of_each_gpu,
    shards_of,
)
from qlora_helpers.memory.step import Moment, before_head, last_layer_forward, mask_bytes, moments_of_a_step
from qlora_helpers.memory.trained import OPTIMIZERS, Trained, trained_width, what_is_trained
from qlora_helpers.settings import DTYPES, GPU_OPTIMIZER, SHARDED_OPTIMIZERS, Settings

__all__ = ["Prediction", "needs_libraries", "on_gpu", "predict"]

# Main memory of a process that has loaded the libraries, without a model: Llama-3.1-8B was loaded, tensor by tensor, in
# 1.62 GB, of which 1.05 GB is its largest tensor (data/measured/t4_gear.json).
HOST_PROCESS = 571_000_000
# Fragmentation: memory that torch's allocator cannot reuse between tensors of different sizes, as a share of what comes and
# goes within a step. Chosen with the calibration rows of data/measured/memory.json; `python -m
# data.scripts.measure.memory_errors` shows how far off the predictions are with it.
FRAGMENTATION_WITH_CHECKPOINTING, FRAGMENTATION = 0.14, 0.025


# Measured on an H200 (data/measured/speed.json), as shares of the layer at work: what a compiled layer takes more while it
# runs, and one with liger-kernel's parts less; and what a compiled layer that is not checkpointed does not keep, as a share
# of its activations: 0.26 there, for others less is counted on.
COMPILED, LIGER, NOT_KEPT = 0.15, 0.18, 0.2
UNUSED = 0.03  # of what is allocated: what the allocator holds beside it with segments that can grow
# In one pass of the libraries' step: their output head goes through the tokens piece by piece, so that more would take minutes.
MOST_TOKENS = 2**28


@dataclass(frozen=True)
class Prediction:
    """What a run takes, in bytes.

    Attributes:
        settings: of the run, with what they leave to the GPU filled in.
        loaded_bytes: in torch's tensors after the model is loaded, before adapters are attached.
        peak_allocated_bytes, peak_reserved_bytes: the most in torch's tensors within a steady step, and the most that
            torch's allocator holds for them.
        device_bytes: on the card: what torch reserves, the CUDA context, and the paged optimizer states.
        host_bytes_to_load: main memory of one process while it loads the model onto its GPU, without file pages that the system
            may drop.
        disk_bytes: of the model's files in 16 bits.
        peak_phase: the moment of the step at which the peak occurs, one of `phases.MOMENTS`.
        phases: the most in torch's tensors at each of these moments of a steady step, in order.
        road: how it was found: "layers" that are written out in `memory.layers`, or the "libraries" themselves, which ran a
            step on tensors without values.
        why_all: why the libraries had to run all layers of the model rather than a few of each kind; "" otherwise.
        parts: what is alive at the peak, in order. They add up to `peak_allocated_bytes`, except for those that are outside
            torch's allocator: "optimizer (paged)", "CUDA context" and "NCCL". Without checkpointing "checkpointed activations" and
            "recomputed layer" are called "activations" and "layer at work". "16-bit weights" are all weights that are not
            in 4 bits, even if the run has made them float32.
        host_parts: main memory of all processes of the machine while it is most, by part.

    On several GPUs all sizes but `host_parts` are those of one of them, and `disk_bytes` that of the model.
    """

    shape: ModelShape | AnyShape
    settings: Settings
    gpu: GPU
    loaded_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    host_bytes_to_load: int
    disk_bytes: int
    trainable_parameters: int
    peak_phase: str
    parts: dict[str, int] = field(hash=False)
    phases: dict[str, int] = field(hash=False)
    road: str = "layers"
    why_all: str = ""
    host_parts: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def host_bytes_of_run(self) -> int:
        """Main memory that the run takes on its machine, all processes together, in bytes: the sum of `host_parts`."""
        return sum(self.host_parts.values())

    @property
    def spare_bytes(self) -> int:
        """Memory left on the card; negative if the run does not fit. Paged optimizer states count as being on the card.

        The driver may move them to main memory when the card is full, which costs time; the prediction does not rely on it.
        """
        return self.gpu.usable_bytes - self.device_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0


def on_gpu(settings: Settings, gpu: GPU) -> Settings:
    """The settings with what they leave open filled in: the dtype that the GPU computes in, and the optimizer.

    torch does not train float16 weights with loss scaling, so full fine-tuning is in float32 if there is no bfloat16.
    """
    best = "bfloat16"
    if gpu.compute_capability < (8, 0):
        best = "float32" if settings.method == "full" else "float16"
    usual = SHARDED_OPTIMIZERS[0] if settings.sharding else GPU_OPTIMIZER
    return replace(settings, compute_dtype=settings.compute_dtype or best, optimizer=settings.optimizer or usual)


def _check(shape: ModelShape, settings: Settings) -> None:
    validation.one_of("optimizer", settings.optimizer, OPTIMIZERS)
    check_sharding(settings)
    if settings.method != "full" and settings.rank > shape.hidden_size:
        allowed = f"must be no more than the model's hidden size, {shape.hidden_size}"
        raise validation.refuse("rank", settings.rank, allowed)
    if isinstance(shape, AnyShape) and settings.method != "full":
        shape.refuse_unknown(settings.target_modules)
    if settings.merge_aware is not None:
        cure = "its steps take more memory, which was not measured. Leave it out for that of all other steps"
        raise validation.refuse("merge_aware", settings.merge_aware, cure)
    longest = shape.max_position_embeddings
    if longest and settings.max_length > longest:
        allowed = f"must be no more than max_position_embeddings of this model, {longest}"
        raise validation.refuse("max_length", settings.max_length, allowed)


def predict(shape: ModelShape | AnyShape, settings: Settings, gpu: str | GPU = "h200") -> Prediction:
    """Predict the memory of a run.

    The layers of a `ModelShape` are written out here, which takes milliseconds. For any other model, and for what they do
    not know (`needs_libraries`), the libraries run a step without values: a second or two, once torch is imported.

    For a run on several GPUs it is the memory of one of them, the one with the most (`memory.sharding`).

    Args:
        shape: of the model.
        settings: of the run; the number of steps, the learning rate and its schedule do not matter.
        gpu: a name that `gpus.find_gpu` knows, or a GPU.

    Raises:
        ValueError: a setting does not suit this model, or the GPU is not known; or a run with sharding has something that only
            the libraries know.
    """
    if not isinstance(shape, ModelShape | AnyShape):
        raise validation.refuse("shape", shape, f"give a shape, such as find_shape({str(shape)!r})")
    if not isinstance(settings, Settings):
        raise validation.refuse("settings", settings, "give a Settings(...)")
    gpu = find_gpu(gpu)
    settings = on_gpu(settings, gpu)
    _check(shape, settings)
    each = of_each_gpu(settings)
    if not (isinstance(shape, AnyShape) or needs_libraries(settings)):
        found = _by_the_layers(shape, each, gpu, settings)
    elif settings.sharding:
        raise validation.refuse("sharding", settings.sharding, _why_not_sharded(shape, settings))
    else:
        found = _by_the_libraries(shape, each, gpu)
    return _on_all_gpus(_with_more(found), settings)


def _why_not_sharded(shape: ModelShape | AnyShape, settings: Settings) -> str:
    if isinstance(shape, AnyShape):
        known = ", ".join(FAMILIES)
        return f"{shape.name or 'this model'} is a model of the family {shape.model_type}: with sharding only {known} are predicted"
    used = [name for name in ONLY_LIBRARIES if getattr(settings, name) != Settings.__dataclass_fields__[name].default]
    return f"is not predicted together with {' and '.join(used)}. Leave one of them out"


def _on_all_gpus(found: Prediction, settings: Settings) -> Prediction:
    """With what several processes take beside each other: DDP's buckets, NCCL, main memory."""
    number, process = settings.num_gpus, max(found.host_bytes_to_load, HOST_TRAINING)
    buckets = 0
    if number > 1 and not settings.sharding:  # as large as the gradients; DDP fills them when these are there
        buckets = found.trainable_parameters * trained_width(settings)
    outside = NCCL_BYTES if number > 1 else 0
    parts = {"DDP's buckets": buckets} if buckets else {}
    host = found.host_parts or {"processes": number * process}
    if settings.activation_offloading:
        inputs = found.shape.num_hidden_layers * settings.batch_size * settings.max_length * found.shape.hidden_size
        host |= {"checkpoints": inputs * DTYPES[settings.compute_dtype]}
    return replace(
        found,
        settings=settings,
        peak_allocated_bytes=found.peak_allocated_bytes + buckets,
        peak_reserved_bytes=found.peak_reserved_bytes + buckets,
        device_bytes=found.device_bytes + buckets + outside,
        parts=found.parts | parts | ({"NCCL": outside} if outside else {}),
        phases={name: size + buckets for name, size in found.phases.items()},
        host_parts=host,
    )


def _by_the_layers(shape: ModelShape, settings: Settings, gpu: GPU, run: Settings) -> Prediction:
    """The prediction by the layers that are written out.

    Args:
        settings: of each GPU for itself.
        run: the settings of the whole run.
    """
    how = LayerSettings.of(shape, settings, gpu)
    weights, trained, masks = weights_by_part(shape, settings), what_is_trained(shape, settings), mask_bytes(shape, how)
    moments = moments_of_a_step(shape, settings, how, trained)
    parameters, gathered, host, of_gathers = trained.parameters, {}, {}, 0
    host_to_load = 2 * shape.largest_tensor + HOST_PROCESS
    if run.sharding:
        last = last_layer_forward(shape, how, settings.gradient_checkpointing)
        head = before_head(shape, how, settings.gradient_checkpointing)
        shards = shards_of(shape, run, trained, moments, last, head, host_to_load)
        weights, trained, moments = shards.weights, shards.trained, shards.moments
        gathered, host, of_gathers = shards.gathered, shards.host, shards.reserved
    standing = sum(weights.values()) + trained.adapters + trained.states + gpu.workspace_bytes + masks
    totals = {name: moment.total + gathered.get(name, Gathered()).total for name, moment in moments.items()}
    peak = max(totals, key=totals.__getitem__)
    reserved = _reserved_bytes(standing, moments, trained, settings.gradient_checkpointing, gathered) + of_gathers
    more = {GATHERED: gathered[peak].total} if peak in gathered else {}
    return Prediction(
        shape=shape,
        settings=settings,
        gpu=gpu,
        loaded_bytes=sum(weights.values()) if run.sharding else loaded_bytes(shape, settings),
        peak_allocated_bytes=standing + totals[peak],
        peak_reserved_bytes=reserved,
        device_bytes=reserved + gpu.context_bytes + trained.resident_pages,
        host_bytes_to_load=host_to_load,
        disk_bytes=2 * shape.parameters,
        trainable_parameters=parameters,
        peak_phase=peak,
        parts=weights | _other_parts(peak, moments[peak], trained, masks, gpu, settings.gradient_checkpointing) | more,
        phases={name: standing + total for name, total in totals.items()},
        host_parts=host,
    )


def _with_more(found: Prediction) -> Prediction:
    """With what packing, compiled layers and liger's take more or less.

    In a packed row a mask says which tokens belong together: one byte for each pair of tokens, and in each layer that keeps
    its activations, or runs, a copy in the compute dtype. With a mask, key and value heads are repeated for the query heads
    that share them.
    """
    settings, shape, more = found.settings, found.shape, {}
    if settings.packing:
        width, layers = DTYPES[settings.compute_dtype], shape.num_hidden_layers
        kept = 0 if settings.gradient_checkpointing else layers
        if settings.checkpointed_layers is not None:
            kept = layers - min(settings.checkpointed_layers, layers)
        pairs = settings.batch_size * settings.max_length**2
        shared = 1 - shape.num_key_value_heads / max(shape.num_attention_heads, 1)
        repeated = 2 * settings.batch_size * settings.max_length * shape.hidden_size * width * shared
        more["packing"] = int(pairs + (kept + 1) * (pairs * width + repeated))
    at_work = found.parts.get("recomputed layer", 0) + found.parts.get("layer at work", 0)
    if settings.compile_layers:
        inputs = shape.num_hidden_layers * settings.batch_size * settings.max_length * shape.hidden_size
        kept = found.parts.get("checkpointed activations", 0) + found.parts.get("activations", 0)
        kept -= inputs * DTYPES[settings.compute_dtype]  # those of checkpointed layers stay as they are
        more["compiled layers"] = int(COMPILED * at_work - NOT_KEPT * max(kept, 0))
    if settings.liger_layers:
        more["liger's layers"] = -int(LIGER * at_work)
    total = sum(more.values())
    allocated, reserved = found.peak_allocated_bytes + total, found.peak_reserved_bytes + total
    if settings.expandable_segments:
        reserved = min(reserved, int((1 + UNUSED) * allocated))
    step = {name: size if name == "optimizer step" else size + total for name, size in found.phases.items()}
    return replace(
        found,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        device_bytes=found.device_bytes + reserved - found.peak_reserved_bytes,
        parts=found.parts | more,
        phases=step,
    )


# what the layers written out here do not know, unless it is as in `Settings()`
ONLY_LIBRARIES = ("checkpointed_layers", "activation_offloading", "logits", "eval_batch_size")


def needs_libraries(settings: Settings) -> bool:
    """Whether a run has something that the layers written out here do not know."""
    fields = Settings.__dataclass_fields__
    return any(getattr(settings, name) != fields[name].default for name in ONLY_LIBRARIES)


def _by_the_libraries(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Prediction:
    if (tokens := settings.batch_size * settings.max_length) > MOST_TOKENS:
        allowed = f"x max_length={settings.max_length} is {tokens:,} tokens at once; up to {MOST_TOKENS:,} can be run without values"
        raise validation.refuse("batch_size", settings.batch_size, allowed)
    from qlora_helpers.memory.fake.prediction import run_on_fake_tensors  # only here: it takes seconds to import

    of_any = shape if isinstance(shape, AnyShape) else AnyShape.from_config(shape.as_config(), shape.name)
    run = run_on_fake_tensors(of_any, settings, gpu)
    outside = {"workspace": gpu.workspace_bytes, "CUDA context": gpu.context_bytes}
    return Prediction(
        shape=shape,
        settings=settings,
        gpu=gpu,
        loaded_bytes=run.loaded,
        peak_allocated_bytes=run.moments[run.peak],
        peak_reserved_bytes=run.reserved,
        device_bytes=run.reserved + gpu.context_bytes + run.trained.resident_pages,
        host_bytes_to_load=2 * shape.largest_tensor + HOST_PROCESS,
        disk_bytes=2 * shape.parameters,
        trainable_parameters=run.trained.parameters,
        peak_phase=run.peak,
        parts=run.weights | run.at_peak | outside,
        phases=run.moments,
        road="libraries",
        why_all=run.why_all,
    )


def _other_parts(
    name: str, moment: Moment, trained: Trained, masks: int, gpu: GPU, checkpointing: bool
) -> dict[str, int]:
    """What is alive at the peak besides the model's weights."""
    work, in_step = moment.at_work, name == "optimizer step"
    at_work = masks if in_step else masks + moment.copies + work.total - work.tile - work.dequantised
    return {
        "adapters": trained.adapters,
        "gradients": moment.gradients,
        "optimizer (GPU)": trained.states + (trained.temporaries if in_step else 0),
        "optimizer (paged)": trained.paged,
        "checkpointed activations" if checkpointing else "activations": moment.activations,
        "recomputed layer" if checkpointing else "layer at work": at_work,
        "logits tile": work.tile,
        "dequantised weight": work.dequantised,
        "workspace": gpu.workspace_bytes,
        "CUDA context": gpu.context_bytes,
    }


def _reserved_bytes(
    standing: int, moments: dict[str, Moment], trained: Trained, checkpointing: bool, gathered: dict[str, Gathered]
) -> int:
    """The most that torch's allocator holds for the tensors of the run's own stream: what is in them, and fragmentation."""
    fragmentation = FRAGMENTATION_WITH_CHECKPOINTING if checkpointing else FRAGMENTATION

    def held(name: str) -> float:
        moment = moments[name]
        # the small pool is fullest at the optimizer step, when the gradients and the temporaries are there
        still_to_come = max(trained.gradients + trained.temporaries - moment.gradients, 0)
        later = 0 if name == "optimizer step" else trained.share_of_small * still_to_come
        whole = gathered.get(name, Gathered()).here
        return standing + moment.total + whole + later + fragmentation * (moment.total - moment.gradients)

    return int(max(map(held, moments)))
