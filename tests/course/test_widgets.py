"""The sliders draw what their values say, and the chat shows what is asked and answered."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qlora_helpers.adapters.tuned import load_tuned
from qlora_helpers.course import plots, widgets
from qlora_helpers.decoding import Decoding
from qlora_helpers.memory import GPU_RUN, find_gpu, find_shape, predict
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import INT4, NF4
from qlora_helpers.units import GB, GIB
from tests.support.figure_faults import faults_of

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture
def draw(monkeypatch):
    """Move a slider to these values; returns the axes, their title, and the alt text, or None if nothing is shown."""
    shown = []
    monkeypatch.setattr(plots, "show", lambda fig, alt: shown.append((fig.axes[0], alt)))

    def move(slider, *values):
        shown.clear()  # a new slider draws itself
        slider.f(*values)
        if not shown:
            return None
        ax, said = shown[0]
        assert faults_of(ax.figure) == []
        return ax, ax.figure.get_suptitle() or ax.get_title(loc="left"), said

    return move


def controls(slider) -> dict:
    return {control.description: control for control in slider.children[:-1]}


def test_weights_take_their_bits_over_eight(draw):
    slider = widgets.memory_slider({"Llama-3.1-8B": 8_030_261_248, "large": 70_000_000_000})
    ax, title, said = draw(slider, "Llama-3.1-8B", 16)
    assert ax.patches[0].get_width() == pytest.approx(16.060522496)
    assert title == "8,030,261,248 parameters x 16 bits = 16.1 GB"
    assert said == (
        "Llama-3.1-8B at 16 bits per weight takes 16.1 GB for its weights alone. "
        "Cards that can hold them: RTX 4090 (25.2), A100 (85.0)."
    )
    usable = [line.get_xdata()[0] * GB for line in ax.lines]  # in the unit of the weights
    assert usable == pytest.approx([find_gpu(name).usable_bytes for name in ("a100-80", "4090", "t4")])
    assert [text.get_text() for text in ax.texts] == ["A100: 85.0 GB", "RTX 4090: 25.2 GB", "T4: 15.6 GB"]
    assert ax.get_xlim() == (0, 90)
    ax, _, said = draw(slider, "large", 16)
    assert ax.get_xlim() == (0, 147) and said.endswith("none of the three.")


@pytest.mark.parametrize("bits", [32, 16, 8, 4.5, 4.127, 4])
def test_no_card_hides_another_or_the_title(draw, bits):
    slider = widgets.memory_slider(
        {"small": 494_032_768, "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496}
    )
    for model in ("small", "Llama-3.1-8B", "Llama-3.1-70B"):
        ax, _, _ = draw(slider, model, bits)  # which looks at every text
        names = [text.get_window_extent() for text in ax.texts]
        for line in ax.lines:
            x, y = ax.transData.transform(line.get_xydata()).T
            assert not any(name.x0 < x[0] < name.x1 and name.y0 < max(y) for name in names)


def test_the_slider_of_bits_begins_with_16_bits():
    slider = widgets.memory_slider({"Llama-3.1-8B": 8_030_261_248})
    assert [control.value for control in controls(slider).values()] == ["Llama-3.1-8B", 16]


def test_an_outlier_spoils_the_weights_of_its_block_alone(draw):
    slider = widgets.outlier_slider()
    errors = []
    for outlier in (1.0, 30.0):
        ax, title, said = draw(slider, outlier, 64)
        errors.append({line.get_label(): line.get_ydata() for panel in ax.figure.axes for line in panel.lines})
    assert title == "An outlier of 30 spoils the 64 weights of its block" and "an outlier of 30, block size 64" in said
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
    ("spare", "verdict"), [(0.5, "fits with 0.5 GiB to spare"), (-0.5, "does not fit: 0.5 GiB too much")]
)
def test_the_title_says_which_model_fits_and_by_how_much(spare, verdict, draw, monkeypatch):
    needed = predict(find_shape(LLAMA), replace(GPU_RUN, max_length=4_096), "t4").device_bytes
    room = needed / GIB + spare
    card = replace(find_gpu("t4"), usable_bytes=needed + int(spare * GIB))
    slider = widgets.fit_explorer()
    monkeypatch.setattr(widgets, "find_gpu", lambda name: card)
    ax, said, alt = draw(slider, LLAMA, "t4", 16, 1, 4_096, True, "paged_adamw_8bit")
    assert said == f"Llama-3.1-8B {verdict}" and verdict in alt
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
