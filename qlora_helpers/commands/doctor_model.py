"""`python -m qlora_helpers doctor --model`: what of a model would be in 4 bits, before anything of it is loaded."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.models.fetched import FETCHABLE, fetched_folder, is_fetched
from qlora_helpers.paths import data_path

if TYPE_CHECKING:
    from qlora_helpers.memory.saved_format import SavedFormat

__all__ = ["examine_model"]

SHIPPED = "tiny-llama"
WIDTH = 100  # characters


def examine_model(model: str) -> int:
    """Print what of a model would be in 4 bits, part by part, and what else its config says.

    Args:
        model: "tiny-llama" (shipped), a folder, a config.json, or a name of those that `memory --list` prints.

    Returns:
        0; or 1 if most of its decoder would not be in 4 bits, or it cannot be loaded here, or torch is not installed.

    Raises:
        ValueError: the model is not known, or its config makes no sense.
        FileNotFoundError: there is no such config.json.
    """
    if importlib.util.find_spec("torch") is None:
        print("✗ doctor --model needs torch, which is not installed: run doctor without --model for the cure")
        return 1
    folder, config = _found(model)
    from qlora_helpers.memory.assumed import assumed_in_words
    from qlora_helpers.memory.saved_format import saved_format
    from qlora_helpers.models.in_4_bits import planned_4_bits, refuse_unless_mostly

    assumed, saved = assumed_in_words(config), saved_format(config)
    plan = planned_4_bits(config, name=model)
    print(plan)
    for line in _notes(folder, assumed, saved):
        print(_wrapped(line))
    reasons = []
    if saved and not saved.is_loaded_here:
        reasons.append(f"load_model does not take it as it is ({saved}): pass the 16-bit model that it was made from")
    try:
        refuse_unless_mostly(plan, "nf4")
    except ValueError as error:
        reasons.append(str(error))
    print()
    for reason in reasons:
        print(_wrapped(f"✗ {reason}"))
    if not reasons:
        share = f"{plan.share:.0%}".replace("%", " %")
        print(f"✓ loaded in 4 bits, {share} of the bytes of its decoder's matrices are in 4 bits")
    return 1 if reasons else 0


def _notes(folder: Path | None, assumed: str, saved: SavedFormat | None) -> Iterator[str]:
    if saved and saved.is_loaded_here:
        yield f"· {saved}"
    if saved and folder and (sizes := _bytes_in_files(folder)):
        from qlora_helpers.units import MIB

        yield f"· its files: {sizes[0] / MIB:,.1f} MiB in 4 bits, {sizes[1] / MIB:,.1f} MiB not"
    if saved and not saved.is_loaded_here:
        yield "· the table is that of the 16-bit model that it was made from"
    if assumed:
        yield f"· {assumed}"


def _found(model: str) -> tuple[Path | None, dict[str, Any]]:
    """The folder of a model, if it has one, and its config."""
    from qlora_helpers.memory.catalogue import known_config
    from qlora_helpers.models.folder_config import read_config

    if model in FETCHABLE and is_fetched(model):
        path = fetched_folder(model)
    else:  # the config of one that can be fetched is known by its name
        path = data_path(SHIPPED) if model == SHIPPED else Path(model)
    if path.suffix == ".json":
        path = path.parent if path.name == "config.json" else path
        if path.is_file():
            from qlora_helpers.json_files import read_json
            from qlora_helpers.validation import refuse

            try:
                return None, read_json(path)
            except ValueError as error:
                raise refuse("model", model, f"this file {error}: give the config.json of a model") from error
        return path, read_config(path, model, argument="model")
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path, read_config(path, model, argument="model")
    return None, known_config(model)


def _bytes_in_files(folder: Path) -> tuple[int, int] | None:
    """Bytes of the tensors in a folder's safetensors files: in 4 bits with their scales, and not. None if it has none."""
    from safetensors import safe_open

    files, sizes = sorted(folder.glob("*.safetensors")), {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no iterator
                tensor = file.get_slice(name)
                count = 1
                for side in tensor.get_shape():
                    count *= side
                sizes[name] = count * _BYTES[tensor.get_dtype()]
    if not files:
        return None
    packed = {name.rpartition(".quant_state.")[0] for name in sizes if ".quant_state.bitsandbytes__" in name}
    in_4_bits = sum(size for name, size in sizes.items() if name in packed or _weight_of(name) in packed)
    return in_4_bits, sum(sizes.values()) - in_4_bits


_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1,
    "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip


def _weight_of(name: str) -> str:
    """The weight that a tensor of scales belongs to, such as model.layers.0.mlp.up_proj.weight of its .absmax."""
    before, found, _ = name.rpartition(".weight.")
    return f"{before}.weight" if found else ""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
