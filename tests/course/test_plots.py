"""Figures are shown with alt text, and the live plot keeps up with the run."""

import io
import json

import numpy as np
import pytest
import torch

from qlora_helpers.course import figure_texts, plots
from qlora_helpers.memory import phases
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


def test_a_figure_is_stored_in_few_bytes_and_looks_as_it_was_drawn():
    from PIL import Image

    fig, ax = plots.figure()
    for place, colour in enumerate(plots.COLOURS):
        ax.plot(range(9), [(place + x) ** 1.5 for x in range(9)], "o-", color=colour, label=f"line {place}")
    ax.legend()
    ax.set_title("A figure")
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png")
    stored = plots._as_png(fig)
    assert len(stored) < 0.6 * len(drawn.getvalue())
    wanted, got = (np.array(Image.open(file).convert("RGB"), dtype=int) for file in (drawn, io.BytesIO(stored)))
    assert got.shape == wanted.shape and (got[0, 0] == 255).all()
    assert np.abs(got - wanted).max() <= 16


def test_a_figure_without_alt_text_is_refused(shown):
    fig, _ = plots.figure()
    with pytest.raises(ValueError, match="say in words what the figure shows"):
        plots.show(fig, " ")
    assert not shown


@pytest.fixture
def alt_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(figure_texts, "FOLDER", tmp_path)
    (tmp_path / "02.json").write_text(json.dumps({"2.1": "Bars, one < two."}), encoding="utf-8")


def test_a_numbered_figure_has_its_alt_text_and_its_number_below_it(shown, alt_texts):
    plots.show(plots.figure()[0], "2.1")
    assert '<img alt="Bars, one &lt; two."' in shown[0]
    assert shown[0].startswith("<figure") and shown[0].endswith("<figcaption>Figure 2.1</figcaption></figure>")


def test_a_numbered_figure_may_have_an_alt_text_that_was_computed(shown, alt_texts):
    plots.show(plots.figure()[0], "2.2", alt="best at 3e-4")
    assert '<img alt="best at 3e-4"' in shown[0] and "Figure 2.2" in shown[0]


