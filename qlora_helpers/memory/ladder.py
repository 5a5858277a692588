"""The cheapest changes that make a run fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora_helpers import validation
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.gpus import GPU, find_gpu
from qlora_helpers.memory.layers import LayerSettings
from qlora_helpers.memory.prediction import Prediction, on_gpu, predict
from qlora_helpers.memory.search import MOST_DIVISORS, divisors, longest_sequence
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.trained import OPTIMIZERS
from qlora_helpers.settings import GPU_OPTIMIZER, Settings
from qlora_helpers.units import GIB

__all__ = ["LADDER", "LOWEST_RANK", "SHORTEST", "Change", "cures"]

SHORTEST = 256  # tokens: no cure makes sequences shorter
LOWEST_RANK = 4  # no cure lowers the rank below it


@dataclass(frozen=True)
class Change:
    """A change to a run that does not fit.

    Args:
        what: what changes, in words.
        price: what it costs, in words.
        settings: with the change, so that the run fits; None if only another model or GPU helps.
        prediction: for these settings. If they are None: with all other changes at once, so that its `spare_bytes` says how
            much is still missing.
        steps: `what` and `price` of each change that this one combines; if `settings` is None, of those that are not
            enough.
    """

    what: str
    price: str
    settings: Settings | None
    prediction: Prediction
    steps: tuple[tuple[str, str], ...]


# ---- The ladder. A rung has its levels from mild to strong: (what, price, changed settings); none if it does not apply.

Level = tuple[str, str, Settings]
Rung = Sequence[Level]


def _no_upcast(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if not settings.upcast_fp32:
        return []
    return [("no prepare_model_for_kbit_training", "nothing", replace(settings, upcast_fp32=False))]


def _fused_attention(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.attention == "sdpa" or shape.eager_only:
        return []
    changed = replace(settings, attention="sdpa")
    if gpu.compute_capability < (8, 0):
        what = "this course's attention (qlora_helpers.models.attention), in the memory-efficient kernel"
        price = "a copy of keys and values: the same result, and faster"
    elif _takes_flash(shape, on_gpu(changed, gpu), gpu):
        what, price = "attention by sdpa, in FlashAttention", "nothing: the same result, and faster"
    else:  # FlashAttention takes neither float32 nor a mask
        what, price = "attention by sdpa", "nothing: the same result"
    return [(what, price, changed)]


def _takes_flash(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> bool:
    """Whether a model's attention certainly runs in FlashAttention; of one that the libraries build that is not asked."""
    return isinstance(shape, ModelShape) and LayerSettings.of(shape, settings, gpu).kernel == "flash"


