"""Settings to start from, by the size of the model, the number of rows and the GPU; each with a reason and its source.

`suggestions.json` is the table: for each setting its values, when they hold, why, and what each source says, also those
that disagree. What depends on the GPU, the batch size and gradient checkpointing, comes from `qlora_helpers.memory`.

print(suggest_settings(find_shape("Qwen/Qwen2.5-7B"), 500, "t4"))
"""

from __future__ import annotations

import html
import math
import textwrap
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from qlora_helpers import validation
from qlora_helpers.json_files import read_json
from qlora_helpers.memory import GPU, AnyShape, ModelShape, Prediction, cures, find_gpu, predict, suggest
from qlora_helpers.settings import Settings
from qlora_helpers.units import GIB, in_words

__all__ = [
    "TABLE",
    "FirstChange",
    "Reason",
    "SuggestedSettings",
    "first_changes",
    "read_table",
    "shown",
    "suggest_settings",
    "validation_rows",
    "warmup_steps",
]

TABLE = Path(__file__).with_name("suggestions.json")
ENOUGH_AT_ONCE = 4  # sequences: with as many, checkpointing is not worth its time for a larger batch
WIDTH = 110  # columns of a terminal
MEMORY = "this course: the memory that qlora_helpers.memory predicts"


class Reason(NamedTuple):
    """Why a setting has its value. `source` names who says so, and what each of them says."""

    value: Any
    reason: str
    source: str


class FirstChange(NamedTuple):
    """What to change first when a run goes wrong. `name` is a short one for the symptom, such as "forgets"."""

    symptom: str
    change: str
    why: str
    source: str
    name: str


