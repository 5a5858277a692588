"""The course's diagrams, drawn from real numbers: nothing in them is typed that `quantize`, `predict` or a shape can give.

Each function returns a figure in the course's style. The text that says in words what it shows is under the function's
name in `alt_texts/diagrams.json`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.patches import FancyArrowPatch, Rectangle

from qlora_helpers import validation
from qlora_helpers.course import plots
from qlora_helpers.memory import GPU_RUN, find_shape, predict
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import NESTED_BLOCK_SIZE, NF4, Codebook, dequantize, quantize
from qlora_helpers.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AdaptedLayer",
    "backward_pass",
    "block_and_codebook",
    "checkpointing",
    "course_map",
    "forward_pass",
    "two_levels",
]

WIDTH = 7.2  # inches, as wide as a notebook's text
INK, GREY, PALE = "#222222", "#555555", "#F2F2F2"
# Pale fills under dark text; frozen and trained, stored and passing differ in their edges and words, too.
FILLS = {plots.BLUE: "#D6E8F4", plots.ORANGE: "#FCEBC8", plots.GREEN: "#CFEDE3", plots.RED: "#F9DFCC", GREY: PALE}
HALF, FULL = torch.bfloat16.itemsize, torch.float32.itemsize
SHOWN = 8  # weights of a block that have room beside each other


def _canvas(height: float, title: str) -> tuple[Figure, Axes]:
    """A figure without axes, whose coordinates are inches from its lower left corner; the title is at its top."""
    fig, ax = plots.figure(figsize=(WIDTH, height), layout="none")
    ax.set_position((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.set_axis_off()
    fig.suptitle(title, x=0.1 / WIDTH, y=1 - 0.08 / height, ha="left", va="top", fontsize=12, fontweight="bold")
    return fig, ax


def _write(ax: Axes, x: float, y: float, text: str, size: float = 9, at: str = "center", **options) -> None:
    options = {"color": INK, "va": "center", "linespacing": 1.3} | options
    ax.text(x, y, text, fontsize=size, ha=at, **options)


def _box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str = "", colour: str = GREY, size: float = 9,
    passing: bool = False, **options,
) -> None:  # fmt: skip
    """A box with its lower left corner at x, y and a text in its middle; its edge is dashed if what it holds does not stay."""
    style = {"facecolor": FILLS[colour], "edgecolor": colour, "linewidth": 1.3, "linestyle": "--" if passing else "-"}
    ax.add_patch(Rectangle((x, y), width, height, **style))
    if text:
        _write(ax, x + width / 2, y + height / 2, text, size, **options)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY, dashed: bool = False
) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0, "color": colour, "linewidth": 1.4}
    ax.add_patch(FancyArrowPatch(start, end, linestyle="--" if dashed else "-", **style))


def _size(count: float) -> str:
    """Bytes in the largest unit of which there is at least one, such as "28 MiB"."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,.0f} bytes"


def _block_of_the_shipped_model() -> torch.Tensor:
    """64 weights of the shipped model, a block whose largest weight is positive and has neighbours of many sizes."""
    from safetensors import safe_open

    with safe_open(data_path("tiny-llama", "model.safetensors"), "pt") as file:
        return file.get_tensor("model.layers.1.mlp.up_proj.weight").view(-1, 64)[36].float()


def _most_distinct(scaled: torch.Tensor) -> slice:
    """Of the windows of `SHOWN` values with the largest one in them, the one whose values lie farthest apart."""
    largest = int(scaled.abs().argmax())
    windows = [
        slice(first, first + SHOWN)
        for first in range(max(0, largest - SHOWN + 1), min(largest, len(scaled) - SHOWN) + 1)
    ]
    return max(windows, key=lambda window: scaled[window].sort().values.diff().min().item())