def _fused_optimizer(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.optimizer != "adamw_torch":
        return []
    changed = replace(settings, optimizer="adamw_torch_fused")
    return [("optim adamw_torch_fused", "nothing: the same steps in one kernel", changed)]


def _8bit_optimizer(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    now = OPTIMIZERS[settings.optimizer or GPU_OPTIMIZER]
    if now.bits == 8 or settings.sharding:  # bitsandbytes' optimizers take no shards
        return []
    name = "paged_adamw_8bit" if now.paged else "adamw_8bit"
    price = "hardly any quality, say those who made it (arXiv 2110.02861): states in 8 bits"
    return [(f"optim {name}", price, replace(settings, optimizer=name))]


def _16bit_compute(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    # not for "full": there the trained weights would lose bits
    if settings.compute_dtype != "float32" or settings.method == "full":
        return []
    name = "bfloat16" if gpu.compute_capability >= (8, 0) else "float16"
    price = "almost nothing, and faster: products in 16 bits"
    return [(f"compute_dtype {name}", price, replace(settings, compute_dtype=name))]


def _double_quant(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.method != "qlora" or settings.double_quant:
        return []
    return [("double quantisation", "almost no error, a little time", replace(settings, double_quant=True))]


def _checkpointing(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.gradient_checkpointing:
        return []
    price = "about 1.4 times the time (8B on an H200): each layer's forward pass runs twice"
    return [("gradient checkpointing", price, replace(settings, gradient_checkpointing=True))]


@dataclass(frozen=True)
class _SmallerBatches(Sequence):
    """A level per divisor of the batch size, made when it is looked at: a large number has thousands of them."""

    settings: Settings
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, place: int) -> Level:
        size, batch = self.settings.batch_size, self.sizes[place]
        what = f"a batch of {batch:,} with {size // batch:,} steps of accumulation"
        changed = replace(self.settings, batch_size=batch, accumulation=self.settings.accumulation * size // batch)
        return what, "the same result, slower on a large GPU", changed


def _smaller_batch(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    passes, gpus = settings.accumulation * settings.batch_size, settings.num_gpus
    smaller = (size * gpus for size in divisors(settings.batch_per_gpu)[1:])
    return _SmallerBatches(settings, tuple(size for size in smaller if passes // size <= validation.LARGEST))


def _lower_rank(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    levels, rank = [], settings.rank // 2
    while settings.method != "full" and rank >= LOWEST_RANK:
        levels.append((f"rank {rank} instead of {settings.rank}", "may learn less", replace(settings, rank=rank)))
        rank //= 2
    return levels


def _fewer_layers(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.method == "full":
        return []
    targets = settings.target_modules
    now = [name for name in shape.linear_names() if targets == "all-linear" or name in targets]
    few = tuple(name for name in now if name in ("q_proj", "v_proj", "qkv_proj", "query_key_value"))
    if not 0 < len(few) < len(now):
        return []
    return [(f"adapters on {' and '.join(few)} only", "may learn less", replace(settings, target_modules=few))]


def _lora(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.method != "full":
        return []
    price = "adapters that learn less than all weights do"
    return [("LoRA on 16-bit weights instead of full fine-tuning", price, replace(settings, method="lora"))]


def _qlora(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.method == "qlora":
        return []
    what, price = {
        "full": ("full fine-tuning", "a 4-bit base, and adapters that learn less than all weights do"),
        "lora": ("LoRA", "a 4-bit base, which loses a little"),
    }[settings.method]
    return [(f"QLoRA instead of {what}", price, replace(settings, method="qlora"))]


def _shorter(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.max_length <= SHORTEST:
        return []
    enough = longest_sequence(shape, settings, gpu, at_most=settings.max_length - 1)
    tokens = max(enough, SHORTEST)
    what = f"sequences of {tokens:,} tokens instead of {settings.max_length:,}"
    return [(what, "longer ones are cut off", replace(settings, max_length=tokens))]


LADDER = (  # by price, the cheapest first
    _no_upcast, _fused_attention, _fused_optimizer, _8bit_optimizer, _16bit_compute, _double_quant, _checkpointing,
    _smaller_batch, _lower_rank, _fewer_layers, _lora, _qlora, _shorter,
)  # fmt: skip
STRONGEST = 2 * MOST_DIVISORS  # no rung has more levels


def _apply(
    shape: ModelShape | AnyShape, settings: Settings, gpu: GPU, levels: dict
) -> tuple[tuple[tuple[str, str], ...], Settings, Prediction]:
    """The run with each rung at a level: 0 leaves it out, 1 is its mildest change, and a level that is too high is its strongest."""
    notes = {}
    # The method goes first: in full fine-tuning the rungs for adapters apply only after it.
    for rung in sorted(LADDER, key=lambda rung: rung not in (_lora, _qlora)):
        if (level := levels.get(rung, 0)) and (offered := rung(shape, settings, gpu)):
            notes[rung] = offered[min(level, len(offered)) - 1]
            settings = notes[rung][2]
    return tuple(notes[rung][:2] for rung in LADDER if rung in notes), settings, predict(shape, settings, gpu)


def _strongest(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU, rungs: Sequence) -> tuple[dict, Prediction]:
    """Rungs at their strongest: the first of them with which the run fits, else those with which it takes the least.

    A change can raise what the others leave, such as accumulation: it keeps the gradients, which can be larger than what a
    smaller batch saves.
    """
    levels, prediction = {}, predict(shape, settings, gpu)
    for rung in rungs:
        levels[rung] = STRONGEST
        prediction = _apply(shape, settings, gpu, levels)[2]
        if prediction.fits:
            return levels, prediction
    for rung in (*rungs, *rungs):  # twice: what is left out later can change what an earlier one does
        others = {other: level for other, level in levels.items() if other is not rung}
        without = _apply(shape, settings, gpu, others)[2]
        if without.device_bytes < prediction.device_bytes:
            levels, prediction = others, without
    return levels, prediction


def cures(shape: ModelShape | AnyShape, settings: Settings, gpu: str | GPU) -> list[Change]:
    """What makes a run fit, the cheapest first; an empty list if it fits already.

    The list has every single change that is enough, each as mild as possible. A combination comes first if all its changes
    are cheaper than the cheapest of these, or if no single one is enough. It prefers cheap changes to expensive ones, and
    none of them could be left out or be milder. If not even all changes together are enough, one entry without settings
    says how much is missing.

    Raises:
        ValueError: as `predict` does.
    """
    gpu = find_gpu(gpu)
    if predict(shape, settings, gpu).fits:
        return []
    found, cheaper = [], LADDER
    for place, rung in enumerate(LADDER):
        offered = rung(shape, settings, gpu)
        enough = bisect_left(offered, True, key=lambda level: predict(shape, level[2], gpu).fits)
        if enough < len(offered):
            what, price, changed = offered[enough]
            found.append(Change(what, price, changed, predict(shape, changed, gpu), ((what, price),)))
            if len(found) == 1:
                cheaper = LADDER[:place]

    def fits(levels: dict) -> bool:
        return _apply(shape, settings, gpu, levels)[2].fits

    def mildest(rung: Callable) -> int:
        """The mildest level of a rung that is enough with the others as they are; its strongest is."""
        for level in (0, 1):  # most have no other
            if fits(levels | {rung: level}):
                return level
        return bisect_left(range(STRONGEST), True, lo=2, key=lambda level: fits(levels | {rung: level}))

    levels, prediction = _strongest(shape, settings, gpu, cheaper)
    if not prediction.fits:
        if found:
            return found
        notes = _apply(shape, settings, gpu, levels)[0]
        price = f"nothing else is enough: with all other changes it is still {-prediction.spare_bytes / GIB:.2f} GiB too much"
        return [Change("a smaller model, or a GPU with more memory", price, None, prediction, notes)]
    for rung in reversed(list(levels)):  # take back what is not needed, the most expensive first
        levels[rung] = mildest(rung)
    notes, changed, prediction = _apply(shape, settings, gpu, levels)
    what, price = ("; ".join(words) for words in zip(*notes, strict=True))
    return [Change(what, price, changed, prediction, notes), *found]
