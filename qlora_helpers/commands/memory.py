"""`python -m qlora_helpers memory`: will it fit, what takes the memory, and what helps."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import replace
from itertools import groupby
from typing import TextIO

from qlora_helpers.commands.settings_options import add_settings, given
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.budget import CHOSEN, budget_bytes, plan_for
from qlora_helpers.memory.catalogue import find_shape, known_models, known_sizes, longest_stated
from qlora_helpers.memory.gpus import GPU, find_gpu, known_gpus
from qlora_helpers.memory.ladder import Change, cures
from qlora_helpers.memory.loaded import weights_by_part
from qlora_helpers.memory.names import Name
from qlora_helpers.memory.prediction import Prediction, predict
from qlora_helpers.memory.search import largest_batch, longest_sequence
from qlora_helpers.memory.several import CheapSet, cheapest_sets, several_gpus
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.settings import GPU_RUN, MEMORY_SETTINGS, Settings
from qlora_helpers.units import GIB, MIB

__all__ = ["add_arguments", "as_dict", "as_text", "command", "cures_as_dicts", "what_helps"]

WIDTH, BAR = 100, 60  # characters
NAMED = 4  # cards of a size that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", nargs="?", help="a Hub name or address, a model's folder or its config.json")
    parser.add_argument(
        "--gpu",
        default="t4",
        help="a card's name, such as t4, 'RTX 3060 12GB', colab, or its memory, such as 16GiB (default: %(default)s)",
    )
    add_settings(parser, (*MEMORY_SETTINGS, "memory_budget"), GPU_RUN)
    parser.add_argument(
        "--cheapest",
        action="store_true",
        help="also list the smallest GPUs, 1 to 8 of them, with which the run fits, the least memory together first",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; sizes in bytes")
    parser.add_argument("--list", action="store_true", help="print the known models and GPUs")


def command(args: argparse.Namespace) -> int:
    """Print the report: 0 if the run fits, 1 if it does not.

    Raises:
        ValueError: names the field of `Settings`, its value, and what is allowed.
        FileNotFoundError: there is no such config.json.
    """
    if args.list or not args.model:
        _print_known(args.json)
        return 0
    gpu, shape = find_gpu(args.gpu), find_shape(args.model)
    if isinstance(shape, AnyShape):
        _say(
            f"{shape.model_type} is not written out here: the libraries run a step of it on tensors without values ..."
        )
    longest = min(GPU_RUN.max_length, shape.max_position_embeddings or GPU_RUN.max_length)
    named = {"max_length": longest} | given(args)
    if isinstance(gpus := named.get("num_gpus"), int) and gpus > 1:
        named = {"batch_size": gpus} | named  # one sequence on each
    if named.get("memory_budget") is not None:
        named = _planned(shape, named, gpu, sys.stderr if args.json else sys.stdout)
    prediction = _predicted(shape, named, gpu)
    if prediction.road == "libraries":
        helps = "" if prediction.fits else ", and what helps"
        _say(f"and again and again for the largest batch, the longest sequence{helps} ...")
    found = as_dict(prediction)
    if args.cheapest:
        # without what was filled in for this GPU
        asked = replace(GPU_RUN, **named | {"dropout": prediction.settings.dropout})
        found["cheapest_sets"] = [_set_as_dict(one) for one in cheapest_sets(shape, asked)]
    print(json.dumps(found, indent=1) if args.json else as_text(prediction, found))
    return 0 if prediction.fits else 1


def _planned(shape: ModelShape | AnyShape, named: dict, gpu: GPU, where: TextIO) -> dict:
    """The settings with those that a memory budget chooses. What was chosen, and what else there was, is printed."""
    settings = replace(GPU_RUN, **named)
    _say("looking for the fastest run that fits into the budget ...")
    plan = plan_for(shape, settings, gpu, budget_bytes(settings, gpu, gpu.usable_bytes))
    print(plan, end="\n\n", file=where, flush=True)
    return {name: getattr(plan.chosen.settings, name) for name in named.keys() | set(CHOSEN)}


def _say(what: str) -> None:
    """Say what takes a while, beside the report."""
    print(what, file=sys.stderr, flush=True)


def _predicted(shape: ModelShape | AnyShape, named: dict, gpu: GPU) -> Prediction:
    """The prediction of the run that is asked for; without dropout where PEFT has none and none was asked for."""
    settings = replace(GPU_RUN, **named)
    try:
        return predict(shape, settings, gpu)
    except ValueError as error:
        if "dropout" in named or "lora_dropout" not in str(error):
            raise
    prediction = predict(shape, replace(settings, dropout=0.0), gpu)
    note = "PEFT adapts its experts, too, and those only without dropout: dropout 0 is assumed"
    return replace(prediction, shape=replace(shape, assumed=(*shape.assumed, note)))


def _four_bits(prediction: Prediction) -> dict | None:
    """What of a QLoRA run's weights is really in 4 bits, and why the rest is not; None for other methods."""
    if prediction.settings.method != "qlora":
        return None
    parts, shape = prediction.parts, prediction.shape
    if isinstance(shape, ModelShape):  # of the model, whatever a GPU has of it
        parts = weights_by_part(shape, prediction.settings)
    inside = parts["4-bit weights"] + parts["quantisation constants"]
    found = {"in_4_bits": inside, "in_16_bits": parts["16-bit weights"], "if_all_were": None, "mostly": True, "why": ""}
    if isinstance(shape, ModelShape):
        return found | {"why": "embeddings, output head and norms stay as they are"}
    from qlora_helpers.models.in_4_bits import planned_4_bits  # only here: it takes seconds to import

    plan = planned_4_bits(
        shape.config_of_a_load, double_quant=prediction.settings.double_quant,
        compute_dtype=prediction.settings.compute_dtype, name=shape.name,
    )  # fmt: skip
    kind, why, size = plan.largest_in_full
    if not size:
        return found | {
            "if_all_were": plan.bytes_if_in_4_bits,
            "why": "embeddings, output head and norms stay as they are",
        }
    why = f"{kind}, {_amount(size)}: {why}"
    return found | {"if_all_were": plan.bytes_if_in_4_bits, "mostly": plan.is_mostly_4_bit, "why": why}


