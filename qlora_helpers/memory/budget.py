"""The fastest run that fits into a budget of GPU memory.

Time is estimated in tokens of a plain step, from three costs. The first two were measured on one H200 with an 8B model (see
`data/measured/speed.json`, and lesson 11):

- each pass through the model has a cost that does not depend on its tokens: 4-bit weights are decoded, kernels launched
  (`PER_PASS`). So few large passes are faster than many small ones. It was that of some 1,700 tokens, and more where a step
  had two passes.
- a checkpointed layer runs forward twice (`RECOMPUTED`).
- the layers' inputs go to main memory and back (`OFFLOADED`). This was not measured: it is taken to be small, since the copies
  go on beside the products, and it decides only where nothing else fits.

What they are in seconds depends on the card; which of two choices is faster hardly does.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from qlora_helpers import validation
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.gpus import GPU
from qlora_helpers.memory.prediction import Prediction, predict
from qlora_helpers.memory.search import largest_that_fits
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.settings import Settings
from qlora_helpers.units import MIB, in_words

__all__ = ["CHOSEN", "LEAST_MARGIN", "MARGIN", "Choice", "Plan", "budget_bytes", "plan_for"]

PER_PASS = 2000  # tokens
RECOMPUTED = 0.39  # of a token's time
OFFLOADED = 0.10  # of a token's time
MARGIN, LEAST_MARGIN = 0.04, 256 * MIB  # what is left free: a share of the budget, and at least so much
WORTH_TRYING = 0.01  # of the time: what is estimated to save less is not looked for
SHOWN = 6
# what a budget chooses
CHOSEN = ("batch_size", "accumulation", "gradient_checkpointing", "checkpointed_layers", "activation_offloading")


@dataclass(frozen=True)
class Choice:
    """One way to make a run.

    Attributes:
        settings: of the run.
        prediction: of its memory.
        cost: its estimated time for a step, in tokens of a plain step.
    """

    settings: Settings
    prediction: Prediction
    cost: float

    def __str__(self) -> str:
        return f"{_in_words(self.settings, self.prediction)}: {in_words(self.prediction.device_bytes)}"


@dataclass(frozen=True)
class Plan:
    """What was chosen for a budget.

    Attributes:
        budget: in bytes, for the whole process: torch's memory and the CUDA context.
        margin: bytes of it that the prediction leaves free.
        chosen: the fastest of the choices that fit.
        others: the fastest of the other ways that were tried, whether they fit or not.
    """

    budget: int
    margin: int
    chosen: Choice
    others: tuple[Choice, ...]

    @property
    def context_bytes(self) -> int:
        """What of the budget is not for torch's tensors."""
        return self.chosen.prediction.gpu.context_bytes

    def __str__(self) -> str:
        head = f"Memory budget {in_words(self.budget)}, {in_words(self.margin)} of it left free. Chosen: {self.chosen}"
        lines = [head]
        for other in self.others:
            time = other.cost / self.chosen.cost - 1
            pace = f"about {abs(time):.0%} {'slower' if time > 0 else 'faster'}"
            fits = other.prediction.device_bytes <= self.budget - self.margin
            lines.append(f"  {other}, {pace}{'' if fits else '; does not fit'}")
        return "\n".join(lines)


def _in_words(settings: Settings, prediction: Prediction) -> str:
    layers = _layers(prediction.shape)
    kept = _checkpointed(settings, layers)
    words = [f"{settings.batch_size} x {settings.max_length} tokens at once"]
    words.append("all layers checkpointed" if kept == layers else f"{kept} of {layers} layers checkpointed")
    if settings.activation_offloading:
        words.append("their inputs in main memory")
    return ", ".join(words)


def _layers(shape: ModelShape | AnyShape) -> int:
    """Of the decoder; 1 where a config does not say how many: then all or none are checkpointed."""
    return max(shape.num_hidden_layers, 1)


def _checkpointed(settings: Settings, layers: int) -> int:
    if not settings.gradient_checkpointing:
        return 0
    return layers if settings.checkpointed_layers is None else min(settings.checkpointed_layers, layers)


def budget_bytes(settings: Settings, gpu: GPU, free: int) -> int:
    """The budget of a run in bytes.

    Args:
        free: what "auto" takes.

    Raises:
        ValueError: it is more than the card has.
    """
    if settings.memory_budget == "auto":
        return free
    if settings.memory_budget > gpu.usable_bytes:
        allowed = f"is {in_words(settings.memory_budget)}, and the {gpu.name} has {in_words(gpu.usable_bytes)}. 'auto' takes what is free"
        raise validation.refuse("memory_budget", settings.memory_budget, allowed)
    return settings.memory_budget


