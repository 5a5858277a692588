"""From "does it fit?" to "what fits?": the largest batch, the longest sequence, the cheapest cures of a run.

All of it asks `predict`, tens of times: memory only grows with batch and sequence, so bisection finds where it ends.
"""

import difflib
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

from ..files import data_path
from .architectures import ModelShape
from .gpus import GPU, find_gpu
from .prediction import EAGER_ONLY, GIB, OPTIMIZERS, FineTuning, Prediction, predict

STEP = 128  # tokens: sequences are looked for in multiples of it
LONGEST = 131_072  # tokens: where the search ends for a model whose config states no limit
SHORTEST = 256  # tokens: no cure cuts sequences to less
LOWEST_RANK = 4  # no cure lowers the rank below it
DEFAULT_RUN = FineTuning()


@cache
def known_models() -> dict[str, dict]:
    """The config of each model that is known by its Hub name, aliases included: `data/models.json`."""
    file = json.loads(data_path("models.json").read_text(encoding="utf-8"))
    return file["models"] | {alias: file["models"][name] for alias, name in file["aliases"].items()}


def find_shape(model) -> ModelShape:
    """The shape of a model, with its name set.

    Args:
        model: a Hub name such as "Qwen/Qwen2.5-7B" or what stands behind its slash, in any case; or what
            `ModelShape.from_config` takes: a folder, a config.json, a dict or a transformers config. A folder that has
            a config.json goes before a Hub name, as in transformers. A ModelShape is given back as it is.

    Raises:
        ValueError: no such model is known, or its family is not.
        FileNotFoundError: there is no such config.json.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, str) and not _is_path(model):
        name = _hub_name(model)
        return replace(ModelShape.from_config(known_models()[name]), name=name)
    shape = ModelShape.from_config(model)
    if isinstance(model, str | Path):
        folder = Path(model) if Path(model).is_dir() else Path(model).parent
        return replace(shape, name=folder.resolve().name)
    return replace(shape, name=shape.name or getattr(model, "name_or_path", "") or f"a {shape.model_type} model")


@cache
def _names() -> dict[str, str]:
    """From each name in lower case, whole and without its owner, to the name as the Hub spells it."""
    names = {}
    for name in known_models():
        names.setdefault(name.lower(), name)
        names.setdefault(name.lower().rpartition("/")[2], name)
    return names


def _is_path(model: str) -> bool:
    # A folder that only happens to be called like a model, such as one for its checkpoints, is none.
    named = Path(model)
    return (
        model.endswith(".json")
        or (named / "config.json").is_file()
        or (named.is_dir() and model.lower() not in _names())
    )


def _hub_name(model: str) -> str:
    if found := _names().get(model.lower()):
        return found
    # Compared without the owner: whose copy of a model it is says little about its shape.
    short = {name: full for name, full in _names().items() if "/" not in name}
    close = difflib.get_close_matches(model.lower().rpartition("/")[2], short, n=3, cutoff=0.5)
    hint = f"; the closest known names are {', '.join(short[name] for name in close)}" if close else ""
    raise ValueError(
        f"model is {model!r}, which is not known{hint}. For any other model give its folder or its config.json"
    )


def _bisect(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number that fits, where `low` does (or is 0) and `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(shape: ModelShape, run: FineTuning, gpu: str | GPU) -> int:
    """The largest `batch_size` with which the run fits, in sequences; 0 if not even 1 does.

    Raises:
        ValueError: as `predict` does.
    """

    def fits(batch: int) -> bool:
        return predict(shape, replace(run, batch_size=batch), gpu).fits

    high = 1
    while fits(high):
        high *= 2
    return _bisect(fits, high // 2, high)


def longest_sequence(shape: ModelShape, run: FineTuning, gpu: str | GPU) -> int:
    """The longest `seq_len` with which the run fits at its batch size, in tokens: a multiple of 128; 0 if none fits.

    It ends at the model's `max_position_embeddings`; at 131,072 where the config does not state it.

    Raises:
        ValueError: as `predict` does.
    """

    def fits(steps: int) -> bool:
        return predict(shape, replace(run, seq_len=steps * STEP), gpu).fits

    most = (shape.max_position_embeddings or LONGEST) // STEP
    if most and fits(most):
        return most * STEP
    return _bisect(fits, 0, most) * STEP


@dataclass(frozen=True)
class Change:
    """A change to a run that does not fit.

    Args:
        what: is changed, in words.
        price: what it costs, in words.
        run: with the change, and it fits; None where only another model or GPU helps.
        prediction: for this run. Where `run` is None: with all other changes at once, so that its `spare_bytes` say how
            much is missing all the same.
        steps: what and price of each change that this one is made of; where `run` is None, of those that are not
            enough.
    """

    what: str
    price: str
    run: FineTuning | None
    prediction: Prediction
    steps: tuple[tuple[str, str], ...]


# ---- The ladder. A rung yields (what, price, changed run) from mild to strong, and nothing where it does not apply.

Rung = Iterator[tuple[str, str, FineTuning]]


def _no_upcast(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    if run.upcast_fp32:
        yield "no prepare_model_for_kbit_training", "nothing", replace(run, upcast_fp32=False)


def _fused_attention(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    if run.attention == "sdpa" or shape.model_type in EAGER_ONLY:
        return
    if gpu.compute_capability >= (8, 0):
        what, price = "attention by sdpa, in FlashAttention", "nothing: the same result, and faster"
    else:
        what = "this course's attention (qlora_helpers.attention), in the memory-efficient kernel"
        price = "a copy of keys and values: the same result, and faster"
    yield what, price, replace(run, attention="sdpa")


def _fused_optimizer(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    if run.optimizer == "adamw_torch":
        yield (
            "optim adamw_torch_fused",
            "nothing: the same steps in one kernel",
            replace(run, optimizer="adamw_torch_fused"),
        )


def _8bit_optimizer(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    now = OPTIMIZERS[run.optimizer]
    if now.bits != 8:
        name = "paged_adamw_8bit" if now.paged else "adamw_8bit"
        yield (
            f"optim {name}",
            "hardly any quality, say those who made it (arXiv 2110.02861): states in 8 bits",
            replace(run, optimizer=name),
        )


def _16bit_compute(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    # not for "full": there it would be the trained weights that lose bits
    if run.compute_dtype == "float32" and run.method != "full":
        name = "bfloat16" if gpu.compute_capability >= (8, 0) else "float16"
        yield (
            f"compute_dtype {name}",
            "almost nothing, and faster: products in 16 bits",
            replace(run, compute_dtype=name),
        )


def _double_quant(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    if run.method == "qlora" and not run.double_quant:
        yield "double quantisation", "almost no error, a little time", replace(run, double_quant=True)


def _checkpointing(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    if not run.gradient_checkpointing:
        price = "about 1.4 times the time (8B on an H200): each layer's forward pass runs twice"
        yield "gradient checkpointing", price, replace(run, gradient_checkpointing=True)


def _smaller_batch(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    size = run.batch_size
    small = [divisor for divisor in range(1, math.isqrt(size) + 1) if size % divisor == 0]
    for batch in sorted({*small, *(size // divisor for divisor in small)} - {size}, reverse=True):
        what = f"a batch of {batch:,} with {size // batch:,} steps of accumulation"
        changed = replace(run, batch_size=batch, accumulation=run.accumulation * size // batch)
        yield what, "the same result, slower on a large GPU", changed


def _lower_rank(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    rank = run.lora_rank // 2
    while run.method != "full" and rank >= LOWEST_RANK:
        yield f"rank {rank} instead of {run.lora_rank}", "may learn less", replace(run, lora_rank=rank)
        rank //= 2


def _fewer_layers(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    if run.method == "full":
        return
    now = [linear.name.rpartition(".")[2] for linear in shape.targets(run.target_modules)]
    few = tuple(name for name in now if name in ("q_proj", "v_proj", "qkv_proj", "query_key_value"))
    if few and len(few) < len(now):
        yield f"adapters on {' and '.join(few)} only", "may learn less", replace(run, target_modules=few)


def _lora(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    if run.method == "full":
        price = "adapters that learn less than all weights do"
        yield "LoRA on 16-bit weights instead of full fine-tuning", price, _with_adapters(run, "lora")


def _qlora(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    if run.method == "full":
        price = "a 4-bit base, and adapters that learn less than all weights do"
        yield "QLoRA instead of full fine-tuning", price, _with_adapters(run, "qlora")
    elif run.method == "lora":
        yield "QLoRA instead of LoRA", "a 4-bit base, which loses a little", _with_adapters(run, "qlora")


def _with_adapters(run: FineTuning, method: str) -> FineTuning:
    """The run by another method. What its own does not look at was not checked, and was not meant: it takes the defaults."""
    unused = {"double_quant", "block_size"}
    if run.method == "full":
        unused |= {"adapter_dtype", "lora_rank", "lora_dropout", "target_modules", "upcast_fp32"}
    return replace(
        run, method=method, **{each.name: each.default for each in fields(FineTuning) if each.name in unused}
    )


def _shorter(shape: ModelShape, run: FineTuning, gpu: GPU) -> Rung:
    def cut(tokens: int) -> tuple[str, str, FineTuning]:
        what = f"sequences of {tokens:,} tokens instead of {run.seq_len:,}"
        return what, "what is longer is cut off", replace(run, seq_len=tokens)

    enough = longest_sequence(shape, run, gpu)
    if SHORTEST <= enough < run.seq_len:
        yield cut(enough)
    elif run.seq_len > SHORTEST:
        yield cut(SHORTEST)


LADDER = (  # by price, the cheapest first
    _no_upcast, _fused_attention, _fused_optimizer, _8bit_optimizer, _16bit_compute, _double_quant, _checkpointing,
    _smaller_batch, _lower_rank, _fewer_layers, _lora, _qlora, _shorter,
)  # fmt: skip
STRONGEST = 1_000_000  # a level above all that a rung has


def _apply(
    shape: ModelShape, run: FineTuning, gpu: GPU, levels: dict
) -> tuple[tuple[tuple[str, str], ...], Prediction]:
    """The run with each rung at a level: 0 leaves it out, 1 is its mildest change, too high a level its strongest."""
    notes = {}
    # The method goes first: on a full fine-tuning the rungs of the adapters apply only behind it.
    for rung in sorted(LADDER, key=lambda rung: rung not in (_lora, _qlora)):
        for what, price, changed in itertools.islice(rung(shape, run, gpu), levels.get(rung, 0)):
            notes[rung] = (what, price, changed)
        if rung in notes:
            run = notes[rung][2]
    return tuple(notes[rung][:2] for rung in LADDER if rung in notes), predict(shape, run, gpu)


def cures(shape: ModelShape, run: FineTuning, gpu: str | GPU) -> list[Change]:
    """What makes a run fit that does not, the cheapest first; nothing for a run that fits.

    All single changes that are enough, each as mild as it may be. Before them a combination, if it needs only changes that
    are cheaper than the cheapest of them, or if no single one is enough. It has the cheap changes rather than the dear
    ones, and none that could be left out or be milder. If not even all changes together are enough, one entry without a
    run says how much is missing.

    Raises:
        ValueError: as `predict` does.
    """
    gpu = find_gpu(gpu)
    if predict(shape, run, gpu).fits:
        return []
    found, cheaper = [], LADDER
    for place, rung in enumerate(LADDER):
        for what, price, changed in rung(shape, run, gpu):
            prediction = predict(shape, changed, gpu)
            if prediction.fits:
                found.append(Change(what, price, changed, prediction, ((what, price),)))
                if len(found) == 1:
                    cheaper = LADDER[:place]
                break

    def fits(levels: dict) -> bool:
        return _apply(shape, run, gpu, levels)[1].fits

    levels = {}
    for rung in cheaper:
        levels[rung] = STRONGEST
        notes, prediction = _apply(shape, run, gpu, levels)
        if prediction.fits:
            break
    else:
        if found:
            return found
        price = f"nothing else is enough: with all other changes {-prediction.spare_bytes / GIB:.2f} GiB are missing"
        return [Change("a smaller model, or a GPU with more memory", price, None, prediction, notes)]
    # Take back what is not needed, the dearest first. The strongest level fits, so each search ends.
    for rung in reversed(list(levels)):
        levels[rung] = next(level for level in itertools.count() if fits(levels | {rung: level}))
    notes, prediction = _apply(shape, run, gpu, levels)
    what, price = ("; ".join(words) for words in zip(*notes, strict=True))
    return [Change(what, price, prediction.run, prediction, notes), *found]


@dataclass(frozen=True)
class Suggestion:
    """How to reach an effective batch.

    Args:
        batch_size: sequences per forward pass.
        accumulation: forward passes per optimizer step.
        prediction: for this batch size.
    """

    batch_size: int
    accumulation: int
    prediction: Prediction


def suggest(shape: ModelShape, gpu: str | GPU, run: FineTuning = DEFAULT_RUN, effective_batch: int = 16) -> Suggestion:
    """The largest batch that fits and divides the effective batch, and the accumulation that makes up for the rest.

    Args:
        shape: of the model.
        gpu: to run on.
        run: all but its `batch_size` and `accumulation`.
        effective_batch: sequences per optimizer step.

    Raises:
        ValueError: not even a batch of 1 fits, or `effective_batch` is no positive whole number.
    """
    try:
        wanted = operator.index(effective_batch)
    except TypeError:
        wanted = 0
    if wanted < 1 or isinstance(effective_batch, bool):
        raise ValueError(f"effective_batch is {effective_batch!r}; it must be a whole number from 1 on")
    gpu = find_gpu(gpu)
    for batch in (size for size in range(wanted, 0, -1) if wanted % size == 0):
        prediction = predict(shape, replace(run, batch_size=batch, accumulation=wanted // batch), gpu)
        if prediction.fits:
            return Suggestion(batch, wanted // batch, prediction)
    missing = -prediction.spare_bytes / GIB
    raise ValueError(
        f"gpu is {gpu.name}: not even a batch of 1 fits, {missing:.2f} GiB are missing. "
        "cures(shape, run, gpu) says what would help"
    )


def what_fits(
    models: Iterable, gpus: Iterable[str | GPU], run: FineTuning = DEFAULT_RUN
) -> list[tuple[ModelShape, tuple[Prediction | None, ...]]]:
    """A table of models and GPUs: one row per model, in it one prediction per GPU.

    Args:
        models: what `find_shape` takes.
        gpus: names or GPUs; their order is that of the columns.
        run: the same for all.

    Returns:
        Rows of a shape and its predictions; None stands where the run's sequences are too long for the model.

    Raises:
        ValueError: as `find_shape`, `find_gpu` and `predict` do.
    """
    gpus = [find_gpu(gpu) for gpu in gpus]
    rows = []
    for shape in map(find_shape, models):
        too_long = run.seq_len > (shape.max_position_embeddings or run.seq_len)
        rows.append((shape, tuple(None if too_long else predict(shape, run, gpu) for gpu in gpus)))
    return rows