def test_a_figure_of_one_s_own_has_no_number(shown, alt_texts):
    for arguments in ({"alt": "my own losses"}, {"number": "my own losses"}):
        plots.show(plots.figure()[0], **arguments)
    assert len(shown) == 2 and shown[0][:40] == shown[1][:40] and "Figure" not in shown[0] + shown[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("2.2",), "figure 2.2: it has no alt text in .*02.json, which has 2.1"),
        (("3.1",), "figure 3.1: it has no alt text"),
        (("2.1", "another text"), "figure 2.1 has an alt text in alt_texts already"),
        (("Bars", "another text"), "number='Bars': must be a figure's number"),
        (("2.2", " "), "alt='': say in words"),
        ((), "alt='': say in words"),
    ],
)
def test_a_figure_without_an_alt_text_or_with_two_is_refused(shown, alt_texts, arguments, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        plots.show(plots.figure()[0], *arguments)
    assert not shown


def test_the_live_plot_draws_every_second_point_and_the_last(shown):
    live = plots.LivePlot(steps=50, title="loss")
    history = []
    for step in (10, 20, 30, 40, 50):
        history.append((step, 1 / step))
        live.update(history)
    assert len(shown) == 3
    assert "to 0.02 at step 50" in shown[-1]


def test_the_live_plot_draws_both_losses_and_each_evaluation_at_once(shown):
    live = plots.LivePlot(steps=50, title="loss")
    live.update([], [(0, 2.0)])
    live.update([(10, 1.0)], [(0, 2.0)])  # every second time
    live.update([(10, 1.0)], [(0, 2.0), (10, 1.5)])
    assert len(shown) == 2
    assert "loss: loss against step; on the validation chats from 2.00 at step 0 to 2.00 at step 0." in shown[0]
    assert "from 1.00 at step 10 to 1.00 at step 10; on the validation chats from 2.00 at step 0 to 1.50" in shown[1]


def test_the_live_plot_and_the_figure_of_the_run_write_their_losses_alike(shown, monkeypatch):
    figures, as_html = [], plots._as_html
    monkeypatch.setattr(plots, "_as_html", lambda fig, alt: figures.append(fig) or as_html(fig, alt))
    plots.LivePlot(steps=6, title="loss").update(HISTORY, VALIDATED)
    for fig in (*figures, plots.loss_curves(HISTORY)[0]):
        assert [fig.axes[0].yaxis.get_major_formatter()(value) for value in (1.0, 0.1)] == ["1", "0.1"]
    assert len(figures) == 1


def test_a_figure_takes_the_place_of_a_live_plot(monkeypatch):
    places = []  # what the notebook has: an image for each place

    class Handle:
        def __init__(self, image):
            self.place = len(places)
            places.append(image)

        def update(self, image):
            places[self.place] = image

    monkeypatch.setattr(plots, "display", lambda image, **options: Handle(image))
    live, empty = plots.LivePlot(steps=6, title="loss"), plots.LivePlot(steps=6, title="loss")
    live.update(HISTORY, VALIDATED)
    plots.show(plots.figure()[0], alt="the finished run", instead_of=live)
    assert len(places) == 1 and "the finished run" in places[0].data
    plots.show(plots.figure()[0], alt="a run without losses", instead_of=empty)
    assert len(places) == 2 and "a run without losses" in places[1].data


def test_the_live_plot_without_losses_draws_nothing(shown):
    plots.LivePlot(steps=50, title="loss").update([])
    assert shown == []


HISTORY, VALIDATED = [(2, 3.0), (4, 2.0), (6, 1.0)], [(0, 4.0), (2, 3.5), (4, 3.0), (6, 3.25)]


def test_the_figure_of_a_run_marks_the_step_that_was_kept(shown):
    fig, alt = plots.loss_curves(HISTORY, VALIDATED, 4)
    (ax,) = fig.axes
    assert ax.get_title(loc="left") == "The validation loss was lowest at step 4, not at the end"
    training, validation, line, star = ax.lines
    assert training.get_xydata().tolist() == [list(pair) for pair in HISTORY]
    assert validation.get_xydata().tolist() == [list(pair) for pair in VALIDATED]
    assert set(line.get_xdata()) == {4} and star.get_xydata().tolist() == [[4, 3.0]]
    assert not star.get_clip_on()  # whole at the last step, too
    assert [text.get_text() for text in ax.get_legend().texts] == ["training chats", "validation chats", "kept: step 4"]
    assert "on the validation chats from 4.00 at step 0 to 3.25 at step 6. A mark shows the step that is kept, 4" in alt
    plots.show(fig, alt)
    assert shown[0].startswith(
        '<img alt="The validation loss was lowest at step 4, not at the end: loss against step, from'
    )


def test_the_figure_of_a_run_says_what_it_shows():
    def drawn(*histories, **options):
        return plots.loss_curves(*histories, **options)[0].axes[0]

    assert drawn(HISTORY, VALIDATED, 6).get_title(loc="left") == "The validation loss was lowest at the end, step 6"
    plain = drawn(HISTORY)
    assert plain.get_title(loc="left") == "The loss during the run" and plain.get_legend() is None
    assert plain.get_xlim() == (0, 6) and drawn(HISTORY, steps=12).get_xlim() == (0, 12)
    assert [plain.yaxis.get_minor_formatter()(value) for value in (2.0, 0.5)] == ["2", "0.5"]
    assert all(step == int(step) for step in drawn([(1, 5.0), (2, 4.0)]).get_xticks())
    wide = drawn([(1, 9.0), (2, 0.6)]).yaxis.get_minor_formatter()
    assert [wide(value) for value in (0.9, 2.0, 4.0, 5.0)] == ["", "2", "", "5"]  # 0.9 would lie on 1


def test_a_figure_of_no_losses_or_of_a_step_without_one_is_refused():
    with pytest.raises(ValueError, match=r"history=\[\]: there is nothing to draw"):
        plots.loss_curves([])
    with pytest.raises(ValueError, match=r"best_step=5: validation_history has steps \[0, 2, 4, 6\]"):
        plots.loss_curves(HISTORY, VALIDATED, 5)


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


def test_what_is_between_the_steps_has_no_name_in_the_legend():
    line = Timeline((0.0, 1.0, 2.0), (10, 40, 20), (("forward", 0), (phases.BETWEEN, 1)))
    _, ax = plots.figure()
    plots.memory_timeline(ax, line, unit=10)
    assert ax.get_legend_handles_labels()[1] == ["forward"]
    assert len(ax.collections) == 2  # both are filled


def test_bars_are_stacked_with_their_total_at_the_end():
    _, ax = plots.figure()
    plots.stacked_bars(ax, ["one", "two"], {"a": [1, 2], "b": [3, 8]}, "GiB")
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 1), (0, 2), (1, 3), (2, 8)]
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [(" 4.0", (4, 0)), (" 10.0", (10, 1))]
    assert ax.get_xlim() == (0, pytest.approx(11.2)) and ax.get_xlabel() == "GiB" and ax.yaxis_inverted()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_every_code_is_in_view_at_its_value():
    _, ax = plots.figure()
    plots.code_histogram(ax, [0.04, 0.1], [-1, 1], "NF4")
    assert [line.tolist() for line in ax.collections[0].get_segments()] == [[[-1, 0], [-1, 4]], [[1, 0], [1, 10]]]
    left, right = ax.get_xlim()
    assert -1.2 < left < -1 and 1 < right < 1.2


