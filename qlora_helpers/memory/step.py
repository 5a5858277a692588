"""What a training step takes beyond what is there throughout: each piece of the model, run on a tape, and the step's moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from qlora_helpers.memory.layers import DEQUANTISED, TILE, DecoderLayer, LayerSettings
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.tape import FLOAT32, Tape, Tensor, rounded
from qlora_helpers.memory.trained import Trained
from qlora_helpers.settings import Settings

__all__ = [
    "TILE_TOKENS",
    "TILE_VOCABULARY",
    "Cost",
    "Moment",
    "Peak",
    "before_head",
    "cost_of",
    "last_layer_forward",
    "mask_bytes",
    "moments_of_a_step",
]

# TRL's fused output head works on tiles (trl/kernels/chunked_logprob.py, trl/trainer/utils.py).
TILE_TOKENS, TILE_VOCABULARY = 4_096, 32_768


@dataclass(frozen=True)
class Peak:
    """The most that a piece of the step takes, in bytes, and how much of it is of each kind that is shown separately."""

    total: int
    dequantised: int = 0
    tile: int = 0

    @classmethod
    def of(cls, tape: Tape, without: int) -> Peak:
        return cls(tape.peak - without, tape.peak_of.get(DEQUANTISED, 0), tape.peak_of.get(TILE, 0))


@dataclass(frozen=True)
class Cost:
    """A piece of the model: the bytes that its forward pass keeps, and the peaks of its forward and backward pass.

    None of them includes the input of the piece; `backward` includes the gradient of its output.
    """

    kept: int
    forward: Peak
    backward: Peak


@dataclass(frozen=True)
class Moment:
    """A moment of the step: bytes beyond those that are there throughout the step.

    Args:
        at_work: what the running piece of the model takes.
        gradients: of trained weights.
        activations: checkpoints, or all that the layers have kept.
        copies: of adapters in 16 bits, which autocast holds during the forward pass.
    """

    at_work: Peak
    gradients: int = 0
    activations: int = 0
    copies: int = 0

    @property
    def total(self) -> int:
        return self.at_work.total + self.gradients + self.activations + self.copies


def cost_of(
    shape: ModelShape,
    how: LayerSettings,
    apply: Callable[[DecoderLayer, Tensor], Tensor],
    keep_input: bool,
    first: bool = False,
) -> Cost:
    """Run a piece of the model on a tape, forward and backward.

    Args:
        apply: maps a `DecoderLayer` and its input to the result, such as `DecoderLayer.__call__`.
        keep_input: the input stays whether or not a gradient needs it.
        first: the input requires no gradient.
    """
    tape = Tape()
    layer = DecoderLayer(shape, how, tape)
    elements = how.tokens * shape.hidden_size
    x = tape.new(elements, how.stream) if first else tape.source(elements, how.between)
    size = x.buffer.size
    out = apply(layer, x)
    forward = Peak.of(tape, size)
    node, out_elements, out_width = out.node, out.elements, out.width
    if not keep_input:
        del x
        size = 0
    del out
    kept = tape.live - size
    gradient = tape.new(out_elements, out_width)
    tape.forget_peak()
    tape.backward(node, gradient)
    return Cost(kept, forward, Peak.of(tape, size))


def _head(layer: DecoderLayer, x: Tensor) -> Tensor:
    """The final norm and TRL's fused output head, down to the loss."""
    shape, how, tape = layer.shape, layer.how, layer.tape
    new, h, s = tape.new, shape.hidden_size, how.stream
    normed = layer.layer_norm(x, h) if shape.has_layer_norm else layer.rms_norm(x, h)
    del x
    width = normed.width
    scored = how.batch_size * max(how.max_length - 1, 1)  # the last token of a sequence predicts nothing
    whole = how.tokens * h

    def unpick(g):  # the gradient is written into zeros twice: for the tokens that count, and for all but the last
        picked = new(scored * h, width)
        gradient = new(whole, width)
        del picked
        return (gradient,)

    hidden = tape.apply(scored * h, width, (normed,), unpick)
    statistics = new(7 * scored, FLOAT32)
    rows = min(scored, TILE_TOKENS)
    trained = how.method == "full"

    def tile(pieces: int) -> list[Tensor]:
        taken = [new(rows * TILE_VOCABULARY, how.compute, TILE)]
        if width != how.compute:
            taken.append(new(rows * h, how.compute))
        if s != how.compute:  # 16-bit copies of pieces of the float32 head
            taken.append(new(min(pieces * TILE_VOCABULARY, shape.vocab_size) * h, how.compute))
        return taken

    taken = tile(1)
    del taken, statistics
    kept = new(2 * scored, FLOAT32)

    def backward(g, saved=(hidden, kept)):
        # all of these are alive until the function returns
        wide = new(scored * h, FLOAT32)
        wide_weight = new(shape.vocab_size * h, FLOAT32) if trained else None
        taken = tile(2)  # a piece is freed only after the next is made
        of_hidden = wide if width == FLOAT32 else new(scored * h, width)
        if trained:
            tape.keep_weight_gradient(new(shape.vocab_size * h, how.weight))
        del wide, wide_weight, taken
        return (of_hidden,)

    return tape.apply(1, FLOAT32, (hidden,), backward)


