"""Figures are shown with alt text, and the live plot keeps up with the run."""

import pytest

from qlora_helpers.course import plots
from qlora_helpers.memory.timeline import Timeline


@pytest.fixture
def shown(monkeypatch):
    """The HTML of everything that is displayed, first shown or updated."""
    pages = []

    class Handle:
        def update(self, page):
            pages.append(page.data)

    def display(page, display_id=False):
        pages.append(page.data)
        return Handle()

    monkeypatch.setattr(plots, "display", display)
    return pages


def test_a_figure_is_shown_as_an_image_with_its_alt_text(shown):
    fig, _ = plots.figure()
    plots.show(fig, 'a line that says "x < 1"')
    assert len(shown) == 1
    assert shown[0].startswith('<img alt="a line that says &quot;x &lt; 1&quot;"')
    assert "data:image/png;base64,iVBOR" in shown[0]


def test_a_figure_without_alt_text_is_refused(shown):
    fig, _ = plots.figure()
    with pytest.raises(ValueError, match="say in words what the figure shows"):
        plots.show(fig, " ")
    assert not shown


def test_the_live_plot_draws_every_second_point_and_the_last(shown):
    live = plots.LivePlot(steps=50, title="loss")
    history = []
    for step in (10, 20, 30, 40, 50):
        history.append((step, 1 / step))
        live.update(history)
    assert len(shown) == 3
    assert "to 0.02 at step 50" in shown[-1]


def test_a_timeline_is_filled_phase_by_phase_with_its_peak_marked():
    line = Timeline((0.0, 1.0, 2.0, 3.0), (10, 40, 20, 5), (("forward", 0), ("backward", 1), ("forward", 3)))
    _, ax = plots.figure()
    plots.memory_timeline(ax, line, unit=10)
    assert [text.get_text() for text in ax.texts] == ["4.00"]
    assert ax.get_legend_handles_labels()[1] == ["forward", "backward"]
    assert ax.get_ylim()[1] > 4 and ax.get_xlim() == (0, 3)


def test_a_tree_has_its_question_and_every_branch():
    _, ax = plots.figure()
    plots.decision_tree(ax, "where?", [("load", "4 bits"), ("forward", "checkpointing")])
    assert {text.get_text() for text in ax.texts} == {"where?", "load", "4 bits", "forward", "checkpointing"}
