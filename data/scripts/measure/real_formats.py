"""What each 4-bit format costs a real language model: its loss on text written for this course, format by format.

    python -m qlora_helpers fetch smollm2-135m               # the model, once
    python -m data.scripts.measure.real_formats              # the rows missing from data/measured/real_formats.json
    python -m data.scripts.measure.real_formats --row NF4    # one row, printed and not written
    python -m data.scripts.measure.real_formats --list       # the names of the rows

The model is SmolLM2-135M-Instruct. The text is data/chats/qlora/test.jsonl, questions and answers about QLoRA that were
written for this course and are younger than the model, one after the other, in 14 pieces of
256 tokens. Each row decodes the
linear weights from one format into a float32 model:

- `cost`: its loss minus that of the weights as they were fetched, on the same tokens, in nats per token; and its standard
  error, over the pieces (`qlora_helpers.statistics.ratio`); `costs` are those of the pieces;
- `weight_error`: the root of the squared error of all linear weights over that of their squares;
- `output_errors`: the same of what a layer puts out, for the inputs that it has in the model as it was fetched (those of the
  first four pieces), as the mean over the layers of a kind. The squared error of all outputs of a weight W is the trace of
  E G E', with E the error of W and G the sum of x x' over the inputs x;
- `loudest_errors`: the error of the weights of each layer's loudest input, the one with the largest squares, beside these
  weights. Where it is above 1, nothing would be better than what the format makes of them.

The table is continued only with the same weights: `source` says where they are from. Those of the package index were rounded
to Q4_1 before (16 values between the smallest and the largest of 32), so the costs are those of rounding a rounded model
once more. Where a Hub is reached, fetch gets the 16-bit weights as they were published; measure these into another --table.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from data.scripts import ROOT
from data.scripts.measure.real_model import MODEL, fill, head_of
from qlora_helpers.chats import read_chats
from qlora_helpers.evaluation.losses import losses_of
from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.weights import linear_layers, shuffle_linear_weights
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import FP4, INT3, INT4, INT4_SYMMETRIC, NF4, Codebook, dequantize, quantize
from qlora_helpers.statistics import ratio

TABLE = ROOT / "data" / "measured" / "real_formats.json"
TEXT = ("chats", "qlora", "test.jsonl")
PIECE, PIECES = 256, 14  # tokens of a piece, and how many pieces
WATCHED = 4  # pieces whose inputs to the layers are added up
SHUFFLED = "weights shuffled"
SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Format:
    """A codebook and how it is used."""

    codebook: Codebook
    block_size: int = 64
    double_quant: bool = False

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight rounded to the format and decoded."""
        return dequantize(quantize(weight, self.codebook, self.block_size, self.double_quant))


FORMATS = {
    "NF4": Format(NF4),
    "NF4, double quantisation": Format(NF4, double_quant=True),
    "NF4, blocks of 32": Format(NF4, block_size=32),
    "FP4": Format(FP4),
    "INT4, 15 levels with a zero": Format(INT4_SYMMETRIC),
    "INT4, 16 levels without a zero": Format(INT4),
    "INT3, 8 levels": Format(INT3),
}
# what is the matter with 16 levels: each differs in one thing from one of the formats above
WITH_A_ZERO = Format(Codebook("INT4 and a zero", 5, torch.cat([INT4.values, torch.zeros(1)]).sort().values))
WHY = {
    "16 levels, and a zero between them": WITH_A_ZERO,
    "16 levels, a zero in v_proj": {"v_proj": WITH_A_ZERO, "": FORMATS["INT4, 16 levels without a zero"]},
}
ROWS = [*FORMATS, SHUFFLED, *WHY]


