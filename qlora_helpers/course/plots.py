"""The course's figures: one style, readable on a light and on a dark page, each shown with its alt text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from IPython.display import HTML, DisplayHandle, display
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qlora_helpers.course import figure_texts
from qlora_helpers.memory import phases
from qlora_helpers.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlora_helpers.memory.timeline import Timeline

__all__ = [
    "BLUE",
    "COLOURS",
    "FORMAT_COLOURS",
    "GREEN",
    "ORANGE",
    "PHASE_COLOURS",
    "PURPLE",
    "RED",
    "SKY",
    "STYLE",
    "YELLOW",
    "LivePlot",
    "code_histogram",
    "decision_tree",
    "figure",
    "loss_curves",
    "memory_timeline",
    "pace_against_memory",
    "shares_of_a_step",
    "show",
    "stacked_bars",
    "weights_and_levels",
]

# Okabe and Ito's colours, which people with colour blindness can tell apart (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, RED, PURPLE, YELLOW, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#F0E442",
    "#56B4E9",
)
COLOURS = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW]
FORMAT_COLOURS = {
    "NF4": BLUE,
    "INT4": ORANGE,
    "INT4 symmetric": GREEN,  # yellow is for areas: as a thin line it can hardly be seen on white
    "FP4": RED,
    "INT3": PURPLE,
    "16 bit": "#555555",
}

STYLE = {
    "figure.facecolor": "white",  # a white card: the same on a light and on a dark page
    "figure.dpi": 110,
    "figure.figsize": (7.2, 3.6),
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "font.size": 10,
}

OF_AXES = ("sharex", "sharey", "squeeze", "width_ratios", "height_ratios", "subplot_kw", "gridspec_kw")


def figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Axes | np.ndarray]:
    """A new figure in the course's style, with its axes as `pyplot.subplots` gives them; the style stays in effect.

    The figure does not belong to pyplot: no backend is chosen, no window opens, and nothing need be closed.

    Args:
        options: for `matplotlib.figure.Figure` and its `subplots`.
    """
    matplotlib.rcParams.update(
        STYLE
    )  # not only while the figure is made: titles and legends look the style up when they are added
    of_axes = {name: options.pop(name) for name in OF_AXES if name in options}
    fig = Figure(**options)
    return fig, fig.subplots(rows, columns, **of_axes)


def _as_png(fig: Figure) -> bytes:
    """A figure in at most 256 colours: less than half as large, and no eye sees it. Each figure is stored in three editions."""
    from matplotlib.image import imread
    from PIL import Image  # matplotlib needs it, too

    drawn, written = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png")
    drawn.seek(0)
    colours = (imread(drawn)[..., :3] * 255).round().astype("uint8")  # without opacity: the background is white
    in_few = Image.fromarray(colours).quantize(256, Image.Quantize.MAXCOVERAGE)
    in_few.save(written, "PNG", optimize=True)
    return written.getvalue()


def _as_html(fig: Figure, alt: str, caption: str = "") -> HTML:
    data = base64.b64encode(_as_png(fig)).decode()
    width = int(fig.get_size_inches()[0] * 100)
    image = f'<img alt="{html.escape(alt)}" width="{width}" src="data:image/png;base64,{data}">'
    if not caption:
        return HTML(image)
    return HTML(f'<figure style="margin: 0">{image}<figcaption>{html.escape(caption)}</figcaption></figure>')


def show(fig: Figure, number: str = "", alt: str = "", instead_of: LivePlot | None = None) -> None:
    """Display a figure with alt text: one of the lessons' by its number, with the number below it; or one of one's own.

    Args:
        number: such as "2.1", of a lesson's figure, whose alt text is in `alt_texts`. A text that is no such number is
            taken as the alt text.
        alt: the alt text of a figure without a number, or of one whose text is made from what was computed.
        instead_of: a live plot of the same run; the figure takes its place, so that its curves are there once.

    Raises:
        ValueError: there is no alt text, or there are two.
    """
    if number and not figure_texts.is_number(number):
        if alt:
            raise ValueError(f"number={number!r}: must be a figure's number, such as '2.1', if there is alt= as well")
        number, alt = "", number
    if number and alt and number in figure_texts.texts_of_lesson(int(number.partition(".")[0])):
        raise ValueError(f"figure {number} has an alt text in alt_texts already: leave out alt=, or remove that text")
    if number and not alt:
        alt = figure_texts.alt_text(number)
    if not alt.strip():
        raise ValueError("alt='': say in words what the figure shows, for those who cannot see it")
    image = _as_html(fig, alt, f"Figure {number}" if number else "")
    if instead_of is not None and instead_of.handle is not None:
        instead_of.handle.update(image)
    else:
        display(image)


def stacked_bars(ax: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], unit: str) -> None:
    """Horizontal bars, one per name, each the sum of its parts, with the total at its end."""
    left = np.zeros(len(names))
    for (part, values), colour in zip(parts.items(), COLOURS, strict=False):
        ax.barh(names, values, left=left, label=part, color=colour)
        left += np.asarray(values, dtype=float)
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:,.1f}", va="center")
    ax.set_xlim(0, left.max() * 1.12)
    ax.set_xlabel(unit)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right", fontsize=9)


def code_histogram(ax: Axes, share: Sequence[float], values: Sequence[float], name: str) -> None:
    """How often each code is used, drawn at its value between -1 and 1."""
    ax.vlines(values, 0, np.asarray(share) * 100, color=FORMAT_COLOURS.get(name, BLUE), linewidth=5)
    ax.set_xlim(-1.08, 1.08)
    ax.set_ylim(0, 15)
    ax.set_xlabel("value of the code / absmax")
    ax.set_ylabel("codes used (%)")
    ax.set_title(name)


def weights_and_levels(ax: Axes, weights: torch.Tensor, levels: torch.Tensor, name: str) -> None:
    """A histogram of scaled weights, with the levels of a format as lines below it."""
    ax.hist(weights.flatten().numpy(), bins=120, range=(-1, 1), density=True, color="#BBBBBB")
    ax.vlines(levels.numpy(), -0.28, -0.06, color=FORMAT_COLOURS.get(name, BLUE), linewidth=2)
    ax.set_ylim(bottom=-0.32)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{density:g}" if density >= 0 else ""))
    ax.set_xlabel("weight / absmax of its block")
    ax.set_ylabel("density of weights")
    ax.set_title(name)


PHASE_COLOURS = {
    phases.LOAD: "#999999",
    phases.FORWARD: BLUE,
    phases.LOSS: PURPLE,
    phases.BACKWARD: ORANGE,
    phases.STEP: GREEN,
    phases.BETWEEN: "#BBBBBB",
}


def memory_timeline(ax: Axes, timeline: Timeline, unit: int = GIB) -> None:
    """Bytes in tensors against time, filled in the colour of each phase, with a mark at the peak.

    Args:
        timeline: a `qlora_helpers.memory.timeline.Timeline`.
        unit: bytes per unit of the vertical axis, 2**30 for GiB or 2**20 for MiB.
    """
    seconds, levels = np.asarray(timeline.seconds), np.asarray(timeline.levels) / unit
    seen = set()
    for name, first, last in timeline.spans():
        x, y = seconds[first : last + 1], levels[first : last + 1]
        label = None if name in seen or name == phases.BETWEEN else name
        seen.add(name)
        ax.fill_between(x, y, step="post", color=PHASE_COLOURS.get(name, RED), label=label, linewidth=0.5)
    top = int(np.argmax(levels))
    ax.plot(seconds[top], levels[top], "v", color="black", markersize=6)
    ax.annotate(
        f"{levels[top]:.2f}",
        (seconds[top], levels[top]),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    ax.set_xlim(0, seconds[-1])
    ax.set_ylim(0, levels[top] * 1.15)
    ax.set_xlabel("seconds within the step")


def shares_of_a_step(ax: Axes, groups: Mapping[str, Mapping[str, float]]) -> None:
    """The groups of `qlora_helpers.training.step_profile.profile_step` as bars, the largest first."""
    names = sorted(groups, key=lambda name: -groups[name]["share"])
    shares = [groups[name]["share"] * 100 for name in names]
    ax.barh(names, shares, color=BLUE)
    for y, share in enumerate(shares):
        ax.text(share, y, f" {share:.0f} %", va="center")
    ax.set_xlim(0, max(shares) * 1.12)
    ax.set_xlabel("share of a step (%)")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


_SIDES = {"right": ((7, 0), "left", "center"), "left": ((-7, 0), "right", "center"),
          "above": ((0, 7), "center", "bottom"), "below": ((0, -7), "center", "top")}  # fmt: skip


def pace_against_memory(
    ax: Axes,
    rows: Mapping[str, Mapping[str, Any]],
    joined: Sequence[str] = (),
    sides: Mapping[str, str] | None = None,
) -> None:
    """Tokens per second against peak memory, each run with its name.

    Args:
        rows: of `data/measured/speed.json`, by the names to show.
        joined: the names of those that a line joins, in the order of their memory.
        sides: where a name stands: "left", "above" or "below" its mark; "right" of it where nothing is said.
    """
    places = {name: (row["peak_allocated_bytes"] / GIB, row["tokens_per_second"]) for name, row in rows.items()}
    if joined:
        ax.plot(*zip(*sorted(places[name] for name in joined), strict=True), color=BLUE, linewidth=1.2)
    for name, place in places.items():
        offset, horizontal, vertical = _SIDES[(sides or {}).get(name, "right")]
        ax.plot(*place, "o", color=BLUE if name in joined else RED)
        ax.annotate(name, place, xytext=offset, textcoords="offset points", ha=horizontal, va=vertical, fontsize=9)
    ax.set_xlabel("peak memory (GiB)")
    ax.set_ylabel("tokens per second")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda pace, _: f"{pace:,.0f}"))
    ax.set_xlim(0, 1.2 * max(memory for memory, _ in places.values()))
    ax.set_ylim(0, 1.1 * max(pace for _, pace in places.values()))


def decision_tree(ax: Axes, root: str, branches: Sequence[tuple[str, str]]) -> None:
    """A question on the left, its answers one below the other, and to the right of each what to do. The axes are a canvas."""
    ax.set_axis_off()
    ax.set_xlim(0, 1)
    ax.set_ylim(len(branches) - 0.4, -0.6)
    middle = (len(branches) - 1) / 2
    box = {"boxstyle": "round,pad=0.35", "facecolor": "#EEEEEE", "edgecolor": "#777777"}
    for row, (answer, leaf) in enumerate(branches):
        ax.plot([0.12, 0.22, 0.5], [middle, row, row], color="#777777", linewidth=1, zorder=1)
        ax.text(0.37, row, answer, ha="center", va="center", fontsize=9, bbox=box | {"facecolor": "#FFE8C2"})
        ax.text(0.51, row, leaf, ha="left", va="center", fontsize=9, linespacing=1.35)
    ax.text(0.09, middle, root, ha="center", va="center", fontsize=10, fontweight="bold", bbox=box)


History = Sequence[tuple[int, float]]


def _draw_losses(ax: Axes, history: History, validation_history: History) -> None:
    """Both losses against the step."""
    if history:
        ax.plot(*zip(*history, strict=True), marker="o", markersize=3, label="training chats")
    if validation_history:
        ax.plot(
            *zip(*validation_history, strict=True), color=ORANGE, marker="s", markersize=4, label="validation chats"
        )
    ax.set_yscale("log")
    plain = FuncFormatter(lambda loss, _: f"{loss:g}")  # 3 and not 3 x 10^0
    ax.yaxis.set_major_formatter(plain)
    lowest, highest = ax.get_ylim()
    if highest < 100 * lowest:  # with more powers of ten, their labels are enough
        few = highest > 4 * lowest  # 0.9 would lie on top of 1
        ax.yaxis.set_minor_formatter(
            FuncFormatter(lambda loss, _: "" if few and f"{loss:e}"[0] not in "235" else f"{loss:g}")
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 0.25
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats per answer token)")


def _course_of(history: History) -> str:
    """The first and the last value of a curve, in words."""
    return f"from {history[0][1]:.2f} at step {history[0][0]} to {history[-1][1]:.2f} at step {history[-1][0]}"


def _alt_of_losses(history: History, validation_history: History) -> str:
    said = f"loss against step, {_course_of(history)}" if history else "loss against step"
    return f"{said}; on the validation chats {_course_of(validation_history)}" if validation_history else said


def loss_curves(
    history: History, validation_history: History = (), best_step: int | None = None, steps: int | None = None
) -> tuple[Figure, str]:
    """The figure of a finished run's losses, with the step that was kept marked; and its alt text: `show(*loss_curves(…))`.

    Args:
        history, validation_history, best_step: of a `qlora_helpers.training.run.Run`.
        steps: how many the run would have had, if it was stopped early.

    Raises:
        ValueError: there are no losses, or `best_step` has no validation loss.
    """
    if not history:
        raise ValueError("history=[]: there is nothing to draw. Take it from a run that has logged a loss")
    validated = dict(validation_history)
    if best_step is not None and best_step not in validated:
        raise ValueError(f"best_step={best_step}: validation_history has steps {list(validated)}")
    last = max(step for step, _ in (*history, *validation_history))
    fig, ax = figure()
    _draw_losses(ax, history, validation_history)
    ax.set_xlim(0, max(last, steps or 0))
    title = _title_of_losses(validation_history, best_step)
    ax.set_title(title)
    alt = f"{title}: {_alt_of_losses(history, validation_history)}."
    if best_step is not None:
        loss = validated[best_step]
        ax.axvline(best_step, color=GREEN, linestyle="--", linewidth=1.5, label=f"kept: step {best_step}")
        ax.plot(best_step, loss, "*", color=GREEN, markersize=13, zorder=3, clip_on=False)  # it may be the last
        alt += f" A mark shows the step that is kept, {best_step}, with a validation loss of {loss:.2f}."
    if validation_history:
        ax.legend(fontsize=9)
    return fig, alt


def _title_of_losses(validation_history: History, best_step: int | None) -> str:
    if best_step is None:
        return "The loss during the run"
    if best_step == validation_history[-1][0]:
        return f"The validation loss was lowest at the end, step {best_step}"
    return f"The validation loss was lowest at step {best_step}, not at the end"


class LivePlot:
    """A loss curve that is redrawn in place during a run. Pass `update` as `train(..., on_loss=...)`."""

    def __init__(self, steps: int, title: str) -> None:
        self.steps, self.title = steps, title
        self.handle: DisplayHandle | None = None
        self._validated = 0

    def update(self, history: list[tuple[int, float]], validation_history: History = ()) -> None:
        """Redraw with the (step, loss) pairs so far: every second time and at the end, since drawing takes time.

        Args:
            validation_history: of a run with validation; each new pair is drawn at once.
        """
        is_new = len(validation_history) > self._validated
        if not is_new and (not history or (len(history) % 2 and history[-1][0] < self.steps)):
            return
        self._validated = len(validation_history)
        fig, ax = figure()
        _draw_losses(ax, history, validation_history)
        ax.set_xlim(0, self.steps)
        ax.set_title(self.title)
        if validation_history:
            ax.legend(fontsize=9)
        image = _as_html(fig, f"{self.title}: {_alt_of_losses(history, validation_history)}.")
        if self.handle is None:
            self.handle = display(image, display_id=True)
        else:
            self.handle.update(image)
