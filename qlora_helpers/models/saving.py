"""Save a whole model so that plain transformers loads it."""

import json
from pathlib import Path

import torch

from qlora_helpers.safe_folders import whole_folder


def save_model(model, tokenizer, folder: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Save a whole model with its tokenizer as safetensors, which plain transformers loads.

    Args:
        folder: appears in whole or not at all; one that is there is kept.
        dtype: of the saved weights; by default as they are. A 4-bit model keeps its 4-bit weights.
        overwrite: replace a folder that is there. It stays until the new one is whole.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        ValueError: adapters are still attached, which would be saved in their place; or `dtype` for a 4-bit model.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "model has adapters attached: merge them first, or save them with qlora_helpers.adapters.files.save_adapter"
        )
    quantised = getattr(model, "is_quantized", False)
    if dtype is not None and quantised:
        raise ValueError(f"dtype={dtype}: the model is 4-bit. Dequantise it first, or leave dtype out")
    with whole_folder(folder, overwrite) as part:
        if dtype is None:
            model.save_pretrained(part)
        else:
            model.save_pretrained(
                part, state_dict={name: value.to(dtype) for name, value in model.state_dict().items()}
            )
            # transformers writes down the dtype of the model in memory, by which the files would be loaded again
            config = json.loads((part / "config.json").read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(part)
    return Path(folder)
