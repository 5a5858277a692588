"""The course's sliders, and a chat. Each slider draws the same figure as the cell before it, for values that the learner picks."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import ipywidgets
import torch
from peft import PeftModel

from qlora_helpers.conversation import Conversation
from qlora_helpers.course import plots
from qlora_helpers.decoding import Decoding
from qlora_helpers.memory import GPU_RUN, find_gpu, find_shape, known_gpus, predict
from qlora_helpers.memory.catalogue import predicted_models
from qlora_helpers.memory.trained import OPTIMIZERS
from qlora_helpers.quantize import INT4, NF4, dequantize, quantize
from qlora_helpers.units import GB, GIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["chat_widget", "fit_explorer", "memory_slider", "outlier_slider"]


CARDS = {"T4": "t4", "RTX 4090": "4090", "A100": "a100-80"}  # on the slider of lesson 1: their names, the predictor's


def memory_slider(parameters: Mapping[str, int]) -> ipywidgets.Widget:
    """Move the bits per weight and the model; see the bytes of the weights against what torch can use of three cards.

    Args:
        parameters: their number in each model, by its name.
    """
    cards = sorted((find_gpu(name).usable_bytes / GB, card) for card, name in CARDS.items())

    def draw(model: str, bits: float):
        gigabytes = parameters[model] * bits / 8 / GB
        most = max(90, gigabytes * 1.05)
        fig, ax = plots.figure(figsize=(7.2, 2.2))
        ax.barh([model], [gigabytes], color=plots.BLUE)
        # each name beside the top of its own line, the smallest card's highest: so no line runs through a name
        for row, (size, card) in enumerate(reversed(cards)):
            top = 0.68 + 0.32 * row
            ax.plot([size, size], [-0.5, top], color=plots.RED, linestyle="--")
            is_left = size > most / 2
            ax.annotate(
                f"{card}: {size:.1f} GB",
                (size, top),
                xytext=(-4 if is_left else 4, 0),
                textcoords="offset points",
                ha="right" if is_left else "left",
                va="center",
                color=plots.RED,
                fontsize=9,
            )
        ax.set(xlim=(0, most), ylim=(-0.5, 0.68 + 0.32 * len(cards)))
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("weights (GB); dashed: what torch can use of a card")
        ax.set_title(f"{parameters[model]:,} parameters x {bits} bits = {gigabytes:.1f} GB")
        hold = [f"{card} ({size:.1f})" for size, card in cards if size >= gigabytes]
        plots.show(
            fig,
            f"{model} at {bits} bits per weight takes {gigabytes:.1f} GB for its weights alone. "
            f"Cards that can hold them: {', '.join(hold) or 'none of the three'}.",
        )

    return ipywidgets.interactive(
        draw,
        model=ipywidgets.Dropdown(options=list(parameters), value="Llama-3.1-8B", description="model"),
        bits=ipywidgets.SelectionSlider(options=[32, 16, 8, 4.5, 4.127, 4], value=16, description="bits"),
    )


def outlier_slider() -> ipywidgets.Widget:
    """Move one outlier and the block size; see the error of the values that share its block."""
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0))

    def draw(outlier: float, block_size: int):
        changed = weights.clone()
        changed[100] = outlier
        # a panel for each, since one curve would hide the other
        fig, axes = plots.figure(1, 2, figsize=(7.2, 3.2), sharey=True)
        for ax, codebook in zip(axes, (NF4, INT4), strict=True):
            error = (dequantize(quantize(changed, codebook, block_size, False)) - changed).abs()
            colour = plots.FORMAT_COLOURS[codebook.name]
            ax.plot(error[:1024], color=colour, label=codebook.name, linewidth=0.8)
            ax.set_xlabel("position of the weight")
            ax.set_title(codebook.name, fontsize=10, fontweight="normal")
        axes[0].set(ylim=(0, 1.5), ylabel="absolute error")
        title = f"An outlier of {outlier:g} spoils the {block_size} weights of its block"
        fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        plots.show(fig, f"Error of 1,024 weights with an outlier of {outlier:g}, block size {block_size}.")

    return ipywidgets.interactive(
        draw,
        outlier=ipywidgets.FloatSlider(value=12, min=1, max=30, step=1, description="outlier"),
        block_size=ipywidgets.SelectionSlider(
            options=[32, 64, 128, 256, 512, 1024], value=64, description="block size"
        ),
    )


def _explained(prediction) -> dict[str, float]:
    """What a run takes on its card, in GiB: seven parts whose sum is `device_bytes`."""
    named = {
        "4-bit weights": ("4-bit weights", "quantisation constants"),
        "16-bit weights": ("16-bit weights",),
        "adapters, gradients, optimizer": ("adapters", "gradients", "optimizer (GPU)", "optimizer (paged)"),
        "activations": ("checkpointed activations", "activations"),
        "layer at work": ("recomputed layer", "layer at work", "logits tile", "dequantised weight", "workspace"),
        "CUDA context": ("CUDA context",),
    }
    parts = {name: sum(prediction.parts.get(part, 0) for part in of) for name, of in named.items()}
    parts["allocator's reserve"] = prediction.device_bytes - sum(prediction.parts.values())
    return {name: size / GIB for name, size in parts.items()}


def fit_explorer() -> ipywidgets.Widget:
    """Move a QLoRA run: model, GPU and settings; see its parts grow and shrink against the GPU's memory."""

    def draw(model: str, gpu: str, rank: int, batch_size: int, max_length: int, checkpointing: bool, optimizer: str):
        card = find_gpu(gpu)
        try:
            settings = replace(
                GPU_RUN,
                rank=rank,
                batch_size=batch_size,
                max_length=max_length,
                gradient_checkpointing=checkpointing,
                optimizer=optimizer,
            )
            prediction = predict(find_shape(model), settings, card)
        except ValueError as error:  # this model does not allow that setting
            print(error)
            return
        spare, room = prediction.spare_bytes / GIB, card.usable_bytes / GIB
        verdict = f"fits with {spare:.1f} GiB to spare" if spare >= 0 else f"does not fit: {-spare:.1f} GiB too much"
        fig, ax = plots.figure(figsize=(7.2, 2.6))
        plots.stacked_bars(ax, [""], {part: [size] for part, size in _explained(prediction).items()}, "GiB")
        ax.axvline(room, color="black", linestyle="--")
        ax.set_xlim(0, 1.12 * max(room, prediction.device_bytes / GIB))
        ax.set_yticks([])
        ax.set_xlabel(f"GiB on the card; the dashed line is the {card.name} with {room:.2f} GiB")
        ax.set_title(f"{model.rpartition('/')[2]} {verdict}")
        ax.get_legend().remove()
        fig.legend(loc="outside lower center", ncols=4, fontsize=8)
        plots.show(
            fig,
            f"{model} on {card.name}, rank {rank}, {batch_size} x {max_length:,} tokens: "
            f"{prediction.device_bytes / GIB:.1f} of {room:.1f} GiB; {verdict}.",
        )

    def choose(options, value, description: str):
        return ipywidgets.SelectionSlider(options=options, value=value, description=description)

    return ipywidgets.interactive(
        draw,
        model=ipywidgets.Dropdown(
            options=list(predicted_models()), value="meta-llama/Llama-3.1-8B", description="model"
        ),
        gpu=ipywidgets.Dropdown(options=list(known_gpus()), value="t4", description="GPU"),
        rank=choose([4, 8, 16, 32, 64, 128, 256], 16, "rank"),
        batch_size=choose([1, 2, 4, 8, 16, 32], 1, "batch"),
        max_length=choose([256, 512, 1024, 2048, 4096, 8192, 16384, 32768], 2048, "tokens"),
        checkpointing=ipywidgets.Checkbox(value=True, description="checkpointing"),
        optimizer=ipywidgets.Dropdown(options=list(OPTIMIZERS), value="paged_adamw_8bit", description="optimizer"),
    )


