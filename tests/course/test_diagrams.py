"""The diagrams are legible, and say what the course's code computes."""

import json
import re
from dataclasses import replace

import jupytext
import pytest
import torch

from notebooks.scripts import build
from qlora_helpers.course import diagrams
from qlora_helpers.course.diagrams import AdaptedLayer
from qlora_helpers.memory import GPU_RUN, find_shape, predict
from qlora_helpers.quantize import FP4, INT4, NF4, dequantize, quantize
from tests import ROOT
from tests.support.figure_faults import faults_of

NAMES = [name for name in diagrams.__all__ if name[0].islower()]
ALT_TEXTS = json.loads((ROOT / "qlora_helpers" / "course" / "alt_texts" / "diagrams.json").read_text(encoding="utf-8"))


def words(fig) -> list[str]:
    return [text.get_text() for text in (*fig.texts, *(text for ax in fig.axes for text in ax.texts))]


def title(fig) -> str:
    return fig.get_suptitle()


@pytest.mark.parametrize("name", NAMES)
def test_a_diagram_is_legible_at_the_width_of_a_notebook(name):
    fig = getattr(diagrams, name)()
    assert fig.get_size_inches()[0] == 7.2
    assert min(text.get_fontsize() for text in (*fig.texts, *fig.axes[0].texts)) >= 8
    assert faults_of(fig) == []
    assert title(fig) and fig.get_facecolor() == (1, 1, 1, 1)  # a white card on a dark page, too