def test_all_weights_are_counted_and_the_levels_lie_below_them():
    weights, levels = torch.linspace(-1, 1, 1_001), torch.tensor([-1.0, 0.0, 1.0])
    _, ax = plots.figure()
    plots.weights_and_levels(ax, weights, levels, "NF4")
    starts = [bar.get_x() for bar in ax.patches]
    assert len(starts) == 120 and min(starts) == -1 and max(starts) == pytest.approx(1 - 2 / 120)
    marks = np.array(ax.collections[0].get_segments())
    assert marks[:, 0, 0].tolist() == [-1, 0, 1]
    bottom = ax.get_ylim()[0]
    assert bottom < marks[..., 1].min() < marks[..., 1].max() < 0 and bottom > -0.5


def test_the_branches_of_a_tree_lie_on_the_canvas():
    _, ax = plots.figure()
    plots.decision_tree(ax, "where?", [("load", "4 bits"), ("forward", "checkpointing"), ("step", "paging")])
    (left, right), (low, high) = ax.get_xlim(), sorted(ax.get_ylim())
    points = [*(text.get_position() for text in ax.texts), *(point for line in ax.lines for point in line.get_xydata())]
    assert len(ax.lines) == 3 and len(points) == 7 + 3 * 3
    assert all(left <= x <= right and low <= y <= high for x, y in points)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 0, 0], [1, 1, 1], [1, 2, 2]]


def test_shares_of_a_step_are_bars_with_the_largest_on_top():
    fig, ax = plots.figure()
    plots.shares_of_a_step(ax, {"attention": {"share": 0.1}, "matrix products": {"share": 0.6}, "rest": {"share": 0.3}})
    fig.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["matrix products", "rest", "attention"]
    assert ax.yaxis_inverted()  # so the first is the uppermost
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([60, 30, 10])
    assert [text.get_text().strip() for text in ax.texts] == ["60 %", "30 %", "10 %"]


def test_runs_lie_at_their_memory_and_pace_and_some_are_joined_in_the_order_of_their_memory():
    _, ax = plots.figure()
    rows = {
        name: {"peak_allocated_bytes": memory * 2**30, "tokens_per_second": pace}
        for name, (memory, pace) in {"none": (40, 14_000), "all": (10, 10_000), "other": (8, 9_000)}.items()
    }
    plots.pace_against_memory(ax, rows, joined=["none", "all"], sides={"all": "above"})
    line, *marks = ax.get_lines()
    assert line.get_xydata().tolist() == [[10, 10_000], [40, 14_000]]
    assert [mark.get_xydata().tolist() for mark in marks] == [[[40, 14_000]], [[10, 10_000]], [[8, 9_000]]]
    assert [mark.get_color() for mark in marks] == [plots.BLUE, plots.BLUE, plots.RED]
    assert [(text.get_text(), text.get_va()) for text in ax.texts] == [
        ("none", "center"),
        ("all", "bottom"),
        ("other", "center"),
    ]
    assert ax.get_xlim()[1] > 40 and ax.get_ylim() == (0, pytest.approx(15_400))
    plots.pace_against_memory(plots.figure()[1], rows)  # nothing joined