@lru_cache(maxsize=4096)
def _costs(shape: ModelShape, how: LayerSettings, checkpointing: bool) -> tuple[Cost, Cost, Cost]:
    """The cost of the first decoder layer, of each other one, and of the head."""
    layer = first = cost_of(shape, how, DecoderLayer.__call__, keep_input=checkpointing)
    # with checkpointing TRL makes the embeddings' output require a gradient; with trained embeddings it does anyway
    if not checkpointing and how.method != "full":
        first = cost_of(shape, how, DecoderLayer.__call__, keep_input=False, first=True)
    return first, layer, cost_of(shape, how, _head, keep_input=False)


def mask_bytes(shape: ModelShape, how: LayerSettings) -> int:
    """Bytes of attention masks, which are made once for all layers."""
    pairs = how.batch_size * how.max_length**2  # of tokens
    if how.kernel == "eager":  # Gemma 2 has a mask with a window and one without
        return pairs * how.compute * (2 if shape.model_type == "gemma2" else 1)
    return pairs if how.masked else 0


def moments_of_a_step(shape: ModelShape, settings: Settings, how: LayerSettings, trained: Trained) -> dict[str, Moment]:
    """The moments at which a step's peak can occur, in order, under the names of `phases.MOMENTS`."""
    full = settings.method == "full"
    x = rounded(how.tokens * shape.hidden_size * how.between)  # what one layer hands to the next
    table = shape.vocab_size * shape.hidden_size * trained.width if full else 0
    make = _with_checkpointing if settings.gradient_checkpointing else _without_checkpointing
    moments = make(shape, how, trained, table, x)
    if full:
        # the head's gradient is there; if the head shares its weight with the embeddings, theirs is made besides
        of_embeddings = table if shape.tie_word_embeddings else 0
        moments["embeddings backward"] = Moment(Peak(x + of_embeddings), trained.gradients)
    moments["optimizer step"] = Moment(Peak(trained.temporaries), trained.gradients)
    if settings.accumulation > 1:  # the gradients of earlier passes are there, and new ones are added to them
        moments = {name: replace(moment, gradients=trained.gradients) for name, moment in moments.items()}
    return moments


class _NoGradient(Tape):
    """A tape that records nothing, as torch does under `no_grad`: what no later operation needs is freed at once."""

    def _noted(self, out: Tensor, inputs: tuple, backward: Callable) -> Tensor:
        return out


