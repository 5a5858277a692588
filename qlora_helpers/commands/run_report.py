"""The report of a run: what was asked before and after, put together, printed, and made into a model card."""

from __future__ import annotations

import importlib.metadata
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_helpers import evaluation
from qlora_helpers.adapters.card import model_card
from qlora_helpers.commands.command_line import command_line
from qlora_helpers.commands.run_request import Request
from qlora_helpers.hardware import Hardware, peak_memory_bytes
from qlora_helpers.json_files import write_whole
from qlora_helpers.settings import Settings
from qlora_helpers.suggestions import FirstChange, first_changes
from qlora_helpers.units import GIB

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_helpers.commands.run_data import RunData
    from qlora_helpers.evaluation import Comparison, Kept, Scores
    from qlora_helpers.memory import Prediction

__all__ = ["ask", "peak_memory", "print_report", "put_together", "reset_peak_memory", "what_to_change", "write_card"]

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
CURVE = 10  # evaluations that are printed
HARDLY = 0.9  # a training loss that has not fallen to this share of its first value has hardly fallen
WIDTH = 100  # columns of a text


def ask(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: RunData, when: str
) -> Scores | None:
    """How a model does on the chats that are asked; None if there are none.

    Args:
        when: "before training" or "after training".
    """
    if not data.asked:
        return None
    some = f" (the first of {len(data.validation):,})" if len(data.asked) < len(data.validation) else ""
    print(f"\nAsking {len(data.asked):,} questions{some} {when} …", flush=True)
    return evaluation.score(model, tokenizer, data.asked)


def reset_peak_memory() -> None:
    """Measure the peak of the GPU's memory from now on."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the questions before have left would be counted as the training's
        torch.cuda.reset_peak_memory_stats()


def peak_memory(hardware: Hardware) -> int:
    """The most memory so far, in bytes: in torch's tensors on a GPU, else of the whole process."""
    return torch.cuda.max_memory_allocated() if hardware.device == "cuda" else peak_memory_bytes()


def put_together(
    request: Request,
    data: RunData,
    settings: Settings,
    hardware: Hardware,
    prediction: Prediction | None,
    scores: Comparison | None,
    kept: Kept | None,
) -> dict[str, Any]:
    """What the report says that does not come from the training itself, as `model_card` takes it."""
    shipped = request.data is None
    return {
        "gear": hardware.gear,
        "hardware": hardware.gpu_name if hardware.device == "cuda" else f"{hardware.cores} processor cores",
        "model": request.model,
        "settings": asdict(settings),
        **data.described,
        "commonest_answer_rate": evaluation.commonest_answer_rate(data.training, data.asked) if shipped else None,
        "scores": scores and scores.as_dict(),
        "forgetting": kept and kept.as_dict(),
        "predicted_memory_bytes": prediction and prediction.peak_allocated_bytes,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write_card(report: dict[str, Any]) -> Path:
    """Write the model card into the folder of what was trained."""
    path = Path(report["adapter_path"], "README.md")
    write_whole(path, model_card(report))
    return path


def what_to_change(report: dict[str, Any], scores: Comparison | None, kept: Kept | None) -> list[FirstChange]:
    """What to change first, by what the figures of a run say went wrong; [] if they say nothing of the kind."""
    wrong = {"broken": "diverges", "forgotten": "forgets"}
    names = [wrong[kept.verdict]] if kept and kept.verdict in wrong else []
    history, training = report["validation_history"], report["loss_history"]
    fell = not history or min(loss for _, loss in history[1:]) < history[0][1]  # a run ends with an evaluation
    if not fell or (scores and scores.loss_change and scores.loss_change.mean >= -scores.loss_change.half):
        learned = training and training[-1][1] < HARDLY * training[0][1]
        names.append("overfits" if learned else "hardly learns")
    if scores and scores.after.cut_off > len(scores.after.rows) / 2:
        names.append("never ends")
    return [change for change in first_changes() if change.name in names]


def print_report(report: dict[str, Any], path: Path, scores: Comparison | None, kept: Kept | None) -> None:
    """Print the report of a run.

    Args:
        path: of the report's file.
        scores: of the questions, if some were asked.
        kept: what the model knew before, and knows now; None if it was in shards, and asked nothing.
    """
    share = report["trainable_parameters"] / report["all_parameters"]
    print(f"\ntrainable parameters  {report['trainable_parameters']:,} of {report['all_parameters']:,} ({share:.2%})\n")
    if kept is None:
        print(
            "The model was in shards, so it was asked nothing. The commands chat and ask load it with what was trained."
        )
    else:
        print(scores or "Nothing was held out, so what the model has learned was not measured: --validation 0.1")
    if (rate := report["commonest_answer_rate"]) is not None:
        print(f"\nAlways giving the commonest answer to a question's wording would match {rate:.1%}.")
    if kept is not None:
        print("\n" + "\n".join(textwrap.fill(line, WIDTH) for line in f"What else it knows: {kept}".splitlines()))
    if warning := report.get("data_warning"):
        print("\n" + textwrap.fill(f"As said before training: {warning}.", WIDTH))
    if report["validation_history"]:
        print(f"\n{_curve(report)}")
    for change in report["first_changes"]:
        text = f"{change['symptom']}: {change['change']} ({change['why']})."
        print(f"\n{textwrap.fill(f'What to change first where {text}', WIDTH)}")
    seconds, peak = report["train_seconds"], report["peak_memory_bytes"]
    gone = "not known: the run was stopped before its report"
    where = "main memory" if report["gear"] == "cpu" else "GPU memory, in torch's tensors"
    foreseen = report["predicted_memory_bytes"]
    foreseen = f" ({foreseen / GIB:.2f} GiB predicted)" if foreseen else ""
    print(f"""
training              {gone if seconds is None else f"{seconds:.0f} s of {report['total_seconds']:.0f} s in all"}
peak memory           {gone if peak is None else f"{peak / GIB:.2f} GiB of {where}{foreseen}"}
trained weights       {report["adapter_path"]}, with a model card
report                {path.as_posix()}
to talk to it         {command_line("chat", path.parent)}""")


def _curve(report: dict[str, Any]) -> str:
    """Both losses as a table, at up to so many evaluations, with the one that was kept."""
    history, training = report["validation_history"], report["loss_history"]
    stride = -(-len(history) // CURVE)
    shown = {step for step, _ in history[::stride]} | {history[-1][0], report["best_step"]}
    lines = [f"{'step':>8}{'training loss':>16}{'validation loss':>18}"]
    for step, loss in history:
        if step in shown:
            last = next((f"{value:.4f}" for at, value in reversed(training) if at <= step), "")
            lines.append(f"{step:8,}{last:>16}{loss:18.4f}{'   kept' if step == report['best_step'] else ''}")
    return "\n".join(lines)
