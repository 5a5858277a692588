"""Measure the shipped model's scores, and write them to `data/tiny-llama/scores.json` and into its card.

    python -m data.scripts.measure.tiny_llama               # about four minutes on two cores
    python -m data.scripts.measure.tiny_llama --card-only   # write the card again from scores.json

The tests repeat these measurements from the shipped files.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from data.scripts.markdown_tables import fill
from qlora_helpers import evaluation
from qlora_helpers.chats import read_chats
from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.weights import linear_layers, quantize_dequantize, shuffle_linear_weights
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import FP4, INT3, INT4, INT4_SYMMETRIC, NF4, Codebook
from qlora_helpers.settings import Settings
from qlora_helpers.statistics import excess_kurtosis, qq_correlation
from qlora_helpers.training.run import train

CPU = detect("cpu")
FORMATS: dict[str, tuple[Codebook, bool]] = {
    "NF4": (NF4, False),
    "NF4 + double quant": (NF4, True),
    "INT4": (INT4, False),
    "INT4 symmetric": (INT4_SYMMETRIC, False),
    "FP4": (FP4, False),
    "INT3": (INT3, False),
}
BLOCK_SIZES = (64, 256)


def recall_by_format() -> dict[str, dict[str, float]]:
    """Recall of the base model in 16 bits and in each format and block size."""
    tokenizer, facts = load_tokenizer(), evaluation.read_facts(data_path("recall.jsonl"))
    model = load_model(quantization=None, hardware=CPU)
    scores = {"16 bit": {"-": evaluation.recall(model, tokenizer, facts)}}
    originals = {name: layer.weight.detach().clone() for name, layer in linear_layers(model)}
    for name, (codebook, double_quant) in FORMATS.items():
        scores[name] = {}
        for block_size in BLOCK_SIZES:
            quantize_dequantize(model, codebook, block_size, double_quant)
            scores[name][str(block_size)] = evaluation.recall(model, tokenizer, facts)
            for layer_name, layer in linear_layers(model):
                layer.weight.data.copy_(originals[layer_name])
    return scores


def fine_tuned(base: str) -> dict[str, float]:
    """Exact match and loss on the test chats before and after the course's run, on "NF4", "16 bit" or "shuffled"."""
    tokenizer = load_tokenizer()
    model = load_model(quantization="nf4" if base == "NF4" else None, hardware=CPU)
    if base == "shuffled":
        shuffle_linear_weights(model)
    settings = Settings(method="qlora" if base == "NF4" else "lora")
    test_chats = read_chats(data_path("chats", "test.jsonl"), tokenizer, settings.max_length)
    scores = {"before": evaluation.exact_match(model, tokenizer, test_chats)}
    with tempfile.TemporaryDirectory() as folder:
        chats = read_chats(data_path("chats", "train.jsonl"), tokenizer, settings.max_length)
        run = train(model, tokenizer, chats, Path(folder), settings, hardware=CPU)
    scores["after"] = evaluation.exact_match(run.model, tokenizer, test_chats)
    scores["loss after"] = evaluation.loss(run.model, tokenizer, test_chats)
    return scores | {"seconds": run.seconds}


def normality() -> dict[str, dict[str, float]]:
    """QQ correlation and excess kurtosis of each linear weight."""
    return {
        name: {"qq": qq_correlation(layer.weight.detach()), "kurtosis": excess_kurtosis(layer.weight.detach())}
        for name, layer in linear_layers(load_model(quantization=None, hardware=CPU))
    }


def measure() -> dict:
    """All scores, as they go into scores.json."""
    train_chats, test_chats = (read_chats(data_path("chats", f"{part}.jsonl")) for part in ("train", "test"))
    runs = {base: fine_tuned(base) for base in ("16 bit", "NF4", "shuffled")}
    return {
        "facts": len(evaluation.read_facts(data_path("recall.jsonl"))),
        "test_chats": len(test_chats),
        "recall": recall_by_format(),
        "commonest_answer_rate": evaluation.commonest_answer_rate(train_chats, test_chats),
        "exact_match_before": {base: run["before"] for base, run in runs.items()},
        "exact_match_after": {base: run["after"] for base, run in runs.items()},
        "loss_after": {base: round(run["loss after"], 4) for base, run in runs.items()},
        "normality": {n: {k: round(v, 4) for k, v in row.items()} for n, row in normality().items()},
    }


def card_tables(scores: dict) -> dict[str, str]:
    """The measured parts of the model card, by the name of the place for each."""

    def percent(share: float, count: int) -> str:
        return f"{share * 100:.2f} ± {evaluation.standard_error(share, count) * 100:.2f} %"

    facts, chats = scores["facts"], scores["test_chats"]
    recall = ["| format | blocks of 64 | blocks of 256 |", "|---|---|---|"]
    for name, row in scores["recall"].items():
        recall.append(
            f"| {name} | " + " | ".join(percent(score, facts) for score in row.values()) + " |" * (3 - len(row))
        )
    match = ["| base | exact match before | after | loss after (nats per answer token) |", "|---|---|---|---|"]
    for base, after in scores["exact_match_after"].items():
        before = scores["exact_match_before"][base]
        match.append(
            f"| {base} | {before * 100:.1f} % | {after * 100:.1f} ± {evaluation.standard_error(after, chats) * 100:.1f} % "
            f"| {scores['loss_after'][base]:.3f} |"
        )
    match.append(f"| none: always the commonest answer | | {scores['commonest_answer_rate'] * 100:.1f} % | |")
    rows = scores["normality"]
    odd = sorted((name for name in rows if rows[name]["kurtosis"] > 1), key=lambda name: -rows[name]["kurtosis"])
    exceptions = "".join(
        f"\n- `{n}`: QQ correlation {rows[n]['qq']:.4f}, excess kurtosis {rows[n]['kurtosis']:.2f}" for n in odd
    )
    medians = {key: statistics.median(row[key] for row in rows.values()) for key in ("qq", "kurtosis")}
    normal = (
        f"The median of the {len(rows)} linear weights has a QQ correlation of {medians['qq']:.4f} with a normal distribution and "
        f"an excess kurtosis of {medians['kurtosis']:.2f}. The exceptions, with an excess kurtosis over 1:\n{exceptions}"
    )
    return {"recall": "\n".join(recall), "match": "\n".join(match), "normality": normal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card-only", action="store_true")
    path = data_path("tiny-llama") / "scores.json"
    if not parser.parse_args().card_only:
        path.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    card = data_path("tiny-llama", "README.md")
    card.write_text(
        fill(card.read_text(encoding="utf-8"), card_tables(json.loads(path.read_text(encoding="utf-8")))),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
