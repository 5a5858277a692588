"""A model folder's config.json, and what in it stops the course from loading the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_helpers.json_files import read_json
from qlora_helpers.memory.saved_format import quantization_entry, saved_format
from qlora_helpers.validation import refuse

__all__ = ["no_own_code", "read_config", "saved_in_4_bits"]


def read_config(folder: str | Path, name: str, argument: str = "name") -> dict[str, Any]:
    """The config.json of a model's folder.

    Args:
        name, argument: the model as the caller gave it, and the argument that it was given as, for the messages.

    Raises:
        FileNotFoundError: `folder` has no config.json.
        ValueError: it is damaged, or the folder is that of an adapter, which transformers would load with its base.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        raise refuse(
            argument,
            name,
            "is the folder of an adapter: load its base, then the adapter with adapters.files.load_adapter",
        )
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{argument}={name!r} has no config.json: pass the folder of a model")
    try:
        return read_json(path)
    except ValueError as error:
        raise refuse(argument, name, f"its config.json {error}: fetch or copy it again") from error


def saved_in_4_bits(config: dict[str, Any], name: str, argument: str = "name") -> str | None:
    """The 4-bit format ("nf4" or "fp4") in which bitsandbytes saved a model, or None if it is not quantised.

    transformers takes the entry for one of no quantisation if it is null, and skips one that it does not know.

    Raises:
        ValueError: the model is quantised in another way.
    """
    found, saved = saved_format(config), quantization_entry(config)
    if found is None:
        return None
    if not found.is_loaded_here:
        method = saved.get("quant_method") if isinstance(saved, dict) else saved
        raise refuse(
            argument,
            name,
            f"its config.json says that it is quantised (quant_method={method!r}: {found}): pass the 16-bit model that it "
            "was made from",
        )
    return saved.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default


@contextmanager
def no_own_code(name: str) -> Iterator[None]:
    """Around a call with `trust_remote_code=False`: a folder that needs code of its own is refused in our words.

    transformers' message advises to switch the protection off. Left open (None), it asks the user, and "y" runs the code.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise refuse(
            "name",
            name,
            "asks for Python code of its own (auto_map in its files), which is never run here: pass a model whose "
            "architecture is part of transformers",
        ) from error
