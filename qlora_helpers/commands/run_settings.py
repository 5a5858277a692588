"""The settings of a run of the command line: those it was begun with; else as asked for, and otherwise as suggested."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.commands.run_request import SHIPPED, Request
from qlora_helpers.launch import Launch, settings_in
from qlora_helpers.settings import GPU_RUN, MEMORY_SETTINGS, Settings
from qlora_helpers.units import in_words

if TYPE_CHECKING:
    from qlora_helpers.commands.run_data import RunData
    from qlora_helpers.hardware import Hardware
    from qlora_helpers.memory import GPU, AnyShape, ModelShape, Prediction
    from qlora_helpers.suggestions import SuggestedSettings

__all__ = ["SAVE_STEPS", "VARIED", "gpu_of", "length_and_seed", "predicted_memory", "settings_of", "shape_of"]

SAVE_STEPS = 100
# what a run can vary; how often it saves does not change what it learns
VARIED = (
    "method", "epochs", "steps", "batch_size", "accumulation", "max_length", "learning_rate", "warmup_steps", "schedule",
    "max_grad_norm", "rank", "alpha", "dropout", "target_modules", "merge_aware", "gradient_checkpointing", "checkpointed_layers",
    "activation_offloading", "packing", "compile_layers", "liger_layers", "expandable_segments", "memory_budget", "optimizer",
    "eval_steps", "patience", "seed",
)  # fmt: skip
ONLY_ADAPTERS = ("rank", "alpha", "dropout", "target_modules")


def length_and_seed(
    request: Request, record: dict[str, Any], shape: ModelShape | AnyShape | None
) -> tuple[int | None, int]:
    """The longest chat that is allowed, in tokens, or None for any; and the seed.

    Args:
        record: of the run if it was begun before, else {}.
        shape: of the model; None if it is not known.
    """
    asked = {**request.settings, **record}
    usual = Settings.max_length if request.data is None else shape and shape.max_position_embeddings
    return asked.get("max_length", usual), asked.get("seed", Settings.seed)


def shape_of(model: str) -> ModelShape | AnyShape | None:
    """The shape of a model; None, with a word, for one that neither the predictor nor transformers knows."""
    from qlora_helpers.memory import find_shape
    from qlora_helpers.models.loading import folder_of

    try:
        shape = find_shape(folder_of(model, weights=False))
        return replace(shape, name=model if model == SHIPPED else Path(model).name)
    except ValueError as error:
        print(f"note: the memory of the run is not predicted: {error}")
        return None


def settings_of(
    request: Request,
    record: dict[str, Any],
    data: RunData,
    shape: ModelShape | AnyShape | None,
    hardware: Hardware,
    ignore_memory: bool = False,
    launch: Launch | None = None,
) -> Settings:
    """The settings of a run with their steps counted. Prints what was suggested.

    What is suggested is for one GPU. Of several, each gets the batch that it would have alone, in as many fewer batches of a
    step, as near as it comes.

    Args:
        record: of the run if it was begun before, else {}.
        shape: of the model; None if it is not known.
        ignore_memory: suggest settings even if none fits on the GPU.
        launch: the processes of the run; by default this one alone.

    Raises:
        ValueError: a setting is not allowed, or does not fit the processes; or nothing fits on the GPU, and that is not to be ignored.
    """
    launch = launch or Launch()
    found = _settings_of(request, record, data, shape, hardware, ignore_memory, launch.processes)
    return settings_in(launch, found)


def _settings_of(
    request: Request, record, data: RunData, shape, hardware: Hardware, ignore_memory: bool, processes: int
) -> Settings:
    from qlora_helpers.suggestions import Reason

    rows, named = len(data.training), request.settings
    if record:
        begun = {name: record[name] for name in VARIED if name in record}
        return Settings(save_steps=SAVE_STEPS, **begun)
    if request.data is None:
        return Settings(save_steps=SAVE_STEPS, **named).for_rows(rows)
    length = named.get("max_length") or _rounded_up(data.longest, shape)
    if shape is None:
        print("Settings are those of the course's usual run on a GPU: none can be suggested without the model's shape.")
        usual = replace(GPU_RUN, learning_rate=2e-4, max_length=length)
        instead = _instead(_shared_out(usual, named, processes) | named, usual, 3)
        return _with(usual, instead | {"steps": None, "epochs": 3} | named, rows)
    found = _suggested(shape, rows, hardware, length, data.answer_tokens, ignore_memory)
    longest = Reason(length, f"the longest chat has {data.longest:,} tokens; rounded up to a multiple of 8", "")
    found = replace(found, reasons=found.reasons | {"max_length": longest})
    shared = _shared_out(found.settings, named, processes)
    instead = _instead(shared | named, found.settings, found.reasons["epochs"].value)
    settings = _with(found.settings, instead, rows)
    _print_suggestions(found, settings, named, instead)
    return settings


def _shared_out(base: Settings, named: dict[str, Any], processes: int) -> dict[str, int]:
    """The batch of several processes, if none is named: on each of them the one to start from, if a step has so many."""
    if processes == 1 or "batch_size" in named:
        return {}
    effective = base.batch_size * base.accumulation
    each = max(1, min(base.batch_size, effective // processes))
    return {"batch_size": each * processes}


def _with(base: Settings, instead: dict[str, Any], rows: int) -> Settings:
    """Settings with others in their place, and the warm-up that the steps want which this comes to."""
    from qlora_helpers.suggestions import warmup_steps

    settings = replace(base, **instead, save_steps=SAVE_STEPS).for_rows(rows)
    if instead.get("warmup_steps", 0) is None:
        settings = replace(settings, warmup_steps=warmup_steps(settings.steps))
    return settings


def _instead(named: dict[str, Any], base: Settings, epochs: float) -> dict[str, Any]:
    """The settings that take the place of those to start from: those that are named, and what goes with them."""
    instead: dict[str, Any] = _batch(base, named)
    if instead or {"steps", "epochs"} & named.keys():  # the steps are counted anew, for the batch that is named
        instead |= {"steps": None, "epochs": None if "steps" in named else epochs, "warmup_steps": None}
    if named.get("method") == "full":  # adapters want ten times the rate (LoRA Without Regret, Thinking Machines 2025)
        instead["learning_rate"] = base.learning_rate / 10
    return instead | named


def _batch(base: Settings, named: dict[str, Any]) -> dict[str, int]:
    """The split of the suggested effective batch where a part of it is named, as near as it comes; {} where none is."""
    if not {"batch_size", "accumulation"} & named.keys():
        return {}
    effective = base.batch_size * base.accumulation
    size = named.get("batch_size", min(base.batch_size, max(1, effective // named.get("accumulation", 1))))
    return {"batch_size": size, "accumulation": named.get("accumulation", max(1, effective // size))}


def _rounded_up(tokens: int, shape: ModelShape | AnyShape | None) -> int:
    """To a multiple of 8, which the GPU's kernels like, but not over what the model takes."""
    most = shape and shape.max_position_embeddings
    return min(-(-tokens // 8) * 8, most or math.inf)


def _suggested(
    shape: ModelShape | AnyShape, rows: int, hardware: Hardware, length: int, tokens: int, ignore_memory: bool
) -> SuggestedSettings:
    """The settings to start from.

    Raises:
        ValueError: nothing fits on the GPU, and that is not to be ignored.
    """
    from qlora_helpers.suggestions import suggest_settings

    gpu = gpu_of(hardware)
    try:
        return suggest_settings(shape, rows, gpu, length, tokens)
    except ValueError as error:
        anyway = suggest_settings(shape, rows, None, length, tokens)  # raises what has nothing to do with the GPU
        if not ignore_memory:
            raise ValueError(f"{error}\nTo train all the same: --ignore-memory") from error
        least = {"batch_size": 1, "accumulation": anyway.settings.batch_size, "gradient_checkpointing": True}
        kept = {name: reason for name, reason in anyway.reasons.items() if name not in least}
        note = "Not even one row at a time is predicted to fit. It is tried so, with gradient checkpointing."
        return replace(anyway, gpu=gpu, settings=replace(anyway.settings, **least), reasons=kept, notes=(note,))


def _print_suggestions(
    found: SuggestedSettings, settings: Settings, named: dict[str, Any], instead: dict[str, Any]
) -> None:
    """Print the settings to start from that the run has, each with its reason; and those that it has instead."""
    from qlora_helpers.suggestions import shown

    # what was held out is said already
    out_of_place = {"validation_rows", *instead, *(ONLY_ADAPTERS if settings.method == "full" else ())}
    if instead.get("epochs") == found.reasons["epochs"].value:
        out_of_place.discard("epochs")
    reasons = {name: reason for name, reason in found.reasons.items() if name not in out_of_place}
    prediction = None if set(MEMORY_SETTINGS) & instead.keys() else found.prediction
    # that no GPU was named is no news here
    found = replace(found, reasons=reasons, prediction=prediction, notes=found.notes if found.gpu else ())
    print(f"\nSettings to start from, for {found}\n")
    print("What the sources in brackets say is in README.md. To change a setting, name it, as in --seed 1.")
    follows = [name for name in instead if name not in named and getattr(settings, name) is not None]
    for how, values in (
        ("As you named them", {name: named[name] for name in named}),
        ("What goes with them", {name: getattr(settings, name) for name in follows}),
    ):
        if values:
            print(f"{how}: {', '.join(f'{name}={shown(value)}' for name, value in values.items())}")
    sys.stdout.flush()


def gpu_of(hardware: Hardware) -> GPU | None:
    """The GPU of this machine, known to the predictor's table or not; None in the cpu gear."""
    from qlora_helpers.memory.gpus import measured_gpu

    if hardware.device == "cpu":
        return None
    return measured_gpu(hardware.gpu_name, hardware.gpu_bytes, hardware.capability)


def _check_main_memory(prediction: Prediction, settings: Settings, hardware: Hardware, ignore: bool) -> None:
    """Make sure that main memory holds what a run that offloads keeps there.

    Raises:
        ValueError: it does not, and that is not to be ignored.
    """
    needed = prediction.host_bytes_of_run
    if not settings.cpu_offload or needed <= hardware.host_bytes:
        return
    said = (
        f"cpu_offload=True: {settings.num_gpus} process{'es' if settings.num_gpus > 1 else ''} are predicted to take "
        f"{in_words(needed)} of main memory, and this machine has {in_words(hardware.host_bytes)}"
    )
    if not ignore:
        cure = "shard without it if the GPUs hold the shards (data/accelerate/fsdp.yaml), or choose a smaller model"
        raise ValueError(f"{said}: {cure}. To train all the same: --ignore-memory")
    print(f"warning: {said}. It is tried all the same.")


def predicted_memory(
    shape: ModelShape | AnyShape | None, settings: Settings, hardware: Hardware, ignore: bool = False
) -> Prediction | None:
    """The memory of the run on this machine's GPU; None without a GPU, with a memory budget, or for a model that the predictor
    does not know.

    Args:
        ignore: warn if the run will not fit, instead of refusing it.

    Raises:
        ValueError: the run will not fit, and `ignore` is not set.
    """
    from qlora_helpers.commands.memory import cures_as_dicts, what_helps
    from qlora_helpers.memory import predict

    gpu = gpu_of(hardware)
    if (
        gpu is None or shape is None or settings.memory_budget is not None
    ):  # a budget is planned when the model is loaded
        return None
    if settings.merge_aware is not None:
        print("note: the memory of the run is not predicted: its merge-aware steps take more, which was not measured.")
        return None
    settings = replace(settings, compute_dtype=str(hardware.compute_dtype).removeprefix("torch."))
    prediction = predict(shape, settings, gpu)
    _check_main_memory(prediction, settings, hardware, ignore)
    said = f"{in_words(prediction.device_bytes)} of the {in_words(gpu.usable_bytes)} of this {gpu.name}"
    if prediction.fits:
        print(f"Memory, predicted: {said}.")
        return prediction
    said = f"the run is predicted to take {said}"
    if not ignore:
        helps = "\n".join(what_helps(cures_as_dicts(shape, settings, gpu)))
        raise ValueError(f"{said}, so it will not fit. To train all the same: --ignore-memory\n{helps}")
    print(f"warning: {said}. It is tried all the same.")
    return prediction
