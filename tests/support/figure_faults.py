"""What is wrong with a figure as its renderer draws it: texts cut off, on top of each other, or crossed by an edge."""

from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SLACK = 1.0  # pixels by which the boxes of two texts may overlap: they include a little air


def _overlap(one: Bbox, other: Bbox) -> bool:
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return wide > SLACK and high > SLACK


def _drawn_texts(fig: Figure) -> list[tuple[str, Bbox, Text]]:
    """The texts that the renderer really draws, with their boxes in pixels: ticks beyond an axis are left out."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()  # lays the figure out
    renderer, drawn = canvas.get_renderer(), []
    original = Text.draw

    def noting(text, renderer, *args, **kwargs):
        drawn.append(text)
        return original(text, renderer, *args, **kwargs)

    Text.draw = noting
    try:
        canvas.draw()
    finally:
        Text.draw = original
    once = {id(text): text for text in drawn if text.get_text().strip() and text.get_visible()}
    return [(text.get_text(), Text.get_window_extent(text, renderer), text) for text in once.values()]


def faults_of(fig: Figure, data: bool = True) -> list[str]:
    """In words, each fault of a figure.

    - a text that reaches beyond the figure;
    - two texts on top of each other;
    - a text that is crossed by the edge of a box or by an arrow;
    - a line that can hardly be seen on its ground;
    - a legend on top of what is drawn, or a line under another one (`data=False`: not asked).
    """
    texts = _drawn_texts(fig)
    page = fig.bbox
    found = [
        f"{text!r} reaches beyond the figure"
        for text, box, _ in texts
        if box.x0 < page.x0 - SLACK or box.x1 > page.x1 + SLACK or box.y0 < page.y0 - SLACK or box.y1 > page.y1 + SLACK
    ]
    found += [
        f"{one!r} and {other!r} overlap" for (one, a, _), (other, b, _) in combinations(texts, 2) if _overlap(a, b)
    ]
    for ax in fig.axes:
        own = [(text, box) for text, box, artist in texts if artist.axes is ax]
        if not ax.axison:  # a canvas of boxes
            for patch in ax.patches:
                found += _crossed(patch, own)
        found += _faint(ax)
        if data:
            found += _hidden_by_legend(ax)
            found += _hidden_by_others(ax)
    return found


def _crossed(patch: Patch, texts: list[tuple[str, Bbox]]) -> list[str]:
    if isinstance(patch, FancyArrowPatch):
        line = Path(patch.axes.transData.transform(patch._posA_posB))  # arrows of diagrams are straight
        return [
            f"an arrow crosses {text!r}"
            for text, box in texts
            if line.intersects_bbox(
                Bbox.from_extents(box.x0 + SLACK, box.y0 + SLACK, box.x1 - SLACK, box.y1 - SLACK), False
            )
        ]
    if not isinstance(patch, Rectangle):
        return []
    edge = patch.get_window_extent()
    return [
        f"{text!r} crosses the edge of its box"
        for text, box in texts
        if _overlap(edge, box)
        and not (edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1)
    ]


def _luminance(colour: Any) -> float:
    """How bright a colour is, from 0 to 1 (WCAG 2's relative luminance)."""
    channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], channels))


def _faint(ax: Axes) -> list[str]:
    """The lines whose contrast to the ground is below 1.5; 1 would be the ground itself."""
    ground = _luminance(ax.get_facecolor())
    found = []
    for line in ax.lines:
        bright, dark = sorted((ground, _luminance(line.get_color())), reverse=True)
        if line.get_linestyle() != "None" and (bright + 0.05) / (dark + 0.05) < 1.5:
            found.append(f"the line {line.get_label()!r} can hardly be seen")
    return found


def _hidden_by_others(ax: Axes) -> list[str]:
    """The curves of which nearly everything lies under a curve that is drawn later and is no thinner."""
    curves = []
    for line in ax.lines:
        points = line.get_transform().transform(line.get_xydata())
        points = points[np.isfinite(points).all(axis=1)]
        if line.get_linestyle() == "-" and len(points) > 2:
            places = np.linspace(0, len(points) - 1, 500)
            whole = np.arange(len(points))
            dense = np.stack([np.interp(places, whole, points[:, side]) for side in (0, 1)], axis=1)
            curves.append((line, dense))
    found = []
    for (under, a), (over, b) in combinations(curves, 2):
        apart = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1)
        if over.get_linewidth() >= under.get_linewidth() and (apart < 2).mean() > 0.9:
            found.append(f"the line {under.get_label()!r} lies under {over.get_label()!r}")
    return found


def _hidden_by_legend(ax: Axes) -> list[str]:
    """The lines, bars and marks that run through the texts of the axes' legend."""
    legend = ax.get_legend()
    if not isinstance(legend, Legend):
        return []
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    found = []
    for line in ax.lines:
        points = line.get_transform().transform(line.get_xydata())
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) and any(_runs_through(points, box, line.get_linestyle() != "None") for box in boxes):
            found.append(f"the line {line.get_label()!r} runs through the legend")
    for bar in ax.patches:
        if isinstance(bar, Rectangle) and any(_overlap(bar.get_window_extent(), box) for box in boxes):
            found.append(f"a bar lies under the legend ({bar.get_label()!r})")
    return found


def _runs_through(points: np.ndarray, box: Bbox, joined: bool) -> bool:
    if joined and len(points) > 1:
        return Path(points).intersects_bbox(box, False)
    return bool(((points > [box.x0, box.y0]) & (points < [box.x1, box.y1])).all(axis=1).any())
