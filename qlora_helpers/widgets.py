"""The course's sliders. Each draws the same figure as the cell before it, for values that the learner picks."""

import ipywidgets
import torch

from qlora_helpers import plots
from qlora_helpers.quantize import INT4, NF4, dequantize, quantize
from qlora_helpers.shapes import KNOWN


def memory_slider() -> ipywidgets.Widget:
    """Move the bits per weight and the model; see the bytes of the weights beside two cards."""
    from qlora_helpers.shapes import meta_model

    counts = {name: meta_model(shape).num_parameters() for name, shape in KNOWN.items()}

    def draw(model: str, bits: float):
        gigabytes = counts[model] * bits / 8 / 1e9
        fig, ax = plots.figure(figsize=(7.2, 1.9))
        ax.barh([model], [gigabytes], color=plots.BLUE)
        for card, size in (("T4, 16 GB", 16), ("RTX 4090, 24 GB", 24), ("A100, 80 GB", 80)):
            ax.axvline(size, color=plots.RED, linestyle="--")
            ax.text(size, 0.45, f" {card}", color=plots.RED, fontsize=8)
        ax.set_xlim(0, max(90, gigabytes * 1.05))
        ax.set_xlabel("weights (GB)")
        ax.set_title(f"{counts[model]:,} parameters x {bits} bits = {gigabytes:.1f} GB")
        plots.show(fig, f"{model} at {bits} bits per weight takes {gigabytes:.1f} GB for its weights alone.")

    return ipywidgets.interactive(
        draw,
        model=ipywidgets.Dropdown(options=list(counts), value="Llama-3.1-8B", description="model"),
        bits=ipywidgets.SelectionSlider(options=[32, 16, 8, 4.5, 4.127, 4], value=16, description="bits"),
    )


def outlier_slider() -> ipywidgets.Widget:
    """Move one outlier and the block size; see the error of the values that share its block."""
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0))

    def draw(outlier: float, block_size: int):
        changed = weights.clone()
        changed[100] = outlier
        fig, ax = plots.figure()
        for codebook in (NF4, INT4):
            error = (dequantize(quantize(changed, codebook, block_size, False)) - changed).abs()
            ax.plot(error[:1024], color=plots.FORMAT_COLOURS[codebook.name], label=codebook.name, linewidth=0.8)
        ax.set_ylim(0, 1.5)
        ax.set_xlabel("position of the weight")
        ax.set_ylabel("absolute error")
        ax.set_title(f"An outlier of {outlier:g} spoils the {block_size} weights of its block")
        ax.legend()
        plots.show(fig, f"Error of 1,024 weights with an outlier of {outlier:g}, block size {block_size}.")

    return ipywidgets.interactive(
        draw,
        outlier=ipywidgets.FloatSlider(value=12, min=1, max=30, step=1, description="outlier"),
        block_size=ipywidgets.SelectionSlider(
            options=[32, 64, 128, 256, 512, 1024], value=64, description="block size"
        ),
    )
