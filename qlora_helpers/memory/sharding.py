"""What FSDP takes on each of several GPUs, and in main memory: shards, gathered weights, and what is not split.

Derived from the code of torch 2.13 (`fully_shard`), accelerate 1.15 and transformers 5.23, whose Trainer uses FSDP2. Two H200s
with 8B and 70B took what is predicted here: tensors to 1 %, main memory to 3 % (data/measured/several_gpus.json, which also has
what was predicted before the measurement). What NCCL takes, and other numbers of GPUs, were not measured:

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
  Offloaded, the course gathers it as FSDP does (`training.sharded.HeadOnTheGPU`), when the decoder ends: it lies beside its
  buffer and that of the last layer, which is often the peak.
- **Gradients** are summed over the GPUs and split, layer by layer. With accumulation each GPU keeps all of them, in the dtype of
  the products, until the last pass (`set_requires_gradient_sync`).
- **Optimizers**: torch's. bitsandbytes' refuse FSDP2's tensors ("got mixed torch.Tensor and DTensor"), the paged ones, too.
- **Offloaded** (`CPUOffloadPolicy`): shards of parameters, gradients and states lie in main memory, and the optimizer steps there.
  torch rounds page-locked memory up to a power of two.
- **Loading**: each process has its own copy of the model in main memory until all of it is split (`original_sd` in
  `fsdp2_prepare_model`): accelerate does not load on one process alone where there are bitsandbytes' layers. With an offload the
  page-locked shards are made beside that copy, which is the most of the run.
- **All-gather buffers**, and the shards on their way into them, belong to a CUDA stream of their own, whose memory torch's
  allocator does not share with others: what is reserved for it comes on top. Offloaded, 1.9 and
  1.6 times as much was reserved as allocated, for 8B and 70B. Predicted are 5 and 14 % more than that, since what the allocator
  finds room for depends on all that was there before. Under a limit it gives back what no tensor needs.

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

__all__ = [
    "GATHERED",
    "HOST_TRAINING",
    "NCCL_BYTES",
    "Gathered",
    "Shards",
    "check_sharding",
    "of_each_gpu",
    "shards_of",
]

GATHERED = "gathered weights"  # the part of a prediction
# NCCL's buffers and code on each card, outside torch's allocator. Not measured here: on eight H100 1.06 GB were taken beside
# torch's memory (github.com/NVIDIA/nccl/issues/1685), of which an H100's context is 0.65. It grows with the channels.
NCCL_BYTES = 512 * MIB
# Main memory of each process that trains, beside shards and copies: the largest resident set of one of two that trained 8B
# data-parallel on an H200 (data/measured/several_gpus.json, where a process alone took up to 6 % more).
HOST_TRAINING = 2_394_394_624


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
        reserved: what torch's allocator holds for gathering, beside what `gathered` has in the memory of the run's own stream.
        moments: of the step, the gradients split.
        host: main memory of all processes, by part, while it is most.
    """

    weights: dict[str, int]
    trained: Trained
    gathered: dict[str, Gathered]
    reserved: int
    moments: dict[str, Moment]
    host: dict[str, int]