def block_and_codebook(weights: torch.Tensor | None = None, codebook: Codebook = NF4) -> Figure:
    """A block of weights, its absmax, its codes, and the values of the codebook that they stand for.

    Args:
        weights: one block, at least 8 values; without it, 64 weights of the shipped model.
        codebook: of at most 16 values.

    Raises:
        ValueError: there are fewer weights or more values than that; as `quantize` does for weights it cannot take.
    """
    block = _block_of_the_shipped_model() if weights is None else weights.flatten().float()
    if len(block) < SHOWN:
        raise ValueError(
            f"weights has {len(block)} values: the diagram shows {SHOWN} of a block, pass at least as many"
        )
    if len(codebook.values) > 16:
        raise ValueError(f"codebook has {len(codebook.values)} values: the diagram has room for 16, pass one of 4 bits")
    made = quantize(block, codebook, len(block), double_quant=False)
    decoded, absmax = dequantize(made), made.absmax.item()
    scaled = block / max(absmax, torch.finfo(torch.float32).tiny)
    seen = _most_distinct(scaled)

    fig, ax = _canvas(5.0, f"A block keeps {codebook.bits}-bit codes and one scale; the codebook decodes them")
    left, width = 1.5, (WIDTH - 1.5 - 0.15) / SHOWN
    centres = [left + width * (place + 0.5) for place in range(SHOWN)]

    def row(y: float, name: str, texts: Sequence[str], colour: str, **options) -> None:
        _write(ax, left - 0.12, y, name, at="right")
        for centre, text in zip(centres, texts, strict=True):
            _box(ax, centre - width / 2 + 0.03, y - 0.15, width - 0.06, 0.3, text, colour, **{"size": 8.5} | options)

    def numbers(values: torch.Tensor, form: str) -> list[str]:
        return [format(value, form).replace("-", "−") for value in values[seen].tolist()]

    row(4.3, f"{SHOWN} of the {len(block)}\nweights", numbers(block, ".4f"), GREY, passing=True)
    largest = int(block.abs().argmax())
    at = centres[largest - seen.start]
    ax.add_patch(
        Rectangle((at - width / 2 + 0.03, 4.15), width - 0.06, 0.3, fill=False, edgecolor=plots.BLUE, linewidth=2.5)
    )
    _box(ax, at - width / 2 + 0.03, 3.68, width - 0.06, 0.3, f"{absmax:.4f}", plots.BLUE, 8.5, fontweight="bold")
    side = -1 if at > WIDTH / 2 else 1
    _write(
        ax,
        at + side * (width / 2 + 0.05),
        3.83,
        "absmax, the largest in size: the scale",
        at="right" if side < 0 else "left",
    )
    row(3.33, "÷ absmax", numbers(scaled, ".3f"), GREY, passing=True)

    # the line of the codebook, with a lead from each weight to its place and from there to its code
    start, end, line, top = left + 0.15, WIDTH - 0.3, 2.5, 3.18
    place_of = lambda value: start + (value + 1) / 2 * (end - start)  # noqa: E731
    ax.plot([start, end], [line, line], color=GREY, linewidth=1)
    _write(ax, left - 0.12, line + 0.12, f"the codebook:\n{len(codebook.values)} values", at="right")
    for value in codebook.values.tolist():
        ax.plot([place_of(value)] * 2, [line - 0.09, line + 0.09], color=plots.BLUE, linewidth=2.2)
    for centre, value in zip(centres, scaled[seen].tolist(), strict=True):
        ax.plot([centre, place_of(value)], [top, line + 0.02], color=plots.ORANGE, linewidth=1.2)
        ax.plot(
            place_of(value),
            line,
            "o",
            color=plots.ORANGE,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            markersize=6,
            zorder=3,
        )
    for code, value in enumerate(codebook.values.tolist()):
        if not any(value == other for other in codebook.values[:code].tolist()):  # FP4 has two zeros
            _write(ax, place_of(value), line - 0.2, f"{code}", 8, color=plots.BLUE)

    row(
        1.95,
        "code of the\nnearest value",
        [f"{code}" for code in made.codes[seen].tolist()],
        plots.BLUE,
        fontweight="bold",
    )
    row(1.5, "its value", numbers(codebook.values[made.codes.long()], ".3f"), GREY, passing=True)
    row(1.05, "× absmax", numbers(decoded, ".4f"), GREY, passing=True)
    row(0.6, "error", numbers(decoded - block, "+.4f"), GREY, passing=True)
    _write(ax, 0.1, 0.17, f"Stored: {len(block)} codes of {codebook.bits} bits ({made.packed.nbytes} bytes) and one float32 absmax "
           f"({made.absmax.nbytes} bytes); in 16 bits, {2 * len(block)} bytes", at="left", fontweight="bold")  # fmt: skip
    return fig