def plan_for(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU, budget: int) -> Plan:
    """Choose how a run is made so that it is the fastest that fits.

    Args:
        shape: of the model.
        settings: of the run. The chats of a step, batch_size x accumulation, stay as they are, and are split: in the choice
            batch_size is the most rows of a pass, and accumulation the number of passes, which need not come out even.
            Which layers are checkpointed and whether their inputs are offloaded is chosen, too.
        gpu: the card, or one of several.
        budget: bytes for the process, or for each of several.

    Raises:
        ValueError: not even the least demanding choice fits; or the run has `sharding`, with which the choices are not
            predicted.
    """
    validation.whole("budget", budget)
    if settings.sharding:
        allowed = "leave it out of a run with sharding: what a budget chooses layer by layer is not predicted there"
        raise validation.refuse("memory_budget", settings.memory_budget or budget, allowed)
    margin = max(int(MARGIN * budget), LEAST_MARGIN)
    search = _Search(shape, gpu, budget - margin, settings)
    splits = _splits(search.chats)
    first = 0
    if not search.fits(*splits[0]) and len(splits) > 1:
        first = len(splits) - 1
        if search.fits(*splits[first]):  # the first that fits lies between: memory falls with the rows
            first = bisect_left(splits, True, hi=first, key=lambda split: search.fits(*split))
    if search.best is None:
        least = min(search.tried, key=lambda choice: choice.prediction.device_bytes)
        raise validation.refuse(
            "memory_budget",
            budget,
            f"{in_words(budget)}, {in_words(margin)} of it left free, is too little: the least that the run can do with is "
            f"{least}. Shorten max_length={settings.max_length}, or take a smaller model",
        )
    for split in splits[first:]:
        if not search.try_split(*split):
            break
    others = [choice for choice in search.tried if choice is not search.best]
    shown = sorted(others, key=lambda choice: choice.cost)
    return Plan(budget, margin, search.best, tuple(shown[:SHOWN]))


def _splits(chats: int) -> list[tuple[int, int]]:
    """How the chats of a step can be split: the number of passes, and the most rows of one; the fewest passes first."""
    found, passes = [], 1
    while passes <= chats:
        rows = -(-chats // passes)
        found.append((passes, rows))
        passes = chats + 1 if rows == 1 else -(-chats // (rows - 1))  # the fewest with fewer rows
    return found


class _Search:
    """Looks for the choice with the least cost that leaves room.

    Attributes:
        room: bytes that a choice may take.
        chats: of a step, on each GPU.
        best: the one with the least cost so far; None if nothing fits yet.
        tried: all whose memory was predicted.
    """

    def __init__(self, shape: ModelShape | AnyShape, gpu: GPU, room: int, settings: Settings) -> None:
        self.shape, self.gpu, self.room, self.layers = shape, gpu, room, _layers(shape)
        self.settings, self.chats = settings, settings.batch_per_gpu * settings.accumulation
        self.best: Choice | None = None
        self.tried: list[Choice] = []

    def fits(self, passes: int, rows: int) -> bool:
        """Whether a split fits in some way."""
        base = self._split(passes, rows)
        return self._try(base, 0) >= 0 or self._try(base, 0, offloaded=True) >= 0

    def try_split(self, passes: int, rows: int) -> bool:
        """Find the fewest layers that have to be checkpointed, if that can be faster than the best so far.

        Returns:
            Whether it could have been: if not, nor can one of more passes.
        """
        base, most = self._split(passes, rows), self.layers
        to_beat = self.best.cost * (1 - WORTH_TRYING)
        if self._cost(base, most) >= to_beat:
            return False
        if self.best.settings != self._with_kept(base, 0):  # else it is known that this split fits
            least = next(kept for kept in range(most + 1) if self._cost(base, kept) < to_beat)
            if self._try(base, least) < 0:
                return True
        if (none := self._try(base, most)) >= 0 or most < 2:
            return True
        every = self._try(base, 0)
        largest_that_fits(lambda kept: self._try(base, kept), 0, most, known=int(most * every / (every - none)))
        return True

    def _split(self, passes: int, rows: int) -> Settings:
        size = rows * self.settings.num_gpus
        return replace(self.settings, batch_size=size, accumulation=passes, memory_budget=None)

    def _with_kept(self, base: Settings, kept: int, offloaded: bool = False) -> Settings:
        """A run in which this many layers keep their activations."""
        some = 0 < kept < self.layers
        return replace(
            base,
            gradient_checkpointing=kept < self.layers,
            checkpointed_layers=self.layers - kept if some else None,  # else the predictor's fast road will do
            activation_offloading=offloaded,
        )

    def _cost(self, base: Settings, kept: int, offloaded: bool = False) -> float:
        """The time of a step in which this many layers keep their activations, in tokens of a plain step."""
        again = RECOMPUTED * (1 - kept / self.layers)
        tokens = self.chats * base.max_length
        return (base.accumulation * PER_PASS + tokens) * (1 + again + OFFLOADED * offloaded)

    def _try(self, base: Settings, kept: int, offloaded: bool = False) -> int:
        """The room that is left; negative if it is too little."""
        settings = self._with_kept(base, kept, offloaded)
        choice = next((choice for choice in self.tried if choice.settings == settings), None)
        if choice is None:
            prediction = predict(self.shape, settings, self.gpu)
            choice = Choice(settings, prediction, self._cost(base, kept, offloaded))
            self.tried.append(choice)
        left = self.room - choice.prediction.device_bytes
        if left >= 0 and (self.best is None or choice.cost < self.best.cost):
            self.best = choice
        return left