@dataclass(frozen=True)
class SuggestedSettings:
    """Settings for a first run.

    Attributes:
        shape: of the model.
        rows: chats to train on.
        gpu: to run on; None for a CPU.
        settings: of the run.
        reasons: for each setting that was chosen, by its name; and for "epochs", which `settings` hold as steps, and
            "validation_rows".
        prediction: of the run's memory; None without a GPU.
        notes: what else to know.
    """

    shape: ModelShape | AnyShape
    rows: int
    gpu: GPU | None
    settings: Settings
    reasons: dict[str, Reason] = field(hash=False)
    prediction: Prediction | None
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The model, the data and the GPU in one line, with the memory that the run takes."""
        size = self.shape.parameters
        size = f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.0f} million"
        where = f"on a {self.gpu.name}" if self.gpu else "without a GPU"
        if self.prediction:
            taken, there = in_words(self.prediction.device_bytes), in_words(self.gpu.usable_bytes)
            where += f": {taken} of {there}"
        rows = f"{self.rows:,} row{'s' * (self.rows != 1)}"
        return f"{self.shape.name or 'the model'} ({size} parameters), {rows}, {where}"

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        return {
            "model": self.shape.name,
            "parameters": self.shape.parameters,
            "rows": self.rows,
            "gpu": self.gpu and self.gpu.name,
            "settings": asdict(self.settings),
            "reasons": {name: reason._asdict() for name, reason in self.reasons.items()},
            "predicted_bytes": self.prediction and self.prediction.device_bytes,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [*textwrap.wrap(self.title, WIDTH), ""]
        for name, (value, why, source) in self.reasons.items():
            names = ", ".join(dict.fromkeys(_names_in(source)))
            text = f"{why} [{names}]" if names else why
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=f"{name:24}{shown(value):>12}  ", subsequent_indent=" " * 38
            )
        for note in self.notes:
            lines += ["", *textwrap.wrap(note, WIDTH)]
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # where IPython shows no HTML

    def _repr_html_(self) -> str:
        cells = [(name, shown(value), why, source) for name, (value, why, source) in self.reasons.items()]
        left = "style='text-align:left'"
        rows = "".join(f"<tr>{''.join(f'<td {left}>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
        head = "".join(f"<th {left}>{name}</th>" for name in ("setting", "value", "why", "who says what"))
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<p>{html.escape(self.title)}</p><table><tr>{head}</tr>{rows}</table>{notes}"


def suggest_settings(
    shape: ModelShape | AnyShape,
    rows: int,
    gpu: str | GPU | None = None,
    max_length: int | None = None,
    tokens: int | None = None,
) -> SuggestedSettings:
    """Settings to start a QLoRA run from.

    The effective batch of the table is kept. It is split into a batch that fits the GPU, with room to spare if possible,
    and accumulation. If the adapters for so much data leave no room, their rank is lowered, which a note says.

    Args:
        shape: of the model, such as `find_shape("Qwen/Qwen2.5-7B")`.
        rows: chats to train on, without those for validation.
        gpu: a name that `find_gpu` knows, or a GPU; None for a CPU, whose memory is not predicted.
        max_length: the longest chat in tokens. None for the table's, or as much as the model takes.
        tokens: that are trained on in one epoch, which decide the rank; None for `rows` x `max_length`, the most they
            can be.

    Raises:
        ValueError: an argument has no sense; or nothing fits the GPU: the message says what would help.
    """
    if not isinstance(shape, ModelShape | AnyShape):
        raise validation.refuse("shape", shape, f"give a shape, such as find_shape({str(shape)!r})")
    rows, gpu = validation.whole("rows", rows), gpu if gpu is None else find_gpu(gpu)
    chosen = _Chosen(read_table(), shape)
    if max_length is None:
        chosen.take("max_length", min(chosen.entry("max_length")["value"], shape.max_position_embeddings or math.inf))
    else:
        most = shape.max_position_embeddings
        chosen.give("max_length", validation.whole("max_length", max_length, at_most=most), "given", "")
    if tokens is not None:
        tokens = validation.whole("tokens", tokens)

    effective = _choose_the_length(chosen, rows)
    for name in ("alpha", "dropout", "target_modules", "schedule", "max_grad_norm"):
        chosen.take(name)
    ranks = _choose_the_rank(chosen, rows, tokens)
    if gpu is None:
        chosen.give("batch_size", effective, "the effective batch at once: no GPU limits it", "")
        chosen.give("accumulation", 1, "none is needed", "")
        chosen.give("gradient_checkpointing", False, "faster; memory is not predicted without a GPU", "")
        settings, prediction = chosen.settings(), None
        notes = ["No GPU was named, so neither memory nor time was considered. Name one if the run is for it."]
    else:
        settings, prediction, notes = _fitted(chosen, effective, ranks, gpu)
    _choose_the_validation(chosen, rows)
    if rows > 2 * (usual := chosen.entry("examples")["value"]):
        notes.append(
            f"{rows:,} rows make {settings.steps:,} steps. Train on {usual:,} of them first, as runs mostly do, and see "
            "whether more help."
        )
    return SuggestedSettings(shape, rows, gpu, settings, chosen.reasons, prediction, tuple(notes))


def first_changes() -> list[FirstChange]:
    """What to change first, for each way in which runs mostly go wrong."""
    return [
        FirstChange(entry["symptom"], entry["change"], entry["why"], _sources_of(entry), entry["name"])
        for entry in read_table()["first_changes"]
    ]


def read_table() -> dict[str, Any]:
    """The table as it is in `suggestions.json`: for each setting its entries, and `sources` and `first_changes`."""
    return read_json(TABLE)


# ---- The table


def _sources_of(entry: dict[str, Any]) -> str:
    """Who says what about an entry of the table, in one line."""
    return "; ".join(f"{source['source']}: {source['says']}" for source in entry["sources"])


def _names_in(source: str) -> list[str]:
    """The names of the sources in a text of `_sources_of`, each once."""
    return list(dict.fromkeys(part.partition(": ")[0] for part in source.split("; ") if part))


def shown(value: Any) -> str:
    """A value of the table in words: 0.0002, 30,000, "16, 8, 4"."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{shown(one)} {name}" for name, one in value.items())
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


class _Chosen:
    """The values chosen so far, each with its reason."""

    def __init__(self, table: dict, shape: ModelShape | AnyShape):
        self.table, self.shape, self.reasons = table, shape, {}

    def entry(self, name: str) -> dict:
        """The entry of the table for this model: the first whose limit of parameters it keeps."""
        size = self.shape.parameters
        return next(
            entry
            for entry in self.table[name]
            if entry["parameters_up_to"] is None or size <= entry["parameters_up_to"]
        )

    def give(self, name: str, value: Any, why: str, source: str) -> None:
        self.reasons[name] = Reason(value, why, source)

    def take(self, name: str, value: Any = None, why: str = "", from_: str = "") -> None:
        """Take a value from the table, or one that follows from its entry `from_`; `why` comes before the entry's reason."""
        entry = self.entry(from_ or name)
        reason = "; ".join(filter(None, (why, entry["why"])))
        self.give(name, entry["value"] if value is None else value, reason, _sources_of(entry))

    def settings(self) -> Settings:
        return Settings(**{name: reason.value for name, reason in self.reasons.items() if name != "epochs"})