def _of_memory(settings: Settings) -> dict:
    return {name: getattr(settings, name) for name in MEMORY_SETTINGS}


def as_dict(prediction: Prediction) -> dict:
    """A prediction with all that follows from it, in a form that JSON can hold: sizes in bytes, as whole numbers."""
    shape, settings, gpu = prediction.shape, prediction.settings, prediction.gpu
    return {
        "model": shape.name,
        "assumed": list(shape.assumed),
        "parameters": shape.parameters,
        "trainable_parameters": prediction.trainable_parameters,
        "gpu": gpu.name,
        "compute_capability": list(gpu.compute_capability),
        "notes": _notes(shape, settings, gpu),
        "settings": _of_memory(settings),
        "road": prediction.road,
        "why_all": prediction.why_all,
        "weights": _four_bits(prediction),
        "parts": prediction.parts,
        "phases": prediction.phases,
        "peak_phase": prediction.peak_phase,
        "loaded_bytes": prediction.loaded_bytes,
        "peak_allocated_bytes": prediction.peak_allocated_bytes,
        "peak_reserved_bytes": prediction.peak_reserved_bytes,
        "device_bytes": prediction.device_bytes,
        "usable_bytes": gpu.usable_bytes,
        "usable_is_estimated": gpu.nominal,
        "context_was_measured": gpu.context_measured,
        "spare_bytes": prediction.spare_bytes,
        "fits": prediction.fits,
        "largest_batch": largest_batch(shape, settings, gpu),
        "longest_sequence": longest_sequence(shape, settings, gpu),
        "max_position_embeddings": shape.max_position_embeddings,
        "host_bytes_to_load": prediction.host_bytes_to_load,
        "host_bytes_of_run": prediction.host_bytes_of_run,
        "host_parts": prediction.host_parts,
        "disk_bytes": prediction.disk_bytes,
        "cures": cures_as_dicts(shape, settings, gpu),
        "several_gpus": [_change_as_dict(change) for change in several_gpus(shape, settings, gpu)],
    }