def two_levels(block_size: int = 64) -> Figure:
    """Double quantisation: the scales of 256 blocks become codes of 8 bits under one scale of their own.

    Args:
        block_size: weights that share a scale of the first level.

    Raises:
        ValueError: `block_size` is not a positive whole number.
    """
    block_size = validation.whole("block_size", block_size)
    weights = torch.randn(NESTED_BLOCK_SIZE * block_size, generator=torch.Generator().manual_seed(0))
    single, double = (quantize(weights, NF4, block_size, double_quant=nested) for nested in (False, True))
    codes, scales = double.packed.nbytes, single.absmax.nbytes
    scale_codes, second = double.absmax.nbytes, double.nested.absmax.nbytes
    saved = single.bits_per_parameter - double.bits_per_parameter

    fig, ax = _canvas(4.15, f"Double quantisation: {scales:,} bytes of scales become {scale_codes} + {second}")
    left, narrow, gap, shown = 1.1, 0.62, 0.1, 4
    blocks = [left + place * (narrow + gap) for place in range(shown)] + [left + (shown + 0.65) * (narrow + gap)]
    names = [f"{number}" for number in range(1, shown + 1)] + [f"{NESTED_BLOCK_SIZE}"]
    right = blocks[-1] + narrow
    bytes_at = right + 0.35
    _write(ax, bytes_at, 3.62, "bytes", at="left", color=GREY)
    _write(ax, bytes_at + 0.72, 3.62, "bits per weight", at="left", color=GREY)

    def bill(y: float, size: int, bold: bool = False) -> None:
        weight = "bold" if bold else "normal"
        _write(ax, bytes_at, y, f"{size:,}", at="left", fontweight=weight)
        _write(
            ax,
            bytes_at + 0.72,
            y,
            f"{8 * size / len(weights):.6f}".rstrip("0").rstrip("."),
            at="left",
            fontweight=weight,
        )

    middle = (left + right) / 2
    _write(ax, left - 0.12, 3.25, "level 2:\none scale", at="right")
    _box(ax, middle - 0.75, 3.05, 1.5, 0.4, "float32", plots.ORANGE)
    bill(3.25, second)
    _write(ax, left - 0.12, 2.35, f"level 1:\n{NESTED_BLOCK_SIZE} scales", at="right")
    _write(ax, left - 0.12, 1.4, f"{len(weights):,}\nweights", at="right")
    for x, name in zip(blocks, names, strict=True):
        _box(ax, x, 2.15, narrow, 0.4, "8-bit\ncode", plots.GREEN, 8)
        _arrow(ax, (middle + (x + narrow / 2 - middle) * 0.18, 3.05), (x + narrow / 2, 2.55), plots.ORANGE)
        _box(ax, x, 1.05, narrow, 0.7, f"block {name}\n{block_size} x\n4 bits", plots.BLUE, 8)
        _arrow(ax, (x + narrow / 2, 2.15), (x + narrow / 2, 1.75), plots.GREEN)
    dots = (blocks[-2] + narrow + blocks[-1]) / 2
    for y in (2.35, 1.4):
        _write(ax, dots, y, "…", 12)
    bill(2.35, scale_codes)
    bill(1.4, codes)
    ax.plot([bytes_at, WIDTH - 0.15], [0.9, 0.9], color=GREY, linewidth=0.8)
    bill(0.72, codes + scale_codes + second, bold=True)
    _write(ax, left - 0.12, 0.72, "together", at="right")
    _write(ax, 0.1, 0.32, f"With one level, each of the {NESTED_BLOCK_SIZE} scales is a float32: {codes:,} + {scales:,} bytes, "
           f"{single.bits_per_parameter:g} bits per weight.\nThe second level saves {saved:.6f} of them. "
           "The mean that is subtracted from the scales is 4 bytes per matrix.", at="left")  # fmt: skip
    return fig


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer in 4 bits with its adapter, and what goes through it. Without arguments: `up_proj` of Llama-3.1-8B.

    Attributes:
        inputs, outputs: columns and rows of the weight.
        rank: of the adapter.
        tokens: rows of the input.
        alpha: the adapter's output is multiplied by alpha / rank.
    """

    inputs: int = 4096
    outputs: int = 14_336
    rank: int = GPU_RUN.rank
    tokens: int = GPU_RUN.max_length
    alpha: float = GPU_RUN.alpha

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "rank", "tokens"):
            object.__setattr__(self, name, validation.whole(name, getattr(self, name)))

    @property
    def weights(self) -> int:
        """Weights of the frozen matrix."""
        return self.inputs * self.outputs

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.alpha / self.rank


def _shape(rows: int, columns: int) -> str:
    return f"{rows:,} × {columns:,}"


def _matrix(rows: int, columns: int, bytes_each: int) -> str:
    """Shape and size of a matrix, one below the other."""
    return f"{_shape(rows, columns)}\n{_size(rows * columns * bytes_each)}"


def _frozen_weight(ax: Axes, y: float, of: AdaptedLayer, how: str) -> None:
    """W as it is stored, and decoded for a product."""
    _box(
        ax,
        2.0,
        y,
        1.5,
        0.66,
        f"W in 4 bits\n{_shape(of.outputs, of.inputs)}\n{_size(of.weights // 2)} + scales",
        plots.BLUE,
        8.5,
    )
    _box(
        ax, 4.25, y, 1.5, 0.66, f"W in bfloat16\n{_matrix(of.outputs, of.inputs, HALF)}", plots.BLUE, 8.5, passing=True
    )
    _arrow(ax, (3.5, y + 0.33), (4.25, y + 0.33), plots.BLUE)
    _write(ax, 3.875, y + 0.5, how, 8, color=GREY)


def _key(ax: Axes, colours: dict[str, str], dashed: str) -> None:
    """What the colours and the dashed edges mean, along the bottom."""
    x = 0.12
    for name, colour in colours.items():
        _box(ax, x, 0.08, 0.2, 0.13, "", colour)
        _write(ax, x + 0.28, 0.145, name, 8, at="left")
        x += 0.5 + 0.075 * len(name)
    _box(ax, x, 0.08, 0.2, 0.13, "", GREY, passing=True)
    _write(ax, x + 0.28, 0.145, dashed, 8, at="left")


def forward_pass(layer: AdaptedLayer | None = None) -> Figure:
    """The forward pass of a linear layer: W from 4 bits to 16 and into its product, the adapter's two beside it."""
    of = layer or AdaptedLayer()
    fig, ax = _canvas(4.35, "Forward: W is decoded for one product and dropped; A and B work beside it")
    _frozen_weight(ax, 3.2, of, "dequantise")
    _box(ax, 0.12, 1.75, 1.35, 0.75, f"x, bfloat16\n{_matrix(of.tokens, of.inputs, HALF)}")
    _box(ax, 4.25, 2.15, 1.5, 0.6, f"x Wᵀ\n{_shape(of.tokens, of.outputs)}")
    _box(ax, 2.0, 1.25, 1.5, 0.6, f"x Aᵀ\n{_shape(of.tokens, of.rank)}")
    _box(ax, 4.25, 1.25, 1.5, 0.6, f"{of.scaling:g} · (x Aᵀ) Bᵀ\n{_shape(of.tokens, of.outputs)}")
    _box(ax, 6.12, 1.68, 0.98, 0.75, f"y, their\nsum\n{_size(of.tokens * of.outputs * HALF)}")
    _box(ax, 2.0, 0.4, 1.5, 0.6, f"A, float32\n{_matrix(of.rank, of.inputs, FULL)}", plots.GREEN, 8.5)
    _box(ax, 4.25, 0.4, 1.5, 0.6, f"B, float32\n{_matrix(of.outputs, of.rank, FULL)}", plots.GREEN, 8.5)
    _arrow(ax, (5.0, 3.2), (5.0, 2.75), plots.BLUE, dashed=True)
    _arrow(ax, (1.47, 2.35), (4.25, 2.45))
    _arrow(ax, (1.47, 1.9), (2.0, 1.65))
    _arrow(ax, (3.5, 1.55), (4.25, 1.55))
    _arrow(ax, (2.75, 1.0), (2.75, 1.25), plots.GREEN)
    _arrow(ax, (5.0, 1.0), (5.0, 1.25), plots.GREEN)
    _arrow(ax, (5.75, 2.45), (6.12, 2.25))
    _arrow(ax, (5.75, 1.55), (6.12, 1.85))
    _key(ax, {"frozen": plots.BLUE, "trained": plots.GREEN, "passing through": GREY}, "freed after the product")
    return fig


