"""LoRA's variants on a 4-bit base: what each starts from, and where a short run takes it, each at its own learning rate.

    python -m data.scripts.measure.variants --workers 16          # all runs; 0.5 hours of training on one core
    python -m data.scripts.measure.variants --missing             # only runs that are not in the table yet
    python -m data.scripts.measure.variants --row DoRA --rate 0.0015 --seed 3   # one of them, printed

Every run is 200 steps of 8 chats with the shipped model in NF4 with double quantisation, rank 16 on all linear layers, in
float32 on one thread of a CPU. PEFT's own variants are asked for by their option of `LoraConfig`. PEFT refuses PiSSA on a
4-bit base, and its LoftQ needs a GPU. These, and EVA, are made here from their definitions, with the course's quantiser:

- EVA (Paischer et al., arXiv 2410.07170): A is the directions in which a layer's inputs vary most. PEFT's own looks for them
  batch by batch until they turn no more, and on these chats it had not ended after 1,400 of them; here they are those of
  512 chats, at the tokens of the answers;
- PiSSA (Meng et al., arXiv 2404.02948): A and B are the weight's r largest principal components, and the base is what is
  left of the weight, rounded to 4 bits;
- LoftQ (Li et al., arXiv 2310.08659): in turns, the base is the weight less the adapter, rounded; and A and B are the r
  largest principal components of what rounding has lost.

The last two need the weights in 16 bits, and change the base, to which their adapters then belong. So does PEFT's OLoRA.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from data.scripts import ROOT
from data.scripts.measure.held_out import exact_match
from data.scripts.measure.runs_at_rates import Job, command_line, jobs_of

if TYPE_CHECKING:
    import torch

TABLE = ROOT / "data" / "measured" / "variants.json"
BUDGET = {"steps": 200, "batch_size": 8, "warmup_steps": 10}
SEEDS = 5
EVA_CHATS = 512  # whose tokens tell the directions of EVA
USUAL, LOWER = (7e-4, 1e-3, 1.5e-3, 3e-3), (2e-4, 4e-4, 8e-4, 1.5e-3)
# The options of `LoraConfig`, and the rates that are tried. rsLoRA scales by alpha over the root of the rank, here 4 times
# as much; where B does not begin at 0, A and B begin large, and the same rate turns them less.
OF_PEFT = {
    "default": ({}, USUAL),
    "rsLoRA": ({"use_rslora": True}, LOWER),
    "DoRA": ({"use_dora": True}, USUAL),
    "OLoRA": ({"init_lora_weights": "olora"}, LOWER),
}
LOFTQ = {"LoftQ, 1 iteration": 1, "LoftQ, 5 iterations": 5}
PISSA, EVA = "PiSSA", "EVA"
RATES = (
    {kind: rates for kind, (_, rates) in OF_PEFT.items()}
    | {EVA: (2e-4, 4e-4, *USUAL)}
    | dict.fromkeys(LOFTQ, USUAL)
    | {PISSA: LOWER}
)
JOBS = jobs_of(RATES, dict.fromkeys(RATES, SEEDS))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight in NF4 with double quantisation, decoded."""
    from qlora_helpers.quantize import NF4, dequantize, quantize

    return dequantize(quantize(weight, NF4, 64, double_quant=True))