# ---- How long to train


def _steps(epochs: float, rows: int, effective_batch: int) -> int:
    """Optimizer steps of so many epochs, as training counts them."""
    return Settings(epochs=epochs, batch_size=effective_batch).for_rows(rows).steps


def _choose_the_length(chosen: _Chosen, rows: int) -> int:
    """Epochs, steps, and the learning rate with its warm-up, which depend on them. Returns the effective batch."""
    least, most = chosen.entry("epochs")["value"]
    fewest = chosen.entry("fewest_steps")["value"]
    sizes = chosen.entry("effective_batch")["value"]
    effective = min(next((size for size in sizes if most * rows >= fewest * size), sizes[-1]), rows)
    epochs = min(max(chosen.entry("examples")["value"] / rows, least), most)
    for_fewest = fewest * effective / rows
    if for_fewest > epochs:
        at_most = chosen.entry("most_epochs")["value"]
        epochs = min(for_fewest, at_most)
        why = f"few rows, so as many as make {fewest} steps, but at most {at_most}"
        chosen.take("epochs", _rounded(epochs), why, "most_epochs")
    elif epochs == most:
        chosen.take("epochs", epochs)
    else:
        chosen.take("epochs", _rounded(epochs), "", "examples" if epochs > least else "epochs")
    epochs = chosen.reasons["epochs"].value
    steps = _steps(epochs, rows, effective)
    chosen.take("steps", steps, f"{epochs:g} x {rows:,} rows in batches of {effective}", "effective_batch")
    rate, short = chosen.entry("learning_rate")["value"], chosen.entry("short_run_factor")
    if steps < short["steps_below"] and short["value"] != 1:
        rate = round(rate * short["value"], 10)
        why = f"{short['value']:g} times the usual {rate / short['value']:g}, since the run is shorter than {short['steps_below']} steps"
        sources = f"{_sources_of(short)}; {_sources_of(chosen.entry('learning_rate'))}"
        chosen.give("learning_rate", rate, f"{why}: {short['why']}", sources)
    else:
        chosen.take("learning_rate")
    share = chosen.entry("warmup_share")["value"]
    chosen.take("warmup_steps", warmup_steps(steps), f"{share * 100:g} % of the steps", "warmup_share")
    return effective


def warmup_steps(steps: int) -> int:
    """How many of so many steps to warm up for.

    Raises:
        ValueError: `steps` is no positive whole number.
    """
    return max(1, round(read_table()["warmup_share"][0]["value"] * validation.whole("steps", steps)))


def _rounded(epochs: float) -> float:
    """To the next tenth, so that no rounding makes a run too short."""
    return math.ceil(epochs * 10 - 1e-6) / 10