def backward_pass(layer: AdaptedLayer | None = None) -> Figure:
    """The backward pass of the same layer: what it reads, which gradients it makes, and which it does not.

    With dropout, the x and the x Aᵀ that it reads are those after dropout.
    """
    of = layer or AdaptedLayer()
    fig, ax = _canvas(4.35, "Backward: W is decoded again, but only A, B and x get gradients")
    nothing = {"facecolor": "white", "edgecolor": plots.RED, "linewidth": 1.3, "linestyle": ":"}
    ax.add_patch(Rectangle((0.12, 3.2), 1.35, 0.66, **nothing))
    _write(ax, 0.795, 3.53, f"gradient of W:\nnot computed\n({_size(of.weights * HALF)} spared)", 8.5, color=INK)
    _frozen_weight(ax, 3.2, of, "once more")
    _box(ax, 0.12, 1.75, 1.35, 0.75, f"gradient of x,\ntheir sum\n{_shape(of.tokens, of.inputs)}")
    _box(ax, 4.25, 2.15, 1.5, 0.6, f"g W\n{_shape(of.tokens, of.inputs)}")
    _box(ax, 2.0, 1.25, 1.5, 0.6, f"h A\n{_shape(of.tokens, of.inputs)}")
    _box(ax, 4.25, 1.25, 1.5, 0.6, f"h = {of.scaling:g} · g B\n{_shape(of.tokens, of.rank)}")
    _box(ax, 6.02, 1.68, 1.08, 0.75, f"g, gradient\nof y\n{_shape(of.tokens, of.outputs)}", size=8.5)
    _box(ax, 0.12, 0.4, 1.35, 0.6, f"x\n{_shape(of.tokens, of.inputs)}", plots.ORANGE, 8.5)
    _box(ax, 2.0, 0.4, 1.5, 0.6, f"gradient of A: hᵀ x\n{_matrix(of.rank, of.inputs, FULL)}", plots.GREEN, 8.5)
    _box(
        ax,
        4.0,
        0.4,
        1.75,
        0.6,
        f"of B: {of.scaling:g} · gᵀ (x Aᵀ)\n{_matrix(of.outputs, of.rank, FULL)}",
        plots.GREEN,
        8.5,
    )
    _box(ax, 6.02, 0.4, 1.08, 0.6, f"x Aᵀ\n{_shape(of.tokens, of.rank)}", plots.ORANGE, 8.5)
    _arrow(ax, (5.0, 3.2), (5.0, 2.75), plots.BLUE, dashed=True)
    _arrow(ax, (6.02, 2.25), (5.75, 2.45))
    _arrow(ax, (6.02, 1.85), (5.75, 1.6))
    _arrow(ax, (4.25, 2.45), (1.47, 2.35))
    _arrow(ax, (4.25, 1.55), (3.5, 1.55))
    _arrow(ax, (2.0, 1.65), (1.47, 1.9))
    _arrow(ax, (4.4, 1.25), (3.5, 0.85))
    _arrow(ax, (6.2, 1.68), (5.6, 1.0))
    _arrow(ax, (1.47, 0.7), (2.0, 0.7), plots.ORANGE)
    _arrow(ax, (6.02, 0.7), (5.75, 0.7), plots.ORANGE)
    kinds = {
        "frozen": plots.BLUE,
        "for the optimizer": plots.GREEN,
        "kept since forward": plots.ORANGE,
        "passing": GREY,
    }
    _key(ax, kinds, "freed at once")
    return fig


