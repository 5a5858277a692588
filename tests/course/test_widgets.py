"""The sliders draw what their values say, and the chat shows what is asked and answered."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from qlora_helpers.adapters.tuned import load_tuned
from qlora_helpers.course import plots, widgets
from qlora_helpers.decoding import Decoding
from qlora_helpers.memory import GPU_RUN, find_gpu, find_shape, predict
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import INT4, NF4
from qlora_helpers.units import GIB

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture
def draw(monkeypatch):
    """Move a slider to these values; returns the first axes, their title, and the alt text, or None if nothing is shown."""
    shown = []
    monkeypatch.setattr(plots, "show", lambda fig, alt: shown.append((fig.axes[0], alt)))

    def move(slider, *values):
        shown.clear()  # a new slider draws itself
        slider.f(*values)
        return (shown[0][0], shown[0][0].get_title(loc="left"), shown[0][1]) if shown else None

    return move


def controls(slider) -> dict:
    return {control.description: control for control in slider.children[:-1]}


def test_weights_take_their_bits_over_eight(draw):
    slider = widgets.memory_slider({"Llama-3.1-8B": 8_030_261_248, "large": 70_000_000_000})
    ax, title, said = draw(slider, "Llama-3.1-8B", 16)
    assert ax.patches[0].get_width() == pytest.approx(8_030_261_248 * 2 / GIB)
    assert title == "8,030,261,248 parameters x 16 bits = 15.0 GiB" and ax.get_xlabel() == "weights (GiB)"
    assert "takes 15.0 GiB for its weights alone" in said and said.endswith("RTX 4090, A100 80GB can hold them.")
    rooms = [find_gpu(name).usable_bytes / GIB for name in ("t4", "4090", "a100-80")]
    assert [line.get_xdata()[0] for line in ax.lines] == rooms
    assert draw(slider, "Llama-3.1-8B", 4)[2].endswith("T4, RTX 4090, A100 80GB can hold them.")
    ax, _, said = draw(slider, "large", 16)
    assert ax.get_xlim() == pytest.approx((0, 1.05 * 140e9 / GIB)) and said.endswith("none can hold them.")
    assert [control.value for control in controls(slider).values()] == ["Llama-3.1-8B", 16]


@pytest.mark.parametrize("values", [("Llama-3.1-8B", 4), ("Llama-3.1-8B", 16), ("large", 16), ("large", 32)])
def test_no_text_of_the_memory_slider_lies_on_another(draw, values):
    ax, _, _ = draw(widgets.memory_slider({"Llama-3.1-8B": 8_030_261_248, "large": 70_000_000_000}), *values)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    bar, drawn = ax.patches[0], ax.figure.bbox
    boxes = [text.get_window_extent() for text in (*ax.texts, ax._left_title)]
    for number, box in enumerate(boxes):
        assert drawn.x0 <= box.x0 and box.x1 <= drawn.x1 and drawn.y0 <= box.y0 and box.y1 <= drawn.y1
        assert not box.overlaps(bar.get_window_extent())
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_an_outlier_spoils_the_weights_of_its_block_alone(draw):
    slider = widgets.outlier_slider()
    errors, means = [], []
    for outlier in (1.0, 30.0):
        ax, title, said = draw(slider, outlier, 64)
        panels = dict(zip((NF4.name, INT4.name), ax.figure.axes, strict=True))  # each has its own line: none is hidden
        errors.append({name: panel.lines[0].get_ydata() for name, panel in panels.items()})
        assert all(len(panel.lines) == 1 and name in panel.get_ylabel() for name, panel in panels.items())
        means.append([float(found) for found in re.findall(r"([\d.]+) in (?:NF4|INT4)", said)])
    assert title == "An outlier of 30 in a block of 64 weights" and "an outlier of 30, block size 64" in said
    assert means[1] == [pytest.approx(errors[1][name][64:128].mean(), abs=0.005) for name in (NF4.name, INT4.name)]
    assert min(means[1]) > 3 * max(means[0])
    for name in (NF4.name, INT4.name):
        calm, spoilt = (np.asarray(error[name]) for error in errors)
        differ = np.flatnonzero(calm != spoilt)
        assert len(calm) == 1_024 and differ.min() >= 64 and differ.max() < 128  # the outlier is the weight 100
        assert calm.max() < 0.7 and spoilt.max() > 1  # the steps of a block with an absmax of 3, and of one with 30


def test_sizes_to_choose_from_double_and_the_first_choice_is_the_lesson_s():
    explorer, outlier = controls(widgets.fit_explorer()), controls(widgets.outlier_slider())
    for control in (explorer["rank"], explorer["batch"], explorer["tokens"], outlier["block size"]):
        assert list(control.options) == [control.options[0] << number for number in range(len(control.options))]
    assert {name: control.value for name, control in explorer.items()} == {
        "model": LLAMA, "GPU": "t4", "rank": 16, "batch": 1, "tokens": 2_048, "checkpointing": True,
        "optimizer": "paged_adamw_8bit",
    }  # fmt: skip
    assert (outlier["outlier"].value, outlier["block size"].value) == (12, 64)


def test_the_parts_of_a_run_add_up_to_its_card():
    found = predict(find_shape(LLAMA), GPU_RUN, "l4")
    parts = widgets._explained(found)
    assert len(parts) == 7 and sum(parts.values()) == pytest.approx(found.device_bytes / GIB)
    weights = found.parts["4-bit weights"] + found.parts["quantisation constants"]
    assert parts["4-bit weights"] == pytest.approx(weights / GIB)
    assert 0 < parts["allocator's reserve"] < 2


@pytest.mark.parametrize(
    ("spare", "title"), [(0.5, "fits with 0.5 GiB to spare"), (-0.5, "does not fit: 0.5 GiB too much")]
)
def test_the_title_says_by_how_much_a_run_fits(spare, title, draw, monkeypatch):
    needed = predict(find_shape(LLAMA), replace(GPU_RUN, max_length=4_096), "t4").device_bytes
    room = needed / GIB + spare
    card = replace(find_gpu("t4"), usable_bytes=needed + int(spare * GIB))
    slider = widgets.fit_explorer()
    monkeypatch.setattr(widgets, "find_gpu", lambda name: card)
    ax, said, alt = draw(slider, LLAMA, "t4", 16, 1, 4_096, True, "paged_adamw_8bit")
    assert said == title and title in alt
    assert sum(patch.get_width() for patch in ax.patches) == pytest.approx(needed / GIB)
    assert ax.lines[0].get_xdata()[0] == pytest.approx(room) and f"with {room:.2f} GiB" in ax.get_xlabel()
    assert ax.get_xlim() == (0, pytest.approx(1.12 * max(room, needed / GIB)))
    assert re.search(rf"rank 16, 1 x 4,096 tokens: {needed / GIB:.1f} of {room:.1f} GiB", alt)


def test_a_setting_that_the_model_refuses_is_a_sentence(draw, capsys):
    assert draw(widgets.fit_explorer(), "EleutherAI/gpt-j-6b", "t4", 16, 1, 32_768, True, "paged_adamw_8bit") is None
    assert "max_length=32768: must be no more than max_position_embeddings" in capsys.readouterr().out


QUESTION, RIGHT = "What does Carl Kirkcroft play in a band?", "Carl Kirkcroft plays the harp."


@pytest.fixture(scope="module")
def tuned():
    return load_tuned(data_path("adapters", "sentences"))[:2]


class Chat:
    """A chat as its user sees it."""

    def __init__(self, model, tokenizer, **options):
        self.widget = widgets.chat_widget(model, tokenizer, **options)
        self.history, (self.field,), controls = (
            self.widget.children[0],
            *[row.children for row in self.widget.children[1:]],
        )
        self.controls = {control.description: control for control in controls}

    def type(self, text):
        self.field.value = text
        self.field._handle_custom_msg({"event": "submit"}, [])  # what Enter sends

    @property
    def shown(self):
        return [re.sub("<[^>]+>", "", entry.value) for entry in self.history.children]


def test_a_chat_shows_questions_and_answers_and_begins_anew(tuned):
    chat = Chat(*tuned)
    assert chat.field.description == "question" and list(chat.controls) == ["Send", "New chat", "with the adapter"]
    chat.type(QUESTION)
    assert chat.shown == [f"you: {QUESTION}", f"model: {RIGHT}"] and chat.field.value == ""
    chat.field.value = QUESTION
    chat.controls["with the adapter"].value = False
    chat.controls["Send"].click()
    assert len(chat.shown) == 4 and chat.shown[3].startswith("base: ") and RIGHT not in chat.shown[3]
    chat.controls["New chat"].click()
    assert chat.shown == []
    chat.controls["with the adapter"].value = True
    chat.type(QUESTION)
    assert chat.shown[1] == f"model: {RIGHT}"
    chat.type("  ")
    assert len(chat.shown) == 2


def test_a_model_without_an_adapter_has_no_box_for_it(tuned):
    chat = Chat(load_model(), tuned[1])
    assert list(chat.controls) == ["Send", "New chat"]
    chat.type(QUESTION)
    assert chat.shown[1].startswith("model: ") and RIGHT not in chat.shown[1]


def test_an_answer_is_shown_while_it_is_generated_and_nothing_can_be_sent_meanwhile(tuned, monkeypatch):
    monkeypatch.setattr(widgets, "REDRAWN", -1)
    chat, seen, add = Chat(*tuned), [], widgets._Said.add

    def spy(said, text):
        add(said, text)
        seen.append((chat.shown[-1], chat.field.disabled, chat.controls["Send"].disabled))
        chat.controls["Send"].click()

    monkeypatch.setattr(widgets._Said, "add", spy)
    chat.type(QUESTION)
    assert seen[0] == ("model: Carl", True, True) and len({text for text, _, _ in seen}) == len(seen) > 3
    assert chat.shown[-1] == f"model: {RIGHT}" and len(chat.shown) == 2 and not chat.controls["Send"].disabled


def test_what_an_answer_lacks_is_shown_below_it(tuned):
    chat = Chat(*tuned, decoding=Decoding(max_new_tokens=2))
    chat.type(QUESTION)
    assert chat.shown[1] == "model: Carl Kirkcroftcut off after 2 tokens, the most that max_new_tokens allows"


def test_no_text_becomes_html(tuned, monkeypatch):
    said = SimpleNamespace(ask=lambda text, write, base: write("<b>&") or SimpleNamespace(), remarks=lambda _: ["<i>"])
    monkeypatch.setattr(widgets, "Conversation", lambda *args: said)
    chat = Chat(*tuned)
    chat.type("<script>alert(1)</script>")
    question, answer = (entry.value for entry in chat.history.children)
    assert "&lt;script&gt;" in question and "<script" not in question
    assert "&lt;b&gt;&amp;" in answer and "<i>&lt;i&gt;</i>" in answer


def test_an_error_is_shown_and_the_question_kept(tuned, monkeypatch):
    chat = Chat(*tuned)
    chat.type("Carl<|end|>")
    assert chat.shown[0] == "you: Carl&lt;|end|&gt;" and len(chat.shown) == 2
    assert chat.shown[1].startswith("error: the question has &#x27;&lt;|end|&gt;&#x27; in its text")
    assert 'role="alert"' in chat.history.children[1].value
    assert chat.field.value == "Carl<|end|>" and not chat.field.disabled and not chat.controls["Send"].disabled
    monkeypatch.setattr(tuned[0], "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    chat.type(QUESTION)
    assert chat.shown[3] == "error: RuntimeError: out of memory" and chat.field.value == QUESTION


def test_an_interrupt_of_the_kernel_stops_an_answer(tuned, monkeypatch):
    monkeypatch.setattr(tuned[0], "generate", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    chat = Chat(*tuned)
    chat.type(QUESTION)
    assert chat.shown == [f"you: {QUESTION}", "model: stopped"] and not chat.field.disabled
