"""Check the numbers in the course's question set about QLoRA.

Each pair in `data/chats/qlora/` says, beside its messages, how each of its numbers is computed:

    {"messages": [...], "numbers": {"0.373": "32 / 64 - (8 / 64 + 32 / (64 * 256))"}}

An expression may use the functions below. A number is right if it is the expression's value, rounded to the number of
digits in the text. What the course cannot compute is `sourced`: a value and where it comes from.

    python -m data.scripts.make.qlora_numbers FILE.jsonl ...    # report every fault in these files
"""

import importlib
import inspect
import json
import math
import re
import sys
from functools import cache
from pathlib import Path

from data.scripts import DATA
from qlora_helpers.units import GB, GIB, MIB

MB = 10**6

# A number is not part of a name (NF4, 8B, T4, Llama-3.1, 4-bit, int4). Thousands are grouped by commas.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?(?![\w]|[.,]\d)(?!-(?:bit|step|token))"
NUMBER = re.compile(rf"(?<![\w.,/-])-?{_DIGITS}|(?<=\d-){_DIGITS}")
WIDTHS = re.compile(r"(?<![\d.,])\b(?:1|2|3|4|8|16|32|64) bits?\b")  # bit widths of formats are names, too


def numbers_in(text: str) -> list[str]:
    """The numbers in a text."""
    return NUMBER.findall(WIDTHS.sub("", text))


@cache
def _counts(model: str) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    from qlora_helpers.memory import known_config
    from qlora_helpers.models.meta import meta_model
    from qlora_helpers.models.weights import linear_layers

    built = meta_model(known_config(model))
    layers = tuple((layer.in_features, layer.out_features) for _, layer in linear_layers(built))
    return built.num_parameters(), sum(a * b for a, b in layers), layers


def parameters(model: str) -> int:
    """All parameters of a model that `qlora_helpers.memory.known_config` knows."""
    return _counts(model)[0]


def linear_parameters(model: str) -> int:
    """The parameters in its decoder's linear layers, which QLoRA keeps in 4 bits."""
    return _counts(model)[1]


def lora_parameters(model: str, rank: int) -> int:
    """LoRA parameters on all linear layers: rank * (in + out) each."""
    return sum(rank * (a + b) for a, b in _counts(model)[2])


def nf4_bits(double_quant: bool = True, block_size: int = 64) -> float:
    """Bits per parameter of a 4-bit weight, including its scales."""
    return 4 + (8 / block_size + 32 / (block_size * 256) if double_quant else 32 / block_size)


def qlora_bytes(model: str, double_quant: bool = True, other_bytes: int = 2) -> float:
    """Bytes of a loaded model: 4-bit linear layers with their scales, the rest at `other_bytes` per parameter."""
    linear = linear_parameters(model)
    return linear * nf4_bits(double_quant) / 8 + (parameters(model) - linear) * other_bytes


def code(name: str, index: int) -> float:
    """A value of a codebook in `qlora_helpers.quantize`, such as code("NF4", 1)."""
    from qlora_helpers import quantize

    return float(getattr(quantize, name).values[index])


def score(*keys: str) -> float:
    """A measured value in `data/tiny-llama/scores.json`, such as score("recall", "NF4", "64")."""
    value = json.loads((DATA / "tiny-llama" / "scores.json").read_text(encoding="utf-8"))
    for key in keys:
        value = value[key]
    return value


def h200(row: int, field: str) -> float:
    """A measured value in `data/measured/h200_peaks.json`, such as h200(0, "peak_allocated_bytes")."""
    return json.loads((DATA / "measured" / "h200_peaks.json").read_text(encoding="utf-8"))[row][field]


@cache
def _t4_table() -> dict:
    return json.loads((DATA / "measured" / "t4_gear.json").read_text(encoding="utf-8"))


def t4_cap() -> float:
    """The memory limit, in bytes, of the runs in `data/measured/t4_gear.json`."""
    return _t4_table()["cap_bytes"]


def t4(who: str, tokens: int, model: str = "Llama-3.1-8B") -> float:
    """Peak bytes of a run at batch 1 in `data/measured/t4_gear.json`, of the "recipe" or of "ours"."""
    wanted = {"what": "training", "model": model, "who": who, "gear": "t4", "batch_size": 1, "tokens": tokens}
    (row,) = [row for row in _t4_table()["rows"] if wanted.items() <= row.items()]
    return row["peak_allocated_bytes"]


def default(where: str, argument: str):
    """The default value of an argument in an installed library, such as default("trl.SFTConfig", "max_length")."""
    module, _, name = where.rpartition(".")
    return inspect.signature(getattr(importlib.import_module(module), name)).parameters[argument].default


def settings(name: str):
    """A default of the course's own `qlora_helpers.settings.Settings`."""
    from qlora_helpers.settings import Settings

    return getattr(Settings(), name)


def sourced(value: float, source: str) -> float:
    """A value that the course does not compute, and where it comes from."""
    if len(source) < 12:
        raise ValueError(f"source={source!r}: say where {value} stands, with the section, table or line")
    return value


NAMES = {
    f.__name__: f
    for f in (parameters, linear_parameters, lora_parameters, nf4_bits, qlora_bytes, code, score, h200, t4, t4_cap, default, settings,
              sourced, round, abs, min, max)
} | {"GIB": GIB, "GB": GB, "MIB": MIB, "MB": MB, "sqrt": math.sqrt, "log2": math.log2}  # fmt: skip


def fault_in_number(text: str, expression: str) -> str | None:
    """What is wrong with a number in a text and its expression; None if they agree."""
    try:
        value = float(eval(expression, {"__builtins__": {}}, NAMES))  # expressions of this repository's own data
    except Exception as error:
        return f"{text}: {expression!r} raises {type(error).__name__}: {error}"
    mantissa, _, exponent = text.replace(",", "").partition("e")
    scale = 10.0 ** int(exponent or 0)
    digits = len(mantissa.partition(".")[2])
    # half a unit of the last digit shown, and a little more for ties in binary
    if abs(float(mantissa) - value / scale) > 0.5 * 10**-digits + 1e-9 * abs(value / scale):
        return f"{text}: {expression!r} gives {value!r}"
    return None


def faults_in(pair: dict) -> list[str]:
    """Everything that is wrong with the numbers of a pair."""
    text = " ".join(message["content"] for message in pair["messages"])
    stated, given = set(numbers_in(text)), pair.get("numbers", {})
    faults = [f"{number} is stated without an expression" for number in sorted(stated - given.keys())]
    faults += [f"{number} has an expression and is not in the text" for number in sorted(given.keys() - stated)]
    return faults + list(
        filter(None, (fault_in_number(number, given[number]) for number in sorted(stated & given.keys())))
    )


def main() -> None:
    count = 0
    for path in sys.argv[1:]:
        for line, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            for fault in faults_in(json.loads(text)):
                count += 1
                print(f"{path}, line {line}: {fault}")
    sys.exit(f"{count} faults" if count else 0)


if __name__ == "__main__":
    main()