def validation_rows(rows: int) -> int:
    """How many of so many chats to hold out for validation.

    Raises:
        ValueError: `rows` is no positive whole number.
    """
    rows = validation.whole("rows", rows)
    fewest, most = read_table()["validation_rows"][0]["value"]
    return min(max(rows // 20, fewest), most, max(1, rows // 10))


def _choose_the_validation(chosen: _Chosen, rows: int) -> None:
    held_out = validation_rows(rows + validation_rows(rows * 10 // 9))
    chosen.take("validation_rows", held_out, "beside the training rows")


# ---- The rank


def _choose_the_rank(chosen: _Chosen, rows: int, tokens: int | None) -> list[int]:
    """The smallest rank that can hold the data. Returns this rank and the lower ones, the largest first."""
    entry, shape = chosen.entry("rank"), chosen.shape
    ranks = [rank for rank in entry["value"] if rank <= shape.hidden_size] or [shape.hidden_size]
    length = chosen.reasons["max_length"].value
    bits = (tokens or rows * length) * entry["bits_per_token"]

    def capacity(rank: int) -> float:
        return shape.lora_parameters(rank) * entry["bits_per_parameter"]

    rank = next((rank for rank in ranks if capacity(rank) >= bits), ranks[-1])
    data = f"{tokens:,} tokens" if tokens else f"{rows:,} x {length:,} tokens at most"
    why = f"{data} bring {_bits(bits)}, and rank {rank} holds {_bits(capacity(rank))}"
    if capacity(rank) < bits:
        why += ", so full fine-tuning may learn more from them"
    chosen.take("rank", rank, why)
    return [lower for lower in reversed(ranks) if lower <= rank]


def _bits(count: float) -> str:
    size, unit = next(pair for pair in ((1e9, "Gbit"), (1e6, "Mbit"), (1e3, "kbit"), (1, "bits")) if count >= pair[0])
    return f"{count / size:.3g} {unit}"


# ---- Making it fit


def _fitted(chosen: _Chosen, effective: int, ranks: list[int], gpu: GPU) -> tuple[Settings, Prediction, list[str]]:
    """The run with a batch that fits, at the highest of the ranks with which one does.

    Raises:
        ValueError: none fits.
    """
    shape, wanted = chosen.shape, ranks[0]
    room = chosen.entry("headroom")["value"]
    spare = max(room["GiB"] * GIB, room["of the card"] * gpu.usable_bytes)
    roomy = replace(gpu, usable_bytes=max(0, int(gpu.usable_bytes - spare)))
    trials = ((card, replace(chosen.settings(), rank=rank)) for card in (roomy, gpu) for rank in ranks)
    fitting = ((card, found) for card, trial in trials if (found := _split(shape, trial, effective, card)))
    card, settings = next(fitting, (None, None))
    if settings is None:
        raise _nothing_fits(shape, replace(chosen.settings(), rank=ranks[-1], accumulation=effective), gpu)
    notes = []
    if settings.rank < wanted:
        why = f"rank {wanted} could hold the data, but does not fit this GPU beside the model"
        chosen.take("rank", settings.rank, why)
        notes.append(f"The rank is {settings.rank} and not {wanted}: on a larger GPU the same rows may teach more.")
    if card is gpu:
        notes.append(f"It fits with less than {in_words(int(spare))} to spare: predictions can be that much off.")
    why = f"the largest that fits and divides the effective batch of {effective}"
    chosen.take("batch_size", settings.batch_size, why, "headroom")
    chosen.give("accumulation", settings.accumulation, f"keeps the effective batch of {effective}", "")
    why = "it fits without, which is faster: checkpointing takes about 1.4 times the time (8B on an H200)"
    if settings.gradient_checkpointing:
        why = "without it the batch would be smaller, or not fit"
    chosen.give("gradient_checkpointing", settings.gradient_checkpointing, why, MEMORY)
    return settings, predict(shape, settings, gpu), notes


def _split(shape: ModelShape | AnyShape, settings: Settings, effective: int, gpu: GPU) -> Settings | None:
    """The settings with a batch that fits and the accumulation for the rest; None if not even a batch of 1 fits."""
    found = {}
    for checkpointing in (False, True):
        trial = replace(settings, gradient_checkpointing=checkpointing)
        try:
            split = suggest(shape, gpu, trial, effective)
        except ValueError:
            # the arguments were checked, so it says that no batch fits; a wrong one would be refused here again
            predict(shape, trial, gpu)
            continue
        found[checkpointing] = replace(trial, batch_size=split.batch_size, accumulation=split.accumulation)
    if False in found and found[False].batch_size >= min(
        found[True].batch_size if True in found else 1, ENOUGH_AT_ONCE
    ):
        return found[False]
    return found.get(True)


def _nothing_fits(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> ValueError:
    """The error that says what would help."""
    settings = replace(settings, batch_size=1, gradient_checkpointing=True)
    helps = "".join(f"\n- {change.what} (price: {change.price})" for change in cures(shape, settings, gpu))
    return ValueError(
        f"gpu is {gpu.name}: {shape.name or 'the model'} does not fit with sequences of {settings.max_length:,} tokens, not "
        f"even one at a time with adapters of rank {settings.rank}. What would help:{helps}"
    )
