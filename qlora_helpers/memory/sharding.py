"""What FSDP takes on each of several GPUs, and in main memory: shards, gathered weights, and what is not split.

Derived from the code of torch 2.13 (`fully_shard`), accelerate 1.15 and transformers 5.23, whose Trainer uses FSDP2; how it is
put together was not measured on two GPUs:

- **Split** over the GPUs, each tensor along its first dimension: the packed 4-bit weights, if `bnb_4bit_quant_storage` is a
  floating-point dtype, and the one that the run computes in, since FSDP casts to it (of bitsandbytes' usual uint8, accelerate
  splits nothing); embeddings, output head and norms; adapters, their gradients and the optimizer's states.
- **Whole on each GPU**: the 4-bit weights' scales and codebooks. They are attributes of the parameter and of its layer
  (`quant_state`), not parameters, so that FSDP1 and FSDP2 pass over them, and so does offloading. Activations are those of the
  GPU's own sequences.
- **Gathered**: each decoder layer, the embeddings and the output head (`fsdp2_prepare_model`). A layer at work is whole, and
  beside it lies a buffer of the same size: in the forward pass the one that it was gathered in, which is freed when the next
  layer is there; in the backward pass that of the next one, which is gathered ahead. Adapters are gathered in the dtype of
  the products, so that autocast makes no copies of them. TRL's output head asks for its whole weight (`full_tensor`).
- **Gradients** are summed over the GPUs and split, layer by layer. With accumulation each GPU keeps all of them, in the dtype of
  the products, until the last pass (`set_requires_gradient_sync`).
- **Optimizers**: torch's. bitsandbytes' refuse FSDP2's tensors ("got mixed torch.Tensor and DTensor"), the paged ones, too.
- **Offloaded** (`CPUOffloadPolicy`): shards of parameters, gradients and states lie in main memory, and the optimizer steps there.
  A shard passes through the GPU on its way to being gathered. torch rounds page-locked memory up to a power of two.
- **Loading**: each process has its own copy of the model in main memory until it is split: accelerate does not load on one
  process alone where there are bitsandbytes' layers.
- **All-gather buffers** belong to a CUDA stream of their own, whose memory torch's allocator does not share with others: what is
  reserved for it comes on top.

Without sharding each GPU has a copy of everything, and DDP as much again as the gradients take, in its buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_helpers import validation
from qlora_helpers.memory.loaded import weights_by_part
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.step import Moment, Peak
from qlora_helpers.memory.tape import rounded
from qlora_helpers.memory.trained import Trained, trained_of, trained_tensors, trained_width
from qlora_helpers.settings import DTYPES, SHARDED_OPTIMIZERS, Settings
from qlora_helpers.units import MIB

__all__ = ["GATHERED", "NCCL_BYTES", "Gathered", "Shards", "check_sharding", "of_each_gpu", "shards_of"]

GATHERED = "gathered weights"  # the part of a prediction
# NCCL's buffers and code on each card, outside torch's allocator. Not measured here: on eight H100 1.06 GB were taken beside
# torch's memory (github.com/NVIDIA/nccl/issues/1685), of which an H100's context is 0.65. It grows with the channels.
NCCL_BYTES = 512 * MIB


def of_each_gpu(settings: Settings) -> Settings:
    """The run that each GPU makes of its share of the sequences, as if it were alone and had everything.

    With sharding, layers see adapters in the dtype of the products.
    """
    each = replace(settings, batch_size=settings.batch_per_gpu, num_gpus=1, sharding=None, cpu_offload=False)
    if settings.sharding and settings.method != "full" and settings.compute_dtype != "float32":
        each = replace(each, adapter_dtype=settings.compute_dtype)
    return each


def check_sharding(settings: Settings) -> None:
    """Make sure that FSDP takes such a run.

    Args:
        settings: with an `optimizer`.

    Raises:
        ValueError: it does not; the message names the setting and the cure.
    """
    if not settings.sharding:
        return
    if settings.optimizer not in SHARDED_OPTIMIZERS:
        cure = f"with sharding='fsdp' choose one of {', '.join(SHARDED_OPTIMIZERS)}: bitsandbytes' optimizers take no shards"
        raise validation.refuse("optimizer", settings.optimizer, cure)
    if settings.upcast_fp32:
        cure = "with sharding='fsdp' leave it out: FSDP gathers the weights in the dtype of the products anyway"
        raise validation.refuse("upcast_fp32", True, cure)


@dataclass(frozen=True)
class Gathered:
    """Weights that are whole for a while, in bytes.

    Args:
        here: at work, or gradients on their way to being split.
        buffer: of an all-gather, in the memory of a stream of its own.
    """

    here: int = 0
    buffer: int = 0

    @property
    def total(self) -> int:
        return self.here + self.buffer


@dataclass(frozen=True)
class Shards:
    """A run on the GPU that has the most of it.

    Attributes:
        weights: of the model, by part, as in `loaded.weights_by_part`.
        trained: the shards of what is trained; nothing if they are offloaded, except for its `parameters`.
        gathered: whole weights, by the moment of the step.
        moments: of the step, the gradients split.
        host: main memory of all processes, by part, while it is most.
    """

    weights: dict[str, int]
    trained: Trained
    gathered: dict[str, Gathered]
    moments: dict[str, Moment]
    host: dict[str, int]


def shards_of(
    shape: ModelShape, settings: Settings, whole: Trained, moments: dict[str, Moment], last: Moment, per_process: int
) -> Shards:
    """A run that is split over `settings.num_gpus` GPUs.

    Args:
        settings: of the run, with a dtype and an optimizer.
        whole: what is trained, as the layers see it: in the dtype of the products.
        moments: of the step of one GPU that has everything, for `whole`.
        last: that of the last layer's forward pass.
        per_process: main memory that each process takes beside shards and copies.
    """
    weights, params = _weights(shape, settings)
    on_gpu = trained = trained_of(trained_tensors(shape, settings, settings.num_gpus), settings)
    if settings.cpu_offload:
        on_gpu = replace(trained, parameters=0, adapters=0, states=0, temporaries=0)
    sizes = _Sizes.of(shape, settings, whole)
    accumulated = whole.gradients if settings.accumulation > 1 else 0
    x = rounded(settings.batch_per_gpu * settings.max_length * shape.hidden_size * DTYPES[settings.compute_dtype])
    embeddings = Moment(Peak(x), accumulated), sizes.of_embeddings()
    last = replace(last, gradients=accumulated), sizes.of_last_layer()
    forward, in_forward = max(embeddings, last, key=lambda pair: pair[0].total + pair[1].total)
    split = _split_gradients(settings, whole, on_gpu, moments)
    step = split.pop("optimizer step")
    if sizes.again and "embeddings backward" not in split:
        split["embeddings backward"] = Moment(Peak(x), max(on_gpu.gradients, accumulated))
    return Shards(
        weights=weights,
        trained=on_gpu,
        gathered={"forward": in_forward} | sizes.gathered(),
        moments={"forward": forward} | split | {"optimizer step": step},
        host=_host(shape, settings, trained, params, per_process),
    )


def _share(size: int, settings: Settings) -> int:
    return -(-size // settings.num_gpus)


def _width(settings: Settings) -> int:
    """Bytes of an element of 16-bit weights: accelerate makes those that are trained float32."""
    return trained_width(settings) if settings.method == "full" else DTYPES[settings.compute_dtype]


def _weights(shape: ModelShape, settings: Settings) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """The weights of a shard on the GPU, by part; and the shards of tensors, as sizes in bytes and how many there are."""
    width, four_bit = _width(settings), settings.method == "qlora"
    whole = weights_by_part(shape, settings)
    layers, tables = shape.num_hidden_layers, 1 if shape.tie_word_embeddings else 2
    linears = [
        (_share(linear.weights // 2 if four_bit else linear.weights * width, settings), layers)
        for linear in shape.linears
    ]
    small = shape.small_parameters + shape.embedding_parameters - tables * shape.vocab_size * shape.hidden_size
    others = [
        (_share(shape.vocab_size * shape.hidden_size * width, settings), tables),
        (_share(small * width, settings), 1),
    ]
    in_linears = sum(size * count for size, count in linears)
    in_others = sum(size * count for size, count in others)
    if settings.cpu_offload:
        on_gpu = {"4-bit weights": 0, "16-bit weights": shape.buffer_bytes}
    elif four_bit:
        on_gpu = {"4-bit weights": in_linears, "16-bit weights": in_others + shape.buffer_bytes}
    else:
        on_gpu = {"4-bit weights": 0, "16-bit weights": in_linears + in_others + shape.buffer_bytes}
    return whole | on_gpu, linears + others


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what is gathered.

    Attributes:
        layer: a decoder layer with its adapters.
        table: the embeddings, or a head of their size.
        trained: of a layer's weights, those that are trained.
        tied: the head is the embeddings, which stay whole from the forward to the end of the backward pass.
        full: the embeddings and the head are trained.
        again: the embeddings are gathered for their backward pass, too.
        share: of a weight that is offloaded, which passes through the GPU; None if none is.
    """

    layer: int
    table: int
    trained: int
    tied: bool
    full: bool
    again: bool
    several: bool
    share: int | None

    @classmethod
    def of(cls, shape: ModelShape, settings: Settings, whole: Trained) -> _Sizes:
        compute, layers, full = DTYPES[settings.compute_dtype], shape.num_hidden_layers, settings.method == "full"
        adapters = 0 if full else whole.parameters * compute // layers
        four_bit = settings.method == "qlora"
        linears = sum(linear.weights // 2 if four_bit else linear.weights * compute for linear in shape.linears)
        last_norm = shape.hidden_size * (2 if shape.has_layer_norm else 1)
        return cls(
            layer=linears + (shape.small_parameters - last_norm) // layers * compute + adapters,
            table=shape.vocab_size * shape.hidden_size * compute,
            trained=linears if full else adapters,
            tied=shape.tie_word_embeddings,
            full=full,
            again=not shape.tie_word_embeddings and (settings.gradient_checkpointing or full),
            several=settings.num_gpus > 1,
            share=settings.num_gpus if settings.cpu_offload else None,
        )

    def _buffer(self, size: int, before: int = 0) -> int:
        """That of an all-gather, beside the one before: one GPU gathers nothing; an offloaded shard is copied to it first."""
        if not self.several:
            return 0
        return before + size + (-(-size // self.share) if self.share else 0)

    @property
    def _stays(self) -> int:
        return self.table if self.tied else 0

    def of_embeddings(self) -> Gathered:
        """While the embeddings run, or the first layer is copied out, whichever is more."""
        first = Gathered(self.layer + self._stays, self._buffer(self.layer, before=self.table))
        return max(Gathered(self.table, self._buffer(self.table)), first, key=lambda one: one.total)

    def of_last_layer(self) -> Gathered:
        return Gathered(self.layer + self._stays, self._buffer(self.layer, before=self.layer))

    def gathered(self) -> dict[str, Gathered]:
        """At each of the moments after the layers' forward pass."""
        reduced = 2 * self.trained  # gradients of a layer, and those of the one before, which are still being summed
        again = self.table if self.again else 0
        found = {
            # the buffer of the last layer is freed when the forward pass ends
            "loss": Gathered(self.table, self.layer if self.several else 0),
            "loss backward": Gathered(self.table + (2 * self.table if self.full else 0)),
            "last layer backward": Gathered(self._stays + self.layer + reduced, self._buffer(self.layer)),
            "first layer backward": Gathered(self._stays + self.layer + reduced, self._buffer(again)),
        }
        if self.again or self.full:
            found["embeddings backward"] = Gathered(self.table + reduced, self._buffer(again))
        return found


def _split_gradients(
    settings: Settings, whole: Trained, trained: Trained, moments: dict[str, Moment]
) -> dict[str, Moment]:
    """The moments with gradients that are split; with accumulation each GPU keeps all of them until the last pass."""

    def gradients(moment: Moment) -> int:
        split = trained.gradients * moment.gradients // max(whole.gradients, 1)
        return max(moment.gradients, split) if settings.accumulation > 1 else split

    found = {name: replace(moment, gradients=gradients(moment), copies=0) for name, moment in moments.items()}
    return found | {"optimizer step": Moment(Peak(trained.temporaries), trained.gradients)}


def _host(
    shape: ModelShape, settings: Settings, trained: Trained, params: list[tuple[int, int]], per_process: int
) -> dict[str, int]:
    """Main memory of all processes: while the model is loaded, or, if that is more, while it trains with offloading."""
    number = settings.num_gpus
    model = sum(weights_by_part(shape, settings).values())
    loading = {"copies of the model, to load": number * model, "processes": number * per_process}
    if not settings.cpu_offload:
        return loading
    tensors = trained_tensors(shape, settings, number) if settings.method != "full" else []
    params = params + [(tensor.elements * trained.width, tensor.count) for tensor in tensors]
    locked = sum(count * _power_of_two(size) for size, count in params)
    training = {
        "shards of weights": number * locked,
        "gradients": number * trained.gradients,
        "optimizer states": number * (trained.states + trained.temporaries),
        "processes": number * per_process,
    }
    return max(loading, training, key=lambda parts: sum(parts.values()))


def _power_of_two(size: int) -> int:
    """Page-locked memory for a tensor of so many bytes (ATen/core/CachingHostAllocator.h)."""
    return 1 << max(size - 1, 0).bit_length()