def checkpointing(model: str = "meta-llama/Llama-3.1-8B") -> Figure:
    """What gradient checkpointing keeps of each layer's activations, and what it computes again; bars to scale.

    Args:
        model: one that the predictor knows, with at least 4 layers. The run is `GPU_RUN`: one chat of 2,048 tokens.

    Raises:
        ValueError: the model is not known, or has fewer layers.
    """
    shape = find_shape(model)
    layers = shape.num_hidden_layers
    if layers < 4:
        raise ValueError(f"model={model!r} has {layers} layers: the diagram shows the first three and the last")
    without, with_it = (
        predict(shape, replace(GPU_RUN, gradient_checkpointing=switch)).parts for switch in (False, True)
    )
    whole, slim, again = without["activations"], with_it["checkpointed activations"], with_it["recomputed layer"]

    fig, ax = _canvas(4.6, f"Checkpointing keeps each layer's input alone: {_size(slim)}, not {_size(whole)}")
    left, wide, gap, tall = 1.75, 0.62, 0.14, 0.78
    names = ["1", "2", "3", f"{layers}"]
    places = [left + place * (wide + gap) for place in range(3)] + [left + 3.65 * (wide + gap)]
    dots = (places[2] + wide + places[3]) / 2
    notes = places[3] + wide + 0.2

    def bar(x: float, y: float, size: float, colour: str, passing: bool = False) -> None:
        _box(ax, x, y, wide, tall * size / (whole / layers), "", colour, passing=passing)

    def row(y: float, name: str, note: str) -> None:
        _write(ax, 0.1, y + tall / 2, name, at="left")
        _write(ax, notes, y + tall / 2, note, at="left")
        ax.plot([left - 0.1, notes - 0.1], [y, y], color=GREY, linewidth=0.8)
        _write(ax, dots, y + 0.14, "…", 12)

    for x, name in zip(places, names, strict=True):
        _write(ax, x + wide / 2, 4.02, f"layer {name}", color=GREY)
    row(
        3.05,
        "Without it,\nafter the\nforward pass",
        f"all activations:\n{_size(whole / layers)} a layer,\n{_size(whole)} together",
    )
    row(
        1.85,
        "With it,\nafter the\nforward pass",
        f"the inputs alone:\n{_size(slim / layers)} a layer,\n{_size(slim)} together",
    )
    row(0.65, "With it, in the\nbackward pass", f"one layer at a time\nis computed again:\n{_size(again)}")
    for x in places:
        bar(x, 3.05, whole / layers, plots.BLUE)
        bar(x, 1.85, slim / layers, plots.ORANGE)
    for x in places[:3]:
        bar(x, 0.65, slim / layers, plots.ORANGE)
    bar(places[2], 0.65, again, plots.BLUE, passing=True)
    _write(ax, places[2] + wide / 2, 0.65 + tall / 2, "again", 8.5)
    _write(ax, places[3] + wide / 2, 0.65 + 0.3, "done:\nfreed", 8.5, color=GREY)
    _arrow(ax, (places[3] + wide, 0.45), (places[2], 0.45))
    _write(ax, places[2] - 0.08, 0.45, "backward", 8.5, at="right", color=GREY)
    _write(ax, 0.1, 0.17, f"{shape.name}, {GPU_RUN.batch_size} × {GPU_RUN.max_length:,} tokens, as the course's predictor "
           "counts it; bars to scale.", 8.5, at="left", color=GREY)  # fmt: skip
    return fig


