"""Copies of the shipped adapter, each with one fault that takes its effect away."""

import json
import shutil

from safetensors.torch import load_file, save_file

from qlora_helpers.paths import data_path

SHIPPED, BASE = data_path("adapters", "sentences"), data_path("tiny-llama")


def changed(folder, change=None, **options):
    """A copy of the shipped adapter with its tensors changed by a function, and other options in its config."""
    shutil.copytree(SHIPPED, folder)
    if change:
        tensors = change(load_file(folder / "adapter_model.safetensors"))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) | options
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def without_prefix(tensors):
    """As a training script saves the state of the model inside PEFT's."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def scaled(share, only=""):
    """A function that multiplies each B by a share, where its name holds a text."""
    return lambda tensors: {
        name: tensor * share if ".lora_B." in name and only in name else tensor for name, tensor in tensors.items()
    }
