"""The course's figures as they are rendered: nothing is cut off, on top of something else, or hidden by a legend."""

import json

import pytest
import torch

from qlora_helpers.course import plots
from qlora_helpers.memory import phases
from qlora_helpers.memory.timeline import Timeline
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import FP4, INT4, NF4, quantize
from tests.support.figure_faults import faults_of

FALLING = [(step, 5 / step + 0.3) for step in range(1, 61)]
VALIDATED = [(step, 5 / (step + 1) + 0.5) for step in range(0, 61, 10)]


def losses():
    return plots.loss_curves(FALLING, VALIDATED, 60, 60)[0]


def losses_of_a_run_that_was_stopped():
    rising = [(step, 1.0 + step / 100) for step in range(0, 41, 5)]
    return plots.loss_curves(FALLING[:40], rising, 0, 100)[0]


def losses_of_two_steps():
    return plots.loss_curves([(1, 5.0), (2, 4.0)])[0]


def histograms():
    weights = torch.randn(64 * 256, generator=torch.Generator().manual_seed(0))
    fig, axes = plots.figure(1, 3, figsize=(7.2, 3), sharey=True)
    for ax, codebook in zip(axes, (NF4, INT4, FP4), strict=True):
        made = quantize(weights, codebook, 64, False)
        share = torch.bincount(made.codes.flatten().int(), minlength=16) / weights.numel()
        plots.code_histogram(ax, share.tolist(), codebook.values.tolist(), codebook.name)
    return fig


def levels():
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0)) / 4
    fig, axes = plots.figure(1, 3, figsize=(7.2, 3), sharey=True)
    for ax, codebook in zip(axes, (NF4, INT4, FP4), strict=True):
        plots.weights_and_levels(ax, weights.clamp(-1, 1), codebook.values, codebook.name)
    return fig


def bars():
    fig, ax = plots.figure()
    parts = {"weights": [16.1, 4.1, 4.1], "gradients": [16.1, 0.2, 0.1], "optimizer": [64.2, 0.4, 0.2]}
    plots.stacked_bars(ax, ["full", "LoRA", "QLoRA"], parts, "GB")
    ax.set_title("QLoRA makes the weights small")
    return fig


def a_step():
    fig, ax = plots.figure()
    marks = [(name, place) for place, name in enumerate(phases.IN_A_STEP)]
    plots.memory_timeline(ax, Timeline((0.0, 1.0, 2.0, 3.0, 4.0), (10, 40, 60, 30, 20), tuple(marks)), unit=10)
    ax.legend(fontsize=9)
    return fig


def parts_of_a_step():
    fig, ax = plots.figure()
    groups = {
        name: {"share": share} for name, share in (("matrix products", 0.61), ("all the rest", 0.3), ("norms", 0.09))
    }
    plots.shares_of_a_step(ax, groups)
    return fig


def pace():
    rows = {
        row["label"]: row for row in json.loads(data_path("measured", "speed.json").read_text(encoding="utf-8"))["rows"]
    }
    fig, ax = plots.figure()
    plots.pace_against_memory(ax, dict(list(rows.items())[:2]), sides={next(iter(rows)): "left"})
    return fig


def tree():
    fig, ax = plots.figure(figsize=(7.2, 4))
    plots.decision_tree(
        ax, "where did\nit die?", [("load", "4 bits"), ("forward", "checkpointing"), ("step", "8-bit states")]
    )
    return fig


FIGURES = [
    losses,
    losses_of_a_run_that_was_stopped,
    losses_of_two_steps,
    histograms,
    levels,
    bars,
    a_step,
    parts_of_a_step,
    pace,
    tree,
]


@pytest.mark.parametrize("drawn", FIGURES)
def test_a_figure_of_the_course_has_no_fault(drawn):
    assert faults_of(drawn()) == []


def test_every_fault_is_found():
    fig, ax = plots.figure(layout="none")  # which would make room for the text at the edge
    ax.plot([0, 1], [0, 1], label="a line")
    ax.text(0.2, 0.7, "a name")
    ax.text(0.22, 0.71, "another")
    ax.text(0.97, 0.5, "a long text at the edge")
    ax.legend(loc=(0.4, 0.45))
    assert sorted(faults_of(fig)) == [
        "'a long text at the edge' reaches beyond the figure",
        "'a name' and 'another' overlap",
        "the line 'a line' runs through the legend",
    ]
    assert "the line 'a line' runs through the legend" not in faults_of(fig, data=False)


def test_faults_of_boxes_and_arrows_are_found():
    from matplotlib.patches import FancyArrowPatch, Rectangle

    fig, ax = plots.figure()
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.add_patch(Rectangle((0.1, 0.1), 0.1, 0.1))
    ax.text(0.15, 0.15, "wider than its box", ha="center", va="center")
    ax.add_patch(Rectangle((0.5, 0.1), 0.4, 0.2))
    ax.text(0.7, 0.2, "inside", ha="center", va="center")
    ax.add_patch(FancyArrowPatch((0.2, 0.8), (0.8, 0.8)))
    ax.text(0.5, 0.8, "in the way", ha="center", va="center")
    assert faults_of(fig) == ["'wider than its box' crosses the edge of its box", "an arrow crosses 'in the way'"]


def test_hidden_and_faint_lines_are_found():
    fig, ax = plots.figure()
    ax.plot([0, 1, 2], [0, 1, 4], color=plots.YELLOW, label="faint")
    ax.plot([0, 1, 2], [1, 2, 3], color=plots.BLUE, label="under")
    ax.plot([0, 1, 2], [1, 2, 3.01], color=plots.RED, label="over")
    assert faults_of(fig) == ["the line 'faint' can hardly be seen", "the line 'under' lies under 'over'"]


def test_each_format_has_a_line_of_its_own_that_can_be_seen():
    fig, ax = plots.figure()
    for height, (name, colour) in enumerate(plots.FORMAT_COLOURS.items()):
        ax.plot([0, 1, 2], [height] * 3, color=colour, label=name)
    assert faults_of(fig) == [] and len(set(plots.FORMAT_COLOURS.values())) == len(plots.FORMAT_COLOURS)


def test_no_density_is_negative():
    for ax in levels().axes:
        assert ax.yaxis.get_major_formatter()(-0.25) == "" and ax.yaxis.get_major_formatter()(0.5) == "0.5"


def test_a_label_beyond_the_axis_is_no_fault_since_it_is_not_drawn():
    fig, ax = plots.figure()
    ax.set_xticks([0, 1, 50], ["0", "1", "far away"])
    ax.set_xlim(0, 1)
    assert faults_of(fig) == []