@cache
def _map() -> dict:
    return json.loads(Path(__file__).with_name("course_map.json").read_text(encoding="utf-8"))


def course_map() -> Figure:
    """The lessons and the roads through them: three on the ground, one full run, and three roads from there."""
    plan = _map()
    tall, step = 0.74, 0.9
    height = 2.9 + step * max(map(len, plan["roads"].values()))
    fig, ax = _canvas(height, "Three lessons lead to a full run; from there, take the road you need")
    gap = 0.2
    wide = (WIDTH - 0.2 - 2 * gap) / 3
    columns = [0.1 + place * (wide + gap) for place in range(3)]

    def lesson(x: float, y: float, name: str, colour: str, width: float = wide) -> None:
        said = plan["lessons"][name]
        lines = textwrap.wrap(f"{int(name[:2])} · {said['title']}", 31 if width == wide else 90)
        _box(ax, x, y, width, tall, "", colour)
        _write(ax, x + width / 2, y + tall / 2 + 0.1, "\n".join(lines), 8.5, fontweight="bold")
        _write(ax, x + width / 2, y + 0.21 - 0.05 * (len(lines) - 1), said["gives"], 8.5)

    top = height - 1.2
    for number, name in enumerate(plan["first"]):
        lesson(columns[number], top, name, plots.BLUE)
        if number:
            _arrow(ax, (columns[number] - gap, top + tall / 2), (columns[number], top + tall / 2), plots.BLUE)
    run = top - step - 0.12
    last = columns[len(plan["first"]) - 1] + wide / 2
    _arrow(ax, (last, top), (last, run + tall), plots.BLUE)
    lesson(columns[0], run, plan["then"], plots.ORANGE, WIDTH - 0.2)
    for x, (road, names) in zip(columns, plan["roads"].items(), strict=True):
        y = run - 0.5
        _arrow(ax, (x + 0.3, run), (x + 0.3, y - 0.2), plots.GREEN)
        _write(ax, x + 0.42, y + 0.2, road, 9.5, at="left", fontweight="bold")
        for number, name in enumerate(names):
            lower = y - 0.2 - tall - number * step
            lesson(x, lower, name, plots.GREEN)
            if number:
                _arrow(ax, (x + 0.3, lower + step), (x + 0.3, lower + tall), plots.GREEN)
    return fig
