"""Merge an adapter into its base, in the ways people do it, and measure what each changes.

A QLoRA adapter has learned a difference to the *dequantised* 4-bit weights. There are three bases that it can be added to:

- "4bit": each weight is dequantised, the difference added, and the sum rounded to 4 bits again (PEFT's merge_and_unload);
- "dequantised": the 4-bit weights are dequantised once, and the sum is kept in 16 bits: what the run has trained, exactly;
- "16bit": the original weights, which the run never saw; the sum differs by what quantisation took away.
"""

import json
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_helpers.adapters import CONFIG, WEIGHTS, WrongBase, describe, load_adapter, same_name
from qlora_helpers.chats import Chat
from qlora_helpers.evaluation import evaluating
from qlora_helpers.files import settle, whole_folder
from qlora_helpers.hardware import Hardware
from qlora_helpers.models import SHIPPED_MODEL, load_model, name_in

BASES = ("4bit", "dequantised", "16bit")

# PEFT warns at each layer that rounding may change generations: what this module is there to measure.
_ROUNDING = "Merge lora module to 4-bit linear"


def load_base(into: str, name: str = SHIPPED_MODEL, hardware: Hardware | None = None):
    """Load one of the three bases; see the module's docstring.

    Raises:
        ValueError: `into` is none of them.
    """
    if into not in BASES:
        raise ValueError(f"into={into!r}: choose one of {', '.join(BASES)}")
    model = load_model(name, quantization=None if into == "16bit" else "nf4", hardware=hardware)
    return model.dequantize() if into == "dequantised" else model


def merge(adapter: str | Path, into: str, name: str = SHIPPED_MODEL, hardware: Hardware | None = None):
    """Load a base, add an adapter to its weights, and return the plain model.

    Args:
        adapter: its folder.
        into: "4bit", "dequantised" or "16bit".
        name: of the base, as `load_model` takes it.

    Raises:
        ValueError: `into` is none of the three; or the adapter belongs to another base (`adapters.WrongBase`).
    """
    return merge_into(load_adapter(load_base(into, name, hardware), adapter))


def merge_into(model):
    """Add the active adapter of a PEFT model to the weights below it, and return the plain model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ROUNDING)
        return model.merge_and_unload().eval()


# what a LoraConfig may switch on that makes a merge more than W + B A alpha / r
_NOT_PLAIN = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
)


def merge_files(base: str | Path, adapter: str | Path, folder: str | Path, overwrite: bool = False) -> Path:
    """Merge into the original 16-bit weights from file to file, with one weight at a time in memory.

    The base's folder is copied, and each weight that the adapter changes is overwritten in the copy. W + B A alpha / r is
    computed in float32 and rounded once to the base's own dtype. `merge(adapter, "16bit")` in the cpu gear, rounded to that
    dtype, gives the same bit for bit; a GPU adds up in another order.

    Args:
        base: the folder of the 16-bit model, with its safetensors files.
        adapter: the folder of a plain LoRA adapter.
        folder: appears in whole or not at all; one that is there is kept.

    Raises:
        FileExistsError: `folder` holds files, and `overwrite` is not set.
        FileNotFoundError: `base` has no safetensors files.
        ValueError: the adapter belongs to another base (`adapters.WrongBase`), is not plain LoRA, or changes a weight that
            the base does not have in this shape.
    """
    base, adapter = Path(base), settle(adapter)
    files, found = sorted(base.glob("*.safetensors")), describe(adapter)
    if not files:
        raise FileNotFoundError(f"base={str(base)!r} has no safetensors files: pass the folder of a 16-bit model")
    if not same_name(found.base, name_in(base)):
        raise WrongBase(f"the adapter in {adapter} was trained on {found.base!r}, and base is {name_in(base)!r}")
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    if extras := [name for name in _NOT_PLAIN if config.get(name)]:
        raise ValueError(f"adapter={str(adapter)!r} has {', '.join(extras)} set: merge it with merge() instead")
    pairs = _pairs(load_file(adapter / WEIGHTS))
    with whole_folder(folder, overwrite) as part:
        for path in sorted(base.iterdir()):
            if path.is_file():
                shutil.copyfile(path, part / path.name)
        for path in files:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key in pairs]  # noqa: SIM118 - the file cannot be iterated over
                for key in keys:
                    a, b = pairs.pop(key)
                    weight = file.get_tensor(key)
                    if weight.shape != (b.shape[0], a.shape[1]):
                        raise ValueError(
                            f"{key} has the shape {tuple(weight.shape)} in {path}, and the adapter changes another"
                        )
                    delta = (b.float() @ a.float()) * (found.alpha / found.rank)
                    _overwrite(part / path.name, key, (weight.float() + delta).to(weight.dtype))
        if pairs:
            raise ValueError(
                f"the adapter changes {len(pairs)} weights that {base} does not have, such as {min(pairs)}"
            )
    return Path(folder)


def _overwrite(path: Path, key: str, value: torch.Tensor) -> None:
    """Put new values in the place of a tensor of the same shape and dtype in a safetensors file.

    The file is the length of its header in 8 bytes, the header as JSON with the place of each tensor, and the data
    (huggingface.co/docs/safetensors, "Format").
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[key]["data_offsets"]
        data = value.contiguous().flatten().view(torch.uint8).numpy()
        if end - begin != data.nbytes:
            raise ValueError(f"{key} takes {end - begin} bytes in {path}, and its new value {data.nbytes}")
        file.seek(8 + length + begin)
        file.write(data)


def _pairs(weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """LoRA's A [rank, in] and B [out, rank] by the name of the weight that they change."""
    return {
        key.removeprefix("base_model.model.").replace(".lora_A.", "."): (
            a,
            weights[key.replace(".lora_A.", ".lora_B.")],
        )
        for key, a in weights.items()
        if ".lora_A." in key
    }


@dataclass(frozen=True)
class Drift:
    """How far the logits of one model lie from those of another, over all tokens of some chats.

    Attributes:
        largest, mean: of the absolute differences. Logits are what the softmax takes, so 1 is a factor of e.
        same_choice: the share of tokens for which both find the same next token the most likely.
    """

    largest: float
    mean: float
    same_choice: float


def logits(model, tokenizer, chats: list[Chat]) -> torch.Tensor:
    """The logits of every token of the chats, in float32 on the CPU: [tokens, vocabulary]."""
    encoded = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt").to(model.device)
    with evaluating(model):
        found = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    return found[encoded["attention_mask"].bool()].float().cpu()


def drift(found: torch.Tensor, wanted: torch.Tensor) -> Drift:
    """Compare two models' logits of the same tokens.

    Raises:
        ValueError: the shapes differ, so the tokens or the vocabularies do.
    """
    if found.shape != wanted.shape:
        raise ValueError(
            f"found has the shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}: compare the same tokens"
        )
    difference = (found - wanted).abs()
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return Drift(difference.max().item(), difference.mean().item(), same.item())


def seconds_per_token(model, tokenizer, question: Chat, tokens: int = 32) -> float:
    """Seconds for each new token of one greedy answer of exactly so many tokens, after a first answer to warm up."""
    encoded = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)

    def generate(count: int) -> float:
        started = time.perf_counter()
        with evaluating(model):
            model.generate(
                **encoded,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    generate(2)
    return generate(tokens) / tokens
