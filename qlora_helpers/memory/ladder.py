"""The cheapest changes that make a run fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_helpers.memory.gpus import GPU, find_gpu
from qlora_helpers.memory.layers import EAGER_ONLY
from qlora_helpers.memory.prediction import Prediction, predict
from qlora_helpers.memory.search import longest_sequence
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.trained import OPTIMIZERS
from qlora_helpers.settings import GPU_OPTIMIZER, Settings
from qlora_helpers.units import GIB

__all__ = ["LADDER", "LOWEST_RANK", "SHORTEST", "Change", "cures"]

SHORTEST = 256  # tokens: no cure makes sequences shorter
MOST_DIVISORS = 2**20  # of a batch size are looked for: a number without bounds would take for ever
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


# ---- The ladder. A rung yields (what, price, changed settings) from mild to strong, or nothing if it does not apply.

Rung = Iterator[tuple[str, str, Settings]]


def _no_upcast(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.upcast_fp32:
        yield "no prepare_model_for_kbit_training", "nothing", replace(settings, upcast_fp32=False)


def _fused_attention(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.attention == "sdpa" or shape.model_type in EAGER_ONLY:
        return
    if gpu.compute_capability >= (8, 0):
        what, price = "attention by sdpa, in FlashAttention", "nothing: the same result, and faster"
    else:
        what = "this course's attention (qlora_helpers.models.attention), in the memory-efficient kernel"
        price = "a copy of keys and values: the same result, and faster"
    yield what, price, replace(settings, attention="sdpa")


def _fused_optimizer(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.optimizer == "adamw_torch":
        yield (
            "optim adamw_torch_fused",
            "nothing: the same steps in one kernel",
            replace(settings, optimizer="adamw_torch_fused"),
        )


def _8bit_optimizer(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    now = OPTIMIZERS[settings.optimizer or GPU_OPTIMIZER]
    if now.bits != 8:
        name = "paged_adamw_8bit" if now.paged else "adamw_8bit"
        yield (
            f"optim {name}",
            "hardly any quality, say those who made it (arXiv 2110.02861): states in 8 bits",
            replace(settings, optimizer=name),
        )


def _16bit_compute(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    # not for "full": there the trained weights would lose bits
    if settings.compute_dtype == "float32" and settings.method != "full":
        name = "bfloat16" if gpu.compute_capability >= (8, 0) else "float16"
        yield (
            f"compute_dtype {name}",
            "almost nothing, and faster: products in 16 bits",
            replace(settings, compute_dtype=name),
        )


def _double_quant(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.method == "qlora" and not settings.double_quant:
        yield "double quantisation", "almost no error, a little time", replace(settings, double_quant=True)


def _checkpointing(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    if not settings.gradient_checkpointing:
        price = "about 1.4 times the time (8B on an H200): each layer's forward pass runs twice"
        yield "gradient checkpointing", price, replace(settings, gradient_checkpointing=True)


def _smaller_batch(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    size = settings.batch_size
    small = [divisor for divisor in range(1, min(math.isqrt(size), MOST_DIVISORS) + 1) if size % divisor == 0]
    for batch in sorted({*small, *(size // divisor for divisor in small)} - {size}, reverse=True):
        what = f"a batch of {batch:,} with {size // batch:,} steps of accumulation"
        changed = replace(settings, batch_size=batch, accumulation=settings.accumulation * size // batch)
        yield what, "the same result, slower on a large GPU", changed


def _lower_rank(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    rank = settings.rank // 2
    while settings.method != "full" and rank >= LOWEST_RANK:
        yield f"rank {rank} instead of {settings.rank}", "may learn less", replace(settings, rank=rank)
        rank //= 2


def _fewer_layers(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.method == "full":
        return
    now = [linear.name.rpartition(".")[2] for linear in shape.targets(settings.target_modules)]
    few = tuple(name for name in now if name in ("q_proj", "v_proj", "qkv_proj", "query_key_value"))
    if few and len(few) < len(now):
        yield f"adapters on {' and '.join(few)} only", "may learn less", replace(settings, target_modules=few)


def _lora(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.method == "full":
        price = "adapters that learn less than all weights do"
        yield "LoRA on 16-bit weights instead of full fine-tuning", price, replace(settings, method="lora")


def _qlora(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    if settings.method == "full":
        price = "a 4-bit base, and adapters that learn less than all weights do"
        yield "QLoRA instead of full fine-tuning", price, replace(settings, method="qlora")
    elif settings.method == "lora":
        yield "QLoRA instead of LoRA", "a 4-bit base, which loses a little", replace(settings, method="qlora")


def _shorter(shape: ModelShape, settings: Settings, gpu: GPU) -> Rung:
    def cut(tokens: int) -> tuple[str, str, Settings]:
        what = f"sequences of {tokens:,} tokens instead of {settings.max_length:,}"
        return what, "longer ones are cut off", replace(settings, max_length=tokens)

    enough = longest_sequence(shape, settings, gpu)
    if SHORTEST <= enough < settings.max_length:
        yield cut(enough)
    elif settings.max_length > SHORTEST:
        yield cut(SHORTEST)


LADDER = (  # by price, the cheapest first
    _no_upcast, _fused_attention, _fused_optimizer, _8bit_optimizer, _16bit_compute, _double_quant, _checkpointing,
    _smaller_batch, _lower_rank, _fewer_layers, _lora, _qlora, _shorter,
)  # fmt: skip
STRONGEST = 1_000_000  # a level above the highest of any rung


def _apply(
    shape: ModelShape, settings: Settings, gpu: GPU, levels: dict
) -> tuple[tuple[tuple[str, str], ...], Settings, Prediction]:
    """The run with each rung at a level: 0 leaves it out, 1 is its mildest change, and a level that is too high is its strongest."""
    notes = {}
    # The method goes first: in full fine-tuning the rungs for adapters apply only after it.
    for rung in sorted(LADDER, key=lambda rung: rung not in (_lora, _qlora)):
        for what, price, changed in itertools.islice(rung(shape, settings, gpu), levels.get(rung, 0)):
            notes[rung] = (what, price, changed)
        if rung in notes:
            settings = notes[rung][2]
    return tuple(notes[rung][:2] for rung in LADDER if rung in notes), settings, predict(shape, settings, gpu)


def cures(shape: ModelShape, settings: Settings, gpu: str | GPU) -> list[Change]:
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
        for what, price, changed in rung(shape, settings, gpu):
            prediction = predict(shape, changed, gpu)
            if prediction.fits:
                found.append(Change(what, price, changed, prediction, ((what, price),)))
                if len(found) == 1:
                    cheaper = LADDER[:place]
                break

    def fits(levels: dict) -> bool:
        return _apply(shape, settings, gpu, levels)[2].fits

    levels = {}
    for rung in cheaper:
        levels[rung] = STRONGEST
        notes, _, prediction = _apply(shape, settings, gpu, levels)
        if prediction.fits:
            break
    else:
        if found:
            return found
        price = f"nothing else is enough: with all other changes it is still {-prediction.spare_bytes / GIB:.2f} GiB too much"
        return [Change("a smaller model, or a GPU with more memory", price, None, prediction, notes)]
    # Take back what is not needed, the most expensive first. The strongest level fits, so each search ends.
    for rung in reversed(list(levels)):
        levels[rung] = next(level for level in itertools.count() if fits(levels | {rung: level}))
    notes, changed, prediction = _apply(shape, settings, gpu, levels)
    what, price = ("; ".join(words) for words in zip(*notes, strict=True))
    return [Change(what, price, changed, prediction, notes), *found]