def test_each_diagram_has_its_text_in_words_and_no_other_has():
    assert sorted(ALT_TEXTS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_a_text_in_words_are_those_of_its_diagram(name):
    fig = getattr(diagrams, name)()
    number = r"\d+(?:,\d{3})*(?:\.\d+)?"
    drawn = set(re.findall(number, " ".join(words(fig))))
    named = ALT_TEXTS[name].replace("Llama-3.1-8B", "").replace("NF4", "")
    if name == "block_and_codebook":
        named = named.replace("from -1 to 1", "")  # the ends of its line
    assert set(re.findall(number, named)) - {"0"} <= drawn
    assert drawn


def test_a_block_is_drawn_as_quantize_computes_it():
    block = torch.randn(32, generator=torch.Generator().manual_seed(1))
    block[20] = 5.0
    made = quantize(block, INT4, 32, False)
    fig = diagrams.block_and_codebook(block, INT4)
    said = words(fig)
    assert "5.0000" in said and "32 codes of 4 bits (16 bytes)" in " ".join(said)
    first = said.index("code of the\nnearest value") + 1
    codes = [int(code) for code in said[first : first + 8]]
    windows = [made.codes[start : start + 8].tolist() for start in range(13, 21)]
    assert codes in windows  # with the largest weight among them
    start = 13 + windows.index(codes)
    first = said.index("× absmax") + 1
    assert said[first : first + 8] == [
        f"{value:.4f}".replace("-", "−") for value in dequantize(made)[start : start + 8].tolist()
    ]
    assert faults_of(fig) == []


def test_every_codebook_of_4_bits_can_be_drawn():
    for codebook in (FP4, INT4):
        faults = faults_of(diagrams.block_and_codebook(codebook=codebook))
        assert [fault for fault in faults if "beyond" in fault] == []


def test_a_block_without_room_or_too_small_is_refused():
    from qlora_helpers.quantize import Codebook

    with pytest.raises(ValueError, match="weights has 7 values: the diagram shows 8"):
        diagrams.block_and_codebook(torch.ones(7))
    with pytest.raises(ValueError, match="codebook has 32 values"):
        diagrams.block_and_codebook(torch.ones(64), Codebook("five", 5, torch.linspace(-1, 1, 32)))


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_both_levels_are_counted_as_quantize_stores_them(block_size):
    made = quantize(torch.ones(256 * block_size), NF4, block_size, True)
    fig = diagrams.two_levels(block_size)
    said = words(fig)
    whole = made.packed.nbytes + made.absmax.nbytes + made.nested.absmax.nbytes
    assert f"{whole:,}" in said and f"{made.bits_per_parameter:.6f}" in said
    assert title(fig) == "Double quantisation: 1,024 bytes of scales become 256 + 4"
    assert faults_of(fig) == []
    with pytest.raises(ValueError, match="block_size"):
        diagrams.two_levels(0)


def test_both_passes_say_the_shapes_and_sizes_of_their_layer():
    layer = AdaptedLayer(inputs=256, outputs=512, rank=8, tokens=100, alpha=32)
    forward, backward = " ".join(words(diagrams.forward_pass(layer))), " ".join(words(diagrams.backward_pass(layer)))
    for said in (forward, backward):
        assert "512 × 256\n64 KiB + scales" in said and "512 × 256\n256 KiB" in said  # half a byte and two bytes each
    assert "A, float32\n8 × 256\n8 KiB" in forward and "4 · (x Aᵀ) Bᵀ\n100 × 512" in forward
    assert "h = 4 · g B\n100 × 8" in backward and "gradient of A: hᵀ x\n8 × 256\n8 KiB" in backward


def test_the_products_of_the_backward_pass_are_those_of_autograd():
    torch.manual_seed(0)
    tokens, inputs, outputs, rank, scaling = 5, 4, 6, 2, 2.0
    x = torch.randn(tokens, inputs, requires_grad=True)
    frozen = torch.randn(outputs, inputs)
    a, b = torch.randn(rank, inputs, requires_grad=True), torch.randn(outputs, rank, requires_grad=True)
    y = x @ frozen.T + scaling * (x @ a.T) @ b.T
    g = torch.randn_like(y)
    y.backward(g)
    h = scaling * g @ b
    torch.testing.assert_close(a.grad, h.T @ x)
    torch.testing.assert_close(b.grad, scaling * g.T @ (x @ a.T))
    torch.testing.assert_close(x.grad, g @ frozen + h @ a)
    assert frozen.grad is None


def test_the_layer_is_one_of_llama_3_1_8b():
    shape, layer = find_shape("meta-llama/Llama-3.1-8B"), AdaptedLayer()
    assert (layer.inputs, layer.outputs) == (shape.hidden_size, shape.intermediate_size)
    assert (layer.rank, layer.tokens, layer.scaling) == (GPU_RUN.rank, GPU_RUN.max_length, GPU_RUN.alpha / GPU_RUN.rank)
    with pytest.raises(ValueError, match="rank"):
        AdaptedLayer(rank=0)


def test_checkpointing_is_drawn_to_the_scale_of_the_prediction():
    fig = diagrams.checkpointing()
    shape = find_shape("meta-llama/Llama-3.1-8B")
    without = predict(shape, replace(GPU_RUN, gradient_checkpointing=False)).parts["activations"]
    parts = predict(shape, GPU_RUN).parts
    heights = sorted({round(patch.get_height(), 9) for patch in fig.axes[0].patches if hasattr(patch, "get_height")})
    slim, whole, again = heights
    assert slim / whole == pytest.approx(parts["checkpointed activations"] / without)
    assert again / whole == pytest.approx(parts["recomputed layer"] * shape.num_hidden_layers / without)
    assert "15.7 GiB" in title(fig)
    with pytest.raises(ValueError, match="not-a-model"):
        diagrams.checkpointing("not-a-model")


def test_the_map_has_each_lesson_once_under_its_own_title():
    plan = diagrams._map()
    placed = [*plan["first"], plan["then"], *(name for road in plan["roads"].values() for name in road)]
    assert sorted(placed) == build.lessons() == list(plan["lessons"])
    for name, said in plan["lessons"].items():
        heading = jupytext.read(build.SOURCES / f"{name}.py").cells[0].source.splitlines()[0]
        assert heading == f"# {int(name[:2])} · {said['title']}"
    fig = diagrams.course_map()
    together = " ".join(words(fig)).replace("\n", " ")
    for name, said in plan["lessons"].items():
        assert f"{int(name[:2])} · {said['title']}" in together and said["gives"] in together