def cures_as_dicts(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> list[dict]:
    """The cheapest changes that make a run fit, in a form that JSON can hold."""
    return [_change_as_dict(change) for change in cures(shape, settings, gpu)]


def _change_as_dict(change: Change) -> dict:
    return {
        "what": change.what,
        "price": change.price,
        "steps": change.steps,
        "settings": change.settings and _of_memory(change.settings),
        "device_bytes": change.prediction.device_bytes,
        "spare_bytes": change.prediction.spare_bytes,
    }


def _set_as_dict(one: CheapSet) -> dict:
    return {
        "what": str(one),
        "total_gib": one.total_gib,
        "nominal_gib": one.nominal_gib,
        "gpus": list(one.gpus),
        "settings": _of_memory(one.settings),
        "device_bytes": one.prediction.device_bytes,
        "host_bytes_of_run": one.prediction.host_bytes_of_run,
    }


def _amount(size: int) -> str:
    """Bytes in words; small ones in MiB, so that they do not read 0.0."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / GIB:6.2f} GiB"


def _described(settings: Settings) -> str:
    words = [f"batch {settings.batch_size:,} x {settings.max_length:,} tokens"]
    if settings.num_gpus > 1:
        words[0] += f" on {settings.num_gpus:,} GPUs"
    if settings.sharding:
        words.append("split with FSDP" + (", its shards in main memory" if settings.cpu_offload else ""))
    words.append(settings.compute_dtype)
    if settings.method != "full":
        targets = (
            settings.target_modules if isinstance(settings.target_modules, str) else "+".join(settings.target_modules)
        )
        words.append(f"rank {settings.rank} on {targets}")
        if settings.adapter_dtype != "float32":
            words.append(f"adapters in {settings.adapter_dtype}")
        if not settings.dropout:
            words.append("no dropout")
        if settings.upcast_fp32:
            words.append("upcast to float32")
    words.append(settings.optimizer)
    if not settings.gradient_checkpointing:
        words.append("no checkpointing")
    if settings.method == "qlora" and not settings.double_quant:
        words.append("no double quantisation")
    if settings.accumulation > 1:
        words.append(f"{settings.accumulation:,} steps of accumulation")
    if settings.checkpointed_layers is not None:
        words.append(f"the first {settings.checkpointed_layers:,} layers checkpointed")
    if settings.activation_offloading:
        words.append("checkpoints in main memory")
    for name, word in (
        ("packing", "packed rows"),
        ("compile_layers", "compiled layers"),
        ("liger_layers", "liger's layers"),
    ):
        if getattr(settings, name):
            words.append(word)
    if settings.logits != "tiled":
        words.append("whole logits")
    if settings.eval_batch_size is not None:
        words.append(f"evaluations at batch {settings.eval_batch_size:,}")
    if settings.attention != "sdpa":
        words.append(f"{settings.attention} attention")
    return f"{settings.method}: {', '.join(words)}"


def _notes(shape: ModelShape | AnyShape, settings: Settings, gpu: GPU) -> list[str]:
    """What a reader should know before trusting the figures."""
    notes = list(gpu.notes)
    shared = shape.num_key_value_heads != shape.num_attention_heads and not shape.eager_only
    if settings.attention == "sdpa" and shared and gpu.compute_capability < (8, 0):
        notes.append(
            "this is with the course's attention (qlora_helpers.models.attention). transformers' own sdpa falls back to the math "
            "kernel on this card: --attention math"
        )
    if settings.num_gpus > 1 or settings.sharding:
        notes.append(
            "what several GPUs and FSDP take is derived from the libraries' code (qlora_helpers.memory.sharding). It was "
            "measured on two H200s (data/measured/several_gpus.json), and not on one or on more; NCCL's share is assumed"
        )
    if settings.cpu_offload:
        notes.append(
            "torch's allocator reserves more here than its tensors need, for streams that share nothing; the sum on the card "
            "counts all of it, with what is predicted too high"
        )
    trained = settings.compute_dtype if settings.method == "full" else settings.adapter_dtype
    if settings.compute_dtype == "float16" and trained != "float32":
        notes.append(f"torch's loss scaling refuses to train weights in {trained}: such a run stops at its first step")
    return notes


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def as_text(prediction: Prediction, found: dict) -> str:
    """The report as plain text, 100 characters wide.

    Args:
        prediction: of the run.
        found: what `as_dict` gives for it.
    """
    shape, settings, gpu = prediction.shape, prediction.settings, prediction.gpu
    of = f"{prediction.trainable_parameters:,} of {shape.parameters:,} parameters trained"
    lines = [_wrapped(f"{shape.name}: {of}"), _wrapped(_described(settings), rest="  ")]
    notes = [*shape.assumed, *_notes(shape, settings, gpu)]
    if prediction.why_all:
        notes.append(f"all its layers were run, since it cannot do with a few of each kind: {prediction.why_all}")
    lines += [_wrapped(note, "note: ", "  ") for note in notes] + [""]

    parts = {name: size for name, size in prediction.parts.items() if size}
    largest = max(parts.values())
    lines.append(f"{'part':26}       GiB")
    for name, size in parts.items():
        bar = "#" * max(1, round(BAR * size / largest))
        lines.append(f"{name:26}{_gib(size)}  {bar}")

    context = "CUDA context" if gpu.context_measured else "CUDA context (an H200's)"
    estimated = ", estimated" if gpu.nominal else ""
    several, together = settings.num_gpus > 1, ", on all GPUs together" if settings.num_gpus > 1 else ""
    context += ", NCCL" if several else ""
    context += "" if settings.sharding else " and paged optimizer"
    lines += [
        "",
        *_in_4_bits(found["weights"]),
        f"{'peak allocated':26}{_gib(prediction.peak_allocated_bytes)}  by torch, at: {prediction.peak_phase}",
        f"{'peak reserved':26}{_gib(prediction.peak_reserved_bytes)}  by torch, gaps included",
        f"{'on each card' if several else 'on the card':26}{_gib(prediction.device_bytes)}  with {context}",
        f"{'usable':26}{_gib(gpu.usable_bytes)}  {gpu.name}{estimated}",
        "",
        f"fits with {_amount(prediction.spare_bytes)} to spare"
        if prediction.fits
        else f"does not fit: {_amount(-prediction.spare_bytes)} too much",
        *(["too close to promise: the real run may take a few per cent more or less"] if _close(prediction) else []),
        "",
        f"{'largest batch':26}{found['largest_batch']:6,}      of {settings.max_length:,} tokens each{together}",
        f"{'longest sequence':26}{found['longest_sequence']:6,}      at batch {settings.batch_size:,}{_limit(found)}",
        *_host_memory(prediction),
        f"{'disk':26}{_gib(prediction.disk_bytes)}",
    ]
    if found["cures"]:
        lines += ["", *what_helps(found["cures"])]
    if found["several_gpus"]:
        lines += ["", *what_helps(found["several_gpus"], "With FSDP, predicted, the fewest GPUs first:")]
    if "cheapest_sets" in found:
        lines += ["", *_where_it_fits(found["cheapest_sets"])]
    return "\n".join(lines)


def _host_memory(prediction: Prediction) -> list[str]:
    """What the run takes of the computer's main memory, as lines of the report."""
    lines = []
    if not prediction.settings.sharding:
        lines.append(f"{'host memory to load':26}{_gib(prediction.host_bytes_to_load)}")
    if list(prediction.host_parts.values()) != [prediction.host_bytes_to_load]:
        of = ", ".join(f"{name} {_amount(size)}" for name, size in prediction.host_parts.items())
        line = f"{'host memory of the run':26}{_gib(prediction.host_bytes_of_run)}  {of if ',' in of else ''}".rstrip()
        lines.append(_wrapped(line, "", " " * 38))
    return lines


def _where_it_fits(sets: list[dict]) -> list[str]:
    """The smallest sets of GPUs with which a run fits, as lines of text."""
    if not sets:
        return ["It fits on none of the known GPUs, up to 8 of them."]
    lines = ["Where it fits, the least memory of all GPUs together first (there are no prices here):"]
    for one in sets:
        names, more = ", ".join(one["gpus"][:NAMED]), len(one["gpus"]) - NAMED
        more = f" and {more} more" if more > 0 else ""
        said = f"{one['what']} ({names}{more}): {_gib(one['device_bytes']).strip()} on each"
        lines.append(
            _wrapped(
                f"{said}, {_amount(one['host_bytes_of_run'])} of main memory", f"{one['total_gib']:5} GB: ", " " * 10
            )
        )
    return lines


def _in_4_bits(weights: dict | None) -> list[str]:
    """What of the weights is really in 4 bits, as lines of the report."""
    if weights is None:
        return []
    total = weights["in_4_bits"] + weights["in_16_bits"]
    line = f"{'really in 4 bits':26}{_gib(weights['in_4_bits'])}  of {_gib(total).strip()} of weights; not: {weights['why']}"
    lines = [_wrapped(line, "", " " * 38)]
    if not weights["mostly"]:
        smaller = _gib(weights["if_all_were"]).strip()
        warning = (
            f"This is no 4-bit model, whatever its name: with every matrix in 4 bits it would be {smaller}. load_model "
            "refuses it; see python -m qlora_helpers doctor --model"
        )
        lines.append(_wrapped(warning, " " * 38, " " * 38))
    return [*lines, ""]


def what_helps(changes: list[dict], head: str = "What helps, the cheapest first:") -> list[str]:
    """The changes that make a run fit, as lines of text.

    Args:
        changes: those of `cures_as_dicts`.
        head: the line above them.
    """
    lines = [head]
    for number, change in enumerate(changes, 1):
        together = change["settings"] and len(change["steps"]) > 1
        what = change["what"]
        if together:
            what = "all of this together:"
        elif number > 1:
            what = f"or {what}"
        lines.append(_wrapped(what, f"{number:2}. ", "    "))
        if not together:
            lines.append(_wrapped(change["price"], "    costs: " if change["settings"] else "    ", "    "))
        if together or not change["settings"]:
            lines += [_wrapped(f"{what} (costs: {price})", "    - ", "      ") for what, price in change["steps"]]
        if change["settings"]:
            lines.append(f"    then {_gib(change['device_bytes']).strip()} on the card")
    return lines


def _close(prediction: Prediction) -> bool:
    """Whether the verdict depends on less than 1 GiB or a tenth of what the run takes, whichever is less."""
    return abs(prediction.spare_bytes) < min(GIB, prediction.device_bytes / 10)


def _limit(found: dict) -> str:
    """Why the longest sequence is not longer, if memory is not the reason."""
    longest = found["max_position_embeddings"]
    if longest and found["longest_sequence"] > longest - 128:
        return f"; the model takes {longest:,}"
    return ""


def _family_and_size(name: str) -> tuple:
    return Name.of(name).family, known_sizes()[name], name.lower()


def _print_known(as_json: bool) -> None:
    models, sizes, gpus = known_models(), known_sizes(), known_gpus()
    if as_json:
        of_models = {
            name: {"parameters": sizes[name], "max_position_embeddings": longest_stated(config)}
            for name, config in models.items()
        }
        of_gpus = {
            key: {"name": gpu.name, "usable_bytes": gpu.usable_bytes, "usable_is_estimated": gpu.nominal}
            for key, gpu in gpus.items()
        }
        print(json.dumps({"models": of_models, "gpus": of_gpus}, indent=1))
        return
    print(f"{'model':50}{'parameters':>18}{'longest sequence':>18}")
    for family, members in groupby(sorted(models, key=_family_and_size), key=lambda name: Name.of(name).family):
        print(f"{family}:")
        for name in members:
            longest = longest_stated(models[name])
            print(f"  {name:48}{sizes[name]:18,}{f'{longest:,}' if longest else 'not stated':>18}")
    print("and any other model that transformers can build, by their folder or config.json\n")
    print(f"{'gpu':16}{'name':50}{'usable':>11}  {'compute capability'}")
    for key, gpu in gpus.items():
        estimated = "*" if gpu.nominal else " "
        capability = "{:3}.{}".format(*gpu.compute_capability)
        print(f"{key:16}{gpu.name:50}{_gib(gpu.usable_bytes):>11}{estimated} {capability}")
    print(
        "* estimated from what the card is sold with\nand any other card by its memory and compute capability, such as "
        "--gpu '16GiB sm_75'"
    )