def shards_of(
    shape: ModelShape,
    settings: Settings,
    whole: Trained,
    moments: dict[str, Moment],
    last: Moment,
    before_head: Moment,
    per_process: int,
) -> Shards:
    """A run that is split over `settings.num_gpus` GPUs.

    Args:
        settings: of the run, with a dtype and an optimizer.
        whole: what is trained, as the layers see it: in the dtype of the products.
        moments: of the step of one GPU that has everything, for `whole`.
        last: that of the last layer's forward pass.
        before_head: that between the decoder and the output head.
        per_process: main memory that each process takes to load, beside the copy of the model.
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
    gathered = sizes.gathered()
    if sizes.gathers_head:
        pairs = (
            (split["loss"], gathered["loss"]),
            (replace(before_head, gradients=accumulated, copies=0), sizes.of_head()),
        )
        split["loss"], gathered["loss"] = max(pairs, key=lambda pair: pair[0].total + pair[1].total)
    return Shards(
        weights=weights,
        trained=on_gpu,
        gathered={"forward": in_forward} | gathered,
        reserved=sizes.reserved,
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
        number: of GPUs.
        offloaded: shards come from main memory.
    """

    layer: int
    table: int
    trained: int
    tied: bool
    full: bool
    again: bool
    number: int
    offloaded: bool

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
            number=settings.num_gpus,
            offloaded=settings.cpu_offload,
        )

    @property
    def gathers_head(self) -> bool:
        """Whether FSDP gathers the head as it does the layers; a tied one is there already."""
        return self.offloaded and not self.tied

    def _buffer(self, size: int, before: int = 0) -> int:
        """That of an all-gather, beside the one before; one GPU gathers nothing."""
        return before + size if self.number > 1 else 0

    def _passes(self, size: int) -> int:
        """A weight that comes to the only GPU from main memory, and is copied there once more."""
        return size if self.offloaded and self.number == 1 else 0

    @property
    def _stays(self) -> int:
        return self.table if self.tied else 0

    def of_embeddings(self) -> Gathered:
        """While the embeddings run, or the first layer is copied out, whichever is more."""
        first = Gathered(self.layer + self._stays, self._buffer(self.layer, before=self.table))
        alone = Gathered(self.table + self._passes(self.table), self._buffer(self.table))
        return max(alone, first, key=lambda one: one.total)

    def of_last_layer(self) -> Gathered:
        return Gathered(self.layer + self._stays, self._buffer(self.layer, before=self.layer))

    def of_head(self) -> Gathered:
        """While the head is copied out of its buffer; that of the last layer is freed when the forward pass ends."""
        return Gathered(self.table + self._passes(self.table), self._buffer(self.table, before=self.layer))

    @property
    def reserved(self) -> int:
        """What the allocator holds for the gathers' own stream, and for places in the run's that cannot be used again.

        On the stream: the shard of the embeddings, on its way, and their buffer; the layers' come into the place of the shard
        as far as there is room. A head that is gathered finds no place that is large enough, since the last layer's buffer lies
        in one. Its whole weight finds none, either: smaller tensors have come to where the whole embeddings were.
        """
        stream = 0
        if self.number > 1:
            share, of_layer = (-(-size // self.number) for size in (self.table, self.layer))
            stream = max(max(share, self.layer + of_layer) + self.table, 2 * self.layer + of_layer)
            stream += self.table if self.gathers_head else 0
        return stream + (self.table if self.gathers_head else 0)

    def gathered(self) -> dict[str, Gathered]:
        """At each of the moments after the layers' forward pass."""
        reduced = 2 * self.trained  # gradients of a layer, and those of the one before, which are still being summed
        again = self.table if self.again else 0
        found = {
            # the buffer of the last layer is freed when the forward pass ends
            "loss": Gathered(self.table, self.layer if self.number > 1 else 0),
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
    """Main memory of all processes when it is most: while the model is loaded, is split, or trains."""
    number = settings.num_gpus
    copies = {"copies of the model, to load": number * sum(weights_by_part(shape, settings).values())}
    processes = {"processes": number * max(per_process, HOST_TRAINING)}
    moments = [copies | {"processes": number * per_process}, processes]
    if settings.cpu_offload:
        tensors = trained_tensors(shape, settings, number) if settings.method != "full" else []
        params = params + [(tensor.elements * trained.width, tensor.count) for tensor in tensors]
        shards = {"shards of weights": number * sum(count * _power_of_two(size) for size, count in params)}
        of_training = {
            "gradients": number * trained.gradients,
            "optimizer states": number * (trained.states + trained.temporaries),
        }
        moments = [copies | shards | processes, shards | of_training | processes]
    return max(moments, key=lambda parts: sum(parts.values()))


def _power_of_two(size: int) -> int:
    """Page-locked memory for a tensor of so many bytes (ATen/core/CachingHostAllocator.h)."""
    return 1 << max(size - 1, 0).bit_length()
