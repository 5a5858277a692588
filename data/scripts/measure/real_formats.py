"""What each 4-bit format costs a real language model: its loss on text written for this course, format by format.

    python -m qlora_helpers fetch smollm2-135m               # the model, once
    python -m data.scripts.measure.real_formats              # the rows missing from data/measured/real_formats.json
    python -m data.scripts.measure.real_formats --row NF4    # one row, printed and not written
    python -m data.scripts.measure.real_formats --list       # the names of the rows

The model is SmolLM2-135M-Instruct, the text the answers of data/chats/qlora/test.jsonl, which were written for this course and
are younger than the model. Each row decodes the linear weights from one format into a float32 model. `cost` is the
difference of its loss to that of the weights as they were fetched, token by token on the same text, in nats per token; its
error is a standard error over the texts. `weight_error` is the root of the squared error of all linear weights over that of
their squares, `output_error` the same of what the layers put out (their error on the inputs that they get in the unquantised
model; the mean over the layers), and `gain` is by how much the decoded weights are longer along the original ones.

A table is continued only with the same weights: `source` says where they are from. Those of the package index were rounded
to Q4_1 before (16 values between the smallest and the largest of 32), so there the costs are those of rounding a rounded
model once more. Where a Hub is reached, `--model HuggingFaceTB/SmolLM2-135M-Instruct --table OTHER.json` measures the 16-bit
weights as they were published.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from data.scripts import ROOT
from data.scripts.measure.commands import processor
from qlora_helpers.chats import read_chats
from qlora_helpers.evaluation.losses import losses_of
from qlora_helpers.hardware import detect
from qlora_helpers.json_files import write_json
from qlora_helpers.models.loading import folder_of, load_model, load_tokenizer
from qlora_helpers.models.weights import linear_layers, shuffle_linear_weights
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import FP4, INT3, INT4, INT4_SYMMETRIC, NF4, Codebook, dequantize, quantize
from qlora_helpers.statistics import ratio

TABLE = ROOT / "data" / "measured" / "real_formats.json"
MODEL = "smollm2-135m"
TEXT = ("chats", "qlora", "test.jsonl")
SHUFFLED = "weights shuffled"


@dataclass(frozen=True)
class Format:
    """A codebook and how it is used; None for the weights as they are."""

    codebook: Codebook | None
    block_size: int = 64
    double_quant: bool = False


def _levels(name: str, values: torch.Tensor) -> Format:
    return Format(Codebook(name, 4 if len(values) <= 16 else 5, values))


FORMATS = {
    "NF4": Format(NF4),
    "NF4, double quantisation": Format(NF4, double_quant=True),
    "NF4, blocks of 32": Format(NF4, block_size=32),
    "FP4": Format(FP4),
    "INT4 symmetric, 15 levels": Format(INT4_SYMMETRIC),
    "INT4, 16 levels without a zero": Format(INT4),
    "INT3": Format(INT3),
}
# what is the matter with 16 levels: each differs from one of the rows above in one thing
WHY = {
    "14 levels without a zero": _levels("14", torch.linspace(-1, 1, 14)),
    "17 levels with a zero": _levels("17", torch.linspace(-1, 1, 17)),
    "16 levels, and a zero between them": _levels("16 + 0", torch.cat([INT4.values, torch.zeros(1)]).sort().values),
    "16 levels from -8 to 7": _levels("-8 to 7", torch.arange(-8, 8) / 8),
}
ROWS = [*FORMATS, *WHY, SHUFFLED]


def texts(tokenizer) -> list[dict[str, list[int]]]:
    """The answers as rows of tokens, all of which but the first count."""
    answers = [chat[-1]["content"] for chat in read_chats(data_path(*TEXT))]
    rows = tokenizer(answers, add_special_tokens=False)["input_ids"]
    return [{"input_ids": row, "assistant_masks": [1] * len(row)} for row in rows]