def principal(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A, [rank, in_features], and B, [out_features, rank]: scaling · B A is the best approximation of this rank."""
    import torch

    U, S, V = torch.linalg.svd(weight, False)  # not the full matrices
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def pissa(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the base is made from, before it is rounded; A and B."""
    A, B = principal(weight, rank, scaling)
    return weight - scaling * B @ A, A, B


def loftq(
    weight: torch.Tensor, rank: int, scaling: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the base is made from, before it is rounded; A and B. With one iteration that is the weight itself."""
    residual = weight
    A, B = principal(weight - rounded(residual), rank, scaling)
    for _ in range(iterations - 1):
        residual = weight - scaling * B @ A
        A, B = principal(weight - rounded(residual), rank, scaling)
    return residual, A, B


def start_from(model, kind: str, originals: dict[str, torch.Tensor]) -> None:
    """Give each adapted layer the base, A and B of LoftQ or PiSSA.

    Args:
        originals: the weights in 16 bits of the layers, by name.
    """
    import bitsandbytes as bnb
    import torch
    from peft.tuners.lora.bnb import Linear4bit

    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        [adapter], original = layer.active_adapters, originals[name]
        rank, scaling = layer.r[adapter], layer.scaling[adapter]
        if kind == PISSA:
            residual, A, B = pissa(original, rank, scaling)
        else:
            residual, A, B = loftq(original, rank, scaling, LOFTQ[kind])
        old = layer.base_layer.weight
        layer.base_layer.weight = bnb.nn.Params4bit(
            residual.contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
        ).to(old.device)
        with torch.no_grad():
            layer.lora_A[adapter].weight.copy_(A)
            layer.lora_B[adapter].weight.copy_(B)


def error_at_the_start(model, originals: dict[str, torch.Tensor]) -> float:
    """How far W4 + s·B·A is from the weights in 16 bits: the norm of the differences over that of the weights."""
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit

    lost = whole = 0.0
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, Linear4bit):
            [adapter], weight = layer.active_adapters, layer.base_layer.weight
            decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            start = decoded + layer.get_delta_weight(adapter).detach()
            lost += (originals[name] - start).square().sum().item()
            whole += originals[name].square().sum().item()
    return (lost / whole) ** 0.5


def lora_config(kind: str, settings):
    """The config of PEFT for a kind of run."""
    from peft import LoraConfig

    options = OF_PEFT[kind][0] if kind in OF_PEFT else {}
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )


def eva(model, batches) -> None:
    """Let each A begin with the directions in which the layer's inputs vary most, at the tokens that are learnt; B stays 0.

    Args:
        batches: of the trainer, with "labels".
    """
    import torch
    from peft.tuners.lora.bnb import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    sums: dict = {layer: 0.0 for layer in layers}
    products, marked = dict(sums), []  # products: [in_features, in_features]; marked: which tokens, a list of one

    def keep(layer, args):
        inputs = args[0].detach()[marked[0]]  # [tokens, in_features]
        sums[layer] = sums[layer] + inputs.sum(0)
        products[layer] = products[layer] + inputs.T @ inputs

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            marked[:] = [batch["labels"] != -100]
            tokens += int(marked[0].sum())
            model.get_base_model().model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for hook in hooks:
            hook.remove()
        for layer in layers:
            [adapter] = layer.active_adapters
            mean = sums[layer] / tokens
            spread = products[layer] / tokens - torch.outer(mean, mean)
            most = torch.linalg.eigh(spread).eigenvectors.flip(1)[:, : layer.r[adapter]]
            layer.lora_A[adapter].weight.copy_(most.T)


def settings_of(job: Job):
    from qlora_helpers.settings import Settings

    return Settings(**BUDGET, learning_rate=job.rate, seed=job.seed)


def measure(job: Job) -> dict:
    """Make one run, and score it before and after."""
    from torch.utils.data import DataLoader

    from data.scripts.measure.held_out import score, training_validation_test
    from qlora_helpers import evaluation
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.models.weights import linear_layers
    from qlora_helpers.paths import data_path
    from qlora_helpers.training import run as running
    from qlora_helpers.training import trainer as trainers
    from qlora_helpers.training.callbacks import TrainingDiverged

    cpu, tokenizer, settings = detect("cpu"), load_tokenizer(), settings_of(job)
    training, validation, test = training_validation_test(tokenizer, settings.max_length)
    facts = evaluation.read_facts(data_path("recall.jsonl"))
    in_16_bits = load_model(quantization=None, hardware=cpu)
    originals = {name: layer.weight.detach() for name, layer in linear_layers(in_16_bits)}
    result: dict = {"kind": job.kind, "learning_rate": job.rate, "seed": job.seed}

    def build_trainer(*args, **kwargs):
        trainer = trainers.build_trainer(*args, **kwargs)
        if job.kind == EVA:
            rows = trainer.train_dataset.select(range(min(EVA_CHATS, len(trainer.train_dataset))))
            eva(trainer.model, DataLoader(rows, 64, collate_fn=trainer.data_collator))
        elif job.kind not in OF_PEFT:
            start_from(trainer.model, job.kind, originals)
        result["error_at_the_start"] = round(error_at_the_start(trainer.model, originals), 5)
        result["recall_before"] = evaluation.recall(trainer.model, tokenizer, facts)
        return trainer

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(trainers, "_lora", lambda settings: lora_config(job.kind, settings)),
        patch.object(running, "build_trainer", build_trainer),
    ):
        model = load_model(hardware=cpu)
        try:
            run = running.train(model, tokenizer, training, Path(folder) / "run", settings, hardware=cpu)
        except TrainingDiverged as error:
            lost = {"exact_match": 0.0, "loss": None}  # a rate that diverges is not chosen
            return result | {"outcome": f"diverged: {error}", "validation": lost, "test": lost}
    return result | {
        "outcome": "ran",
        "trained_parameters": run.trainable_parameters,
        "validation": score(run.model, tokenizer, validation),
        "test": score(run.model, tokenizer, test),
        "recall": evaluation.recall(run.model, tokenizer, facts),
        "seconds_per_step": round(run.seconds / settings.steps, 4),
    }


if __name__ == "__main__":
    command_line(__doc__, JOBS, measure, TABLE, {"budget": BUDGET}, score=exact_match)