@lru_cache(maxsize=4096)
def _forward_without_gradient(shape: ModelShape, how: LayerSettings) -> Peak:
    tape = _NoGradient()
    x = tape.new(how.tokens * shape.hidden_size, how.between)
    DecoderLayer(shape, how, tape)(x)
    return Peak.of(tape, x.buffer.size)


def last_layer_forward(shape: ModelShape, how: LayerSettings, checkpointing: bool) -> Moment:
    """The moment at which the last layer runs forward. It takes less than its backward pass, unless weights have to be gathered."""
    first, layer, _ = _costs(shape, how, checkpointing)
    layers = shape.num_hidden_layers
    if not checkpointing:
        return Moment(layer.forward, 0, max(first.kept + (layers - 2) * layer.kept, 0))
    x = rounded(how.tokens * shape.hidden_size * how.between)
    kept = rounded(how.tokens * shape.hidden_size * how.stream) + (layers - 1) * x
    return Moment(_forward_without_gradient(shape, how), 0, kept)


def before_head(shape: ModelShape, how: LayerSettings, checkpointing: bool) -> Moment:
    """The moment between the decoder and the output head: it takes less than the loss, unless the head has to be gathered."""
    tape = Tape()
    layer = DecoderLayer(shape, how, tape)
    x = tape.source(how.tokens * shape.hidden_size, how.between)
    norm = layer.layer_norm if shape.has_layer_norm else layer.rms_norm
    out = norm(x, shape.hidden_size)
    normed = Peak(tape.live)
    del x, out
    if not checkpointing:
        first, layer_cost, _ = _costs(shape, how, False)
        return Moment(normed, 0, first.kept + (shape.num_hidden_layers - 1) * layer_cost.kept)
    between = rounded(how.tokens * shape.hidden_size * how.between)
    kept = rounded(how.tokens * shape.hidden_size * how.stream) + (shape.num_hidden_layers - 1) * between
    return Moment(normed, 0, kept)


def _gradients_above_the_first_layer(shape: ModelShape, how: LayerSettings, trained: Trained, table: int) -> int:
    """Bytes of the gradients that are there when the backward pass reaches the first layer."""
    of_layers = trained.width * shape.linear_parameters if how.method == "full" else trained.gradients
    layers = shape.num_hidden_layers
    return table + (layers - 1) * (of_layers // layers)


def _with_checkpointing(shape: ModelShape, how: LayerSettings, trained: Trained, table: int, x: int) -> dict:
    _, layer, head = _costs(shape, how, True)
    copies = (
        trained.parameters * how.compute if how.autocast and trained.width != how.compute else 0
    )  # autocast's cache
    kept = rounded(how.tokens * shape.hidden_size * how.stream) + (shape.num_hidden_layers - 1) * x
    loss = replace(head.forward, total=head.forward.total + x)  # the last layer's output is there
    # a layer is run again while the gradient of its output is held
    forward_again = replace(layer.forward, total=layer.forward.total + x)
    again = max(layer.backward, forward_again, key=lambda peak: peak.total)
    return {
        "loss": Moment(loss, 0, kept, copies),
        "loss backward": Moment(head.backward, 0, kept),
        "last layer backward": Moment(again, table, kept),
        "first layer backward": Moment(again, _gradients_above_the_first_layer(shape, how, trained, table), x),
    }


def _without_checkpointing(shape: ModelShape, how: LayerSettings, trained: Trained, table: int, x: int) -> dict:
    first, layer, head = _costs(shape, how, False)
    kept = first.kept + (shape.num_hidden_layers - 1) * layer.kept
    loss = replace(head.forward, total=head.forward.total + x)  # the last layer's output is there
    return {
        "loss": Moment(loss, 0, kept),
        "loss backward": Moment(head.backward, 0, kept),
        "last layer backward": Moment(layer.backward, table, kept - layer.kept),
        "first layer backward": Moment(first.backward, _gradients_above_the_first_layer(shape, how, trained, table)),
    }