def decoded(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All weights rounded to a format, or each to that of the end of its layer's name."""
    formats = (FORMATS | WHY)[name]
    formats = formats if isinstance(formats, dict) else {"": formats}
    return {
        layer: next(of for end, of in formats.items() if layer.endswith(end))(weight)
        for layer, weight in weights.items()
    }


def pieces(tokenizer) -> list[dict[str, list[int]]]:
    """The text as rows of tokens, all of which count but each first one."""
    chats = read_chats(data_path(*TEXT))
    text = "\n\n".join("\n".join(message["content"] for message in chat) for chat in chats)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [ids[start : start + PIECE] for start in range(0, PIECES * PIECE, PIECE)]
    return [{"input_ids": row, "assistant_masks": [1] * len(row)} for row in rows]


class Reference:
    """The model as it was fetched: its weights, its losses, and what goes into its layers."""

    def __init__(self, name: str, most: int = PIECES) -> None:
        self.tokenizer = load_tokenizer(name)
        self.model = load_model(name, quantization=None, hardware=detect("cpu"))
        self.layers = dict(linear_layers(self.model))
        self.weights = {layer: module.weight.detach().clone() for layer, module in self.layers.items()}
        self.inputs: dict[str, torch.Tensor] = {}  # the sum of x x' over the inputs of each layer
        self.pieces = pieces(self.tokenizer)[:most]
        with self._watched():
            self.losses = self._losses(self.pieces[:WATCHED])
        self.losses += self._losses(self.pieces[WATCHED:])
        self.outputs = {  # the sum of the squared outputs
            layer: ((weight @ self.inputs[layer]) * weight).sum().item() for layer, weight in self.weights.items()
        }

    @contextmanager
    def _watched(self) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(partial(self._watch, layer)) for layer, module in self.layers.items()]
        yield
        for hook in hooks:
            hook.remove()

    def _watch(self, layer: str, _, inputs: tuple) -> None:
        above, _, kind = layer.rpartition(".")
        if same := SAME_INPUTS.get(kind):
            self.inputs[layer] = self.inputs[f"{above}.{same}"]
        else:
            flat = inputs[0].detach().flatten(0, -2)
            self.inputs[layer] = self.inputs.get(layer, 0) + flat.T @ flat

    def _losses(self, some: list[dict]) -> list[float]:
        """The mean loss of each piece; all have the same number of tokens that count."""
        return [total / count for total, count in losses_of(self.model, self.tokenizer, some, batch_size=4)]

    @torch.no_grad()
    def put(self, decoded: dict[str, torch.Tensor]) -> None:
        for layer, weight in decoded.items():
            self.layers[layer].weight.copy_(weight)

    def costs(self) -> list[float]:
        """By how much the loss of the model as it is now is higher, piece by piece."""
        now = self._losses(self.pieces)
        return [one - other for one, other in zip(now, self.losses, strict=True)]


def errors(reference: Reference, now: dict[str, torch.Tensor]) -> dict:
    """The errors of decoded weights, and of the outputs that they give."""
    squares = ones = 0.0
    outputs, loudest = defaultdict(list), defaultdict(list)
    for layer, weight in reference.weights.items():
        error, inputs, kind = now[layer] - weight, reference.inputs[layer], layer.rpartition(".")[2]
        squares, ones = squares + error.pow(2).sum().item(), ones + weight.pow(2).sum().item()
        outputs[kind].append((((error @ inputs) * error).sum().item() / reference.outputs[layer]) ** 0.5)
        loud = inputs.diagonal().argmax()
        loudest[kind].append((error[:, loud].norm() / weight[:, loud].norm()).item())
    return {
        "weight_error": round((squares / ones) ** 0.5, 5),
        "output_errors": {kind: round(fmean(of), 5) for kind, of in outputs.items()},
        "loudest_errors": {kind: round(fmean(of), 5) for kind, of in loudest.items()},
    }


def measure(name: str, reference: Reference) -> dict:
    """One row; the model has its own weights again afterwards."""
    started, processor_time = time.perf_counter(), time.process_time()
    if name == SHUFFLED:
        shuffle_linear_weights(reference.model)
        now = {layer: module.weight.detach().clone() for layer, module in reference.layers.items()}
    else:
        now = decoded(name, reference.weights)
        reference.put(now)
    costs = reference.costs()
    reference.put(reference.weights)
    found = ratio(costs, [1] * len(costs))
    return {
        "name": name,
        "cost": [round(found.mean, 5), round(found.standard_error, 5)],
        **errors(reference, now),
        "costs": [round(cost, 5) for cost in costs],
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - processor_time, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, metavar="NAME", help="only this row, printed and not written")
    parser.add_argument("--pieces", type=int, default=PIECES, help="with --row: only so many pieces of the text")
    parser.add_argument("--model", default=MODEL, help="a name or a folder")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    args = parser.parse_args()
    if args.list:
        print("\n".join(ROWS))
        return
    reference = Reference(args.model, args.pieces if args.row else PIECES)
    if args.row:
        print(measure(args.row, reference))
        return
    head = head_of("python -m data.scripts.measure.real_formats", args.model) | {
        "text": "/".join(("data", *TEXT)),
        "pieces": len(reference.pieces),
        "tokens": len(reference.pieces) * (PIECE - 1),
        "loss": round(sum(reference.losses) / len(reference.losses), 5),
    }
    fill(args.table, head, ROWS, lambda name, rows: measure(name, reference))


if __name__ == "__main__":
    main()