REDRAWN = 0.1  # seconds between two updates of an answer that is being generated


class _Said:
    """One entry of a chat's history. All text is escaped; the colours are the notebook's own, light or dark."""

    def __init__(self, who: str, text: str = "", role: str = "article"):
        self.who, self.role, self.text, self.notes = who, role, text, ""
        self.widget, self.drawn = ipywidgets.HTML(), 0.0
        self.draw()

    def draw(self) -> None:
        notes = f"<br><i>{html.escape(self.notes)}</i>" if self.notes else ""
        self.widget.value = (
            f'<div role="{self.role}" style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.4">'
            f"<b>{html.escape(self.who)}:</b> {html.escape(self.text)}{notes}</div>"
        )
        self.drawn = time.monotonic()

    def add(self, text: str) -> None:
        self.text += text
        if time.monotonic() - self.drawn > REDRAWN:
            self.draw()


def chat_widget(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None = None,
    decoding: Decoding | None = None,
) -> ipywidgets.Widget:
    """Talk to a model in a notebook. Answers appear as they are generated; the kernel's interrupt stops one.

    If the model has an adapter, a box turns it off and on: the base then answers in the same conversation.

    Args:
        system, decoding: as `Conversation` takes them.

    Raises:
        ValueError: as `Conversation` does. What goes wrong later is shown in the chat.
    """
    conversation = Conversation(model, tokenizer, system, decoding)
    has_adapter = isinstance(model, PeftModel)
    history = ipywidgets.VBox()
    question = ipywidgets.Text(
        description="question", placeholder="type a question and press Enter", layout=ipywidgets.Layout(flex="1 1 auto")
    )
    send = ipywidgets.Button(description="Send", tooltip="ask the question")
    new = ipywidgets.Button(description="New chat", tooltip="forget this conversation and begin a new one")
    adapter = ipywidgets.Checkbox(value=has_adapter, description="with the adapter", indent=False)

    def say(said: _Said) -> _Said:
        history.children = (*history.children, said.widget)
        return said

    def ask() -> None:
        text, base = question.value, has_adapter and not adapter.value
        if not text.strip() or send.disabled:
            return
        send.disabled = question.disabled = new.disabled = True
        question.value = ""
        say(_Said("you", text))
        said = say(_Said("base" if base else "model", "…"))
        said.text = ""
        try:
            answer = conversation.ask(text, said.add, base=base)
            said.notes = "; ".join(conversation.remarks(answer))
            said.draw()
        except Exception as error:  # a widget's errors would go to a log that nobody reads
            question.value = text
            history.children = history.children[:-1]
            what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            say(_Said("error", f"{what}{error}", role="alert"))
        finally:
            send.disabled = question.disabled = new.disabled = False

    def begin_anew() -> None:
        conversation.restart()
        history.children = ()

    send.on_click(lambda button: ask())
    new.on_click(lambda button: begin_anew())
    question.on_msg(lambda widget, content, buffers: ask() if content.get("event") == "submit" else None)
    controls = ipywidgets.HBox([send, new, *([adapter] if has_adapter else [])])
    return ipywidgets.VBox([history, ipywidgets.HBox([question]), controls])
