"""Out of memory on a real GPU: where memory goes within a step, where runs die under a cap, and what cures them.

    python -m data.scripts.measure.out_of_memory                   # needs a GPU; writes data/measured/oom.json, about five minutes
    python -m data.scripts.measure.out_of_memory --row paging      # only rows whose label contains this
    python -m data.scripts.measure.out_of_memory --missing         # only rows that are not measured yet in the table
    python -m data.scripts.measure.out_of_memory --dry --table F   # the same code with tiny models on a CPU; out-of-memory errors are faked

Every row runs in its own process, with a model of real shape and random weights (see `memory.py`). `what` is the kind
of row:
    timeline    the allocator's history of the load and of the third step, thinned
    run         four steps of training, some under a cap: `cap_bytes` is what torch may hold
                (`torch.cuda.set_per_process_memory_fraction`; the CUDA context and managed memory do not count)
    evaluation  an evaluation of eight sequences; `keep` says what is kept of each
    saving      the trainer's checkpoint, written after torch was capped at what it holds
    merging     `way`: "dequantise" (the whole model in 16 bits), or "into 4 bits" (PEFT, layer by layer)

`group` and `role` say what a row is for: a "death" and its "cure" have the same cap; "price" is the run that died,
without a cap. What was measured, in bytes unless noted:
    outcome                     "ran", "out of memory", or "died" of something else
    place                       where it died: by the script's phase; `place_by_traceback`: by the error's traceback
                                (qlora_helpers.memory.out_of_memory.place_of)
    error, message, frames      class and text of the exception; the functions in its traceback, outermost first
    loaded_bytes                allocated by torch after the model is loaded
    before_bytes                allocated before the phase that is measured (training, evaluation, saving, merging)
    peak_allocated_bytes, peak_reserved_bytes    the peaks since then; for training, since it began
    steady_peak_bytes           the peak allocated in steps 3 and 4
    tokens_per_second           in steps 3 and 4
    allocator_retries           how often torch returned all its unused memory and asked the driver again
    paged_bytes, state_bytes    the optimizer's states: those in managed memory, and all of them
    outside                     in "paging" rows: at several moments, the card's memory in use (`cudaMemGetInfo`) minus
                                what torch has reserved: context, libraries and managed memory
    seconds                     of the row without imports; `work_seconds` of the phase that is measured
"""

import argparse
import contextlib
import importlib.metadata
import os
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from unittest import mock

from qlora_helpers.settings import GPU_RUN

if __name__ == "__main__":  # before torch is imported: threads do not survive a fork
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
import torch

from data.scripts import ROOT
from data.scripts.measure import memory as measure_memory
from data.scripts.measure.memory import (
    GIB,
    PACKAGES,
    STEPS,
    Table,
    allocated,
    build_model,
    build_trainer,
    gpu_about,
    in_turn,
    used_at_rest,
)
from data.scripts.measure.memory_plan import CONFIGS, memory_settings
from qlora_helpers.memory.out_of_memory import place_of
from qlora_helpers.memory.phases import BACKWARD, EVALUATION, FORWARD, LOAD, MERGING, SAVING, STEP

TABLE = ROOT / "data" / "measured" / "oom.json"
MODEL = "llama-3.1-8b"
BINS = 90  # equal time slices of a timeline; at most four points are kept of each
SEQUENCES, EVAL_TOKENS = 8, 2_048
FAKED = (  # only with --dry
    "CUDA out of memory. Tried to allocate 1002.00 MiB. GPU 0 has a total capacity of 139.81 GiB of which 128.00 GiB is free. "
    "Process 1 has 11.00 GiB memory in use. 10.00 GiB allowed; Of the allocated memory 9.20 GiB is allocated by PyTorch, "
    "and 102.00 MiB is reserved by PyTorch but unallocated. This message is faked."
)

# ---------------------------------------------------------------- the plan

PLAIN = replace(GPU_RUN, compute_dtype="bfloat16", optimizer="paged_adamw_8bit")
USUAL = {"batch_size": 4, "max_length": 2_048, "adapter_dtype": "bfloat16"}  # as TRL makes adapters in a 4-bit model
SHORT = USUAL | {"batch_size": 1, "max_length": 512}
ONE = USUAL | {"batch_size": 1}
HIGH_RANK = SHORT | {"rank": 256, "adapter_dtype": "float32"}
KEEP = {"gradient_checkpointing": False}


LATER = ("checkpointed_layers", "logits", "eval_batch_size")  # settings that are younger than the measured rows


def _row(label: str, what: str, settings: dict, cap: float | None = None, **more) -> dict:
    return {
        "label": label,
        "what": what,
        "cap_bytes": None if cap is None else int(cap * GIB),
        **more,
        "model": MODEL,
        "config": CONFIGS[MODEL],
        **{name: value for name, value in memory_settings(replace(PLAIN, **settings)).items() if name not in LATER},
        "alone": True,
        "gib": 80,
    }


def _three(group: str, place: str, cap: float, death: dict, cures: dict[str, dict]) -> list[dict]:
    """A run that dies, its cures under the same cap, and last what it costs without a cap."""
    more = {"group": group, "place_expected": place}
    return [
        _row(f"{group}: death", "run", death, cap, role="death", **more),
        *(_row(f"{group}: cure, {name}", "run", cure, cap, role="cure", **more) for name, cure in cures.items()),
        _row(f"{group}: price", "run", death, None, role="price", **more),
    ]


def all_rows() -> list[dict]:
    """What is measured, in order."""
    rows = [
        _row("timeline: checkpointing", "timeline", ONE),
        _row("timeline: no checkpointing", "timeline", ONE | KEEP),
        _row("timeline: rank 256, adamw_torch", "timeline", HIGH_RANK | {"optimizer": "adamw_torch"}),
    ]
    rows += _three("load", LOAD, 14.0, ONE | {"method": "lora"}, {"4 bits": ONE})
    rows.append(
        _row("load in 4 bits: death", "run", ONE, 4.5, role="death", group="load in 4 bits", place_expected=LOAD)
    )
    rows += _three("forward", FORWARD, 22.0, USUAL | KEEP, {"checkpointing": USUAL})
    rows += _three(
        "eager attention",
        FORWARD,
        12.0,
        ONE | {"max_length": 8_192, "attention": "eager"},
        {"sdpa": ONE | {"max_length": 8_192}},
    )
    # Planned as a death in the backward pass, where the tensors exceed the cap. Fragmentation made it happen earlier.
    rows += _three("float32 copies", FORWARD, 13.5, USUAL | {"upcast_fp32": True}, {"no copies": USUAL})
    rows += _three(
        "backward, batch",
        BACKWARD,
        9.2,
        USUAL,
        {
            "2 x 2 accumulated": USUAL | {"batch_size": 2, "accumulation": 2},
            "1 x 4 accumulated": USUAL | {"batch_size": 1, "accumulation": 4},
            "half the tokens": USUAL | {"max_length": 1_024},
        },
    )
    more = {"group": "backward, batch", "place_expected": BACKWARD, "config_options": {"torch_empty_cache_steps": 1}}
    rows[-1] = _row("backward, batch: still dead, empty_cache", "run", USUAL, 9.2, role="death", **more)
    # a cap between what the tensors take and what torch holds for them: whether this dies is not known in advance
    rows.append(_row("holes: as it is", "run", USUAL, 10.2, role="trial", group="holes"))
    more = {"allocator": "expandable_segments:True", "group": "holes", "role": "trial"}
    rows.append(_row("holes: expandable segments", "run", USUAL, 10.2, **more))
    rows += _three(
        "optimizer",
        STEP,
        14.0,
        HIGH_RANK | {"optimizer": "adamw_torch"},
        {
            "8 bits": HIGH_RANK | {"optimizer": "adamw_8bit"},
            "paged, 32 bits": HIGH_RANK | {"optimizer": "paged_adamw_32bit"},
            "rank 64": HIGH_RANK | {"optimizer": "adamw_torch", "rank": 64},
        },
    )
    for rank in (16, 64):
        for optimizer in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
            settings = SHORT | {"rank": rank, "optimizer": optimizer}
            rows.append(_row(f"paging: rank {rank}, {optimizer}", "run", settings, role="paging", group="paging"))
    more = {"group": "evaluation", "place_expected": EVALUATION}
    rows += [
        _row("evaluation: death", "evaluation", ONE, 14.0, role="death", keep="logits", eval_batch=8, **more),
        _row(
            "evaluation: still dead, batch of 1",
            "evaluation",
            ONE,
            14.0,
            role="death",
            keep="logits",
            eval_batch=1,
            **more,
        ),
        _row(
            "evaluation: cure, only the loss", "evaluation", ONE, 14.0, role="cure", keep="loss", eval_batch=8, **more
        ),
        _row("evaluation: cure, best words", "evaluation", ONE, 14.0, role="cure", keep="argmax", eval_batch=1, **more),
        _row("evaluation: cure, moved", "evaluation", ONE, 14.0, role="cure", keep="moved", eval_batch=1, **more),
        _row("evaluation: price", "evaluation", ONE, role="price", keep="logits", eval_batch=1, **more),
    ]
    settings = SHORT | {"rank": 64, "optimizer": "paged_adamw_32bit"}
    rows.append(_row("saving: a checkpoint", "saving", settings, group="saving", role="cure", place_expected=SAVING))
    more = {"group": "merging", "place_expected": MERGING}
    rows += [
        _row("merging: death", "merging", SHORT, 14.0, role="death", way="dequantise", **more),
        _row("merging: cure, into 4 bits", "merging", SHORT, 14.0, role="cure", way="into 4 bits", **more),
        _row("merging: price", "merging", SHORT, role="price", way="dequantise", **more),
    ]
    return rows


# ---------------------------------------------------------------- one row, in its own process


FUSES = {  # with --dry: what raises the faked error, deep inside each place
    LOAD: "measure_memory.RandomWeight.__getitem__",
    FORWARD: "transformers.models.llama.modeling_llama.LlamaMLP.forward",
    BACKWARD: "torch.autograd._engine_run_backward",
    STEP: "torch.optim.AdamW._init_group",
    EVALUATION: "transformers.models.llama.modeling_llama.LlamaMLP.forward",
    MERGING: "bitsandbytes.functional.dequantize_4bit",
}


def fuse(row: dict, dry: bool):
    """With --dry, a faked out-of-memory error where the row should die; otherwise nothing."""
    if not dry or row.get("role") != "death":
        return contextlib.nullcontext()
    return mock.patch(FUSES[row["place_expected"]], side_effect=torch.OutOfMemoryError(FAKED))


def cap(row: dict, dry: bool) -> None:
    if row["cap_bytes"] and not dry:
        torch.cuda.set_per_process_memory_fraction(row["cap_bytes"] / torch.cuda.get_device_properties(0).total_memory)


def peaks(dry: bool) -> dict:
    if dry:
        return {"peak_allocated_bytes": None, "peak_reserved_bytes": None}
    torch.cuda.synchronize()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def outside(dry: bool) -> int | None:
    """The card's memory in use beyond what torch has reserved; only this process uses the card."""
    if dry:
        return None
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def train(row: dict, dry: bool, trainer, measured: dict) -> None:
    """Train four steps; record the speed and peak of the last two."""
    from transformers import TrainerCallback

    seconds = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not dry:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter())
            if state.global_step in (1, STEPS):
                measured["outside"][f"after step {state.global_step}"] = outside(dry)
            if state.global_step == 2 and not dry:
                measured["first_steps_peak_bytes"] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()

    trainer.add_callback(Watch())
    measured["outside"] = {"before training": outside(dry)}
    trainer.train()
    found = peaks(dry)
    measured |= {"steady_peak_bytes": found["peak_allocated_bytes"]}
    if not dry:
        found["peak_allocated_bytes"] = max(found["peak_allocated_bytes"], measured["first_steps_peak_bytes"])
    measured |= found
    tokens = 2 * row["batch_size"] * row["accumulation"] * trainer.args.max_length
    measured["tokens_per_second"] = round(tokens / (seconds[3] - seconds[1]))
    measured["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    states = [state for each in trainer.optimizer.optimizer.state.values() for state in each.values()]
    states = [state for state in states if isinstance(state, torch.Tensor)]
    measured["state_bytes"] = sum(state.nbytes for state in states)
    measured["paged_bytes"] = sum(state.nbytes for state in states if getattr(state, "is_paged", False))


def timeline(row: dict, dry: bool, trainer, measured: dict) -> None:
    from qlora_helpers.memory.timeline import record_step

    made = record_step(trainer, 3)
    measured |= peaks(dry)
    thin = made.thinned(BINS)
    measured["points"] = len(made.levels)
    measured["timeline_peak_bytes"], measured["peak_phase"] = made.peak, made.peak_phase
    measured["timeline"] = thin.to_json()


def evaluate(row: dict, dry: bool, trainer, measured: dict) -> None:
    trainer.evaluate()
    measured |= peaks(dry)


def eval_options(row: dict, dry: bool) -> tuple[dict, dict]:
    """Options of SFTConfig and SFTTrainer for an evaluation that keeps what the row says."""
    import datasets

    def count(predictions) -> dict[str, float]:
        return {"kept_numbers": float(predictions.predictions.size)}

    ids = torch.randint(3, 500, (SEQUENCES, 64 if dry else EVAL_TOKENS))
    config: dict = {"per_device_eval_batch_size": row["eval_batch"]}
    trainer: dict = {"eval_dataset": datasets.Dataset.from_dict({"input_ids": ids.tolist()})}
    if row["keep"] != "loss":
        trainer["compute_metrics"] = count
    if row["keep"] == "argmax":
        trainer["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)
    if row["keep"] == "moved":
        config["eval_accumulation_steps"] = 1
    return config, trainer


def save(row: dict, dry: bool, trainer, measured: dict) -> None:
    """Train, cap torch at what it holds, and write a checkpoint."""
    trainer.train()
    measured["before_bytes"] = allocated(not dry)
    if not dry:
        held = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
        measured["cap_bytes"] = held
    started = time.perf_counter()
    trainer._save_checkpoint(trainer.model, trial=None)
    measured["work_seconds"] = round(time.perf_counter() - started, 2)
    measured |= peaks(dry)
    files = [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()]
    measured["files"] = {path.name: path.stat().st_size for path in files}


def merge(row: dict, dry: bool, model, measured: dict) -> None:
    merged = model.dequantize() if row["way"] == "dequantise" else model.merge_and_unload()
    measured |= peaks(dry)
    measured["after_bytes"] = allocated(not dry)
    measured["parameters"] = sum(parameter.numel() for parameter in merged.parameters())


def loaded(row: dict, dry: bool, measured: dict):
    """The row's model; for a "timeline" row, the history of the load is recorded."""
    if row["what"] != "timeline" or dry:
        return build_model(row, dry)
    from qlora_helpers.memory.timeline import AllocatorHistory

    history = AllocatorHistory()
    history.begin()
    history.mark(LOAD)
    model = build_model(row, dry)
    made = history.end()
    measured["load_timeline"], measured["load_peak_bytes"] = made.thinned(BINS).to_json(), made.peak
    return model


def work(row: dict, dry: bool, tracker, measured: dict, output: str) -> None:
    """Do everything in a row; what it has measured is kept even if it dies."""
    what = row["what"]
    with tracker.hold(LOAD):
        model = loaded(row, dry, measured)
        measured["loaded_bytes"] = allocated(not dry)
    if what == "merging":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=row["rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if row["way"] != "dequantise":  # a model that is dequantised gets its adapters afterwards
            model = get_peft_model(model, lora)
        measured["before_bytes"] = allocated(not dry)
        started = time.perf_counter()
        with tracker.hold(MERGING):
            merge(row, dry, model, measured)
        measured["work_seconds"] = round(time.perf_counter() - started, 2)
        return
    config, options = eval_options(row, dry) if what == "evaluation" else (row.get("config_options", {}), {})
    trainer = build_trainer(model, row, dry, output, config, **options)
    del model
    if what != "timeline":
        tracker.attach(trainer)
    measured["before_bytes"] = allocated(not dry)
    started = time.perf_counter()
    {"run": train, "timeline": timeline, "evaluation": evaluate, "saving": save}[what](row, dry, trainer, measured)
    measured.setdefault("work_seconds", round(time.perf_counter() - started, 2))


def measure(row: dict, dry: bool) -> dict:
    """The measured fields of a row, including its death."""
    from transformers import set_seed

    from qlora_helpers.memory.timeline import PhaseTracker

    measured: dict = {}
    if not dry:
        measured["nvml_used_before_bytes"] = used_at_rest()
        if row["what"] == "timeline":
            os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # so that CPU and GPU are in step
        torch.zeros(1, device="cuda")
        cap(row, dry)
        measured["outside_at_first_bytes"] = outside(dry)
        if settings := row.get("allocator"):
            torch.cuda.memory._set_allocator_settings(settings)
    tracker = PhaseTracker()
    started = time.perf_counter()
    set_seed(0)
    with tempfile.TemporaryDirectory() as output:
        try:
            with fuse(row, dry):
                work(row, dry, tracker, measured, output)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            too_much = "out of memory" in text
            if not too_much and row.get("role") != "death":
                raise
            traceback.print_exc()
            measured |= peaks(dry)
            measured |= {
                "outcome": "out of memory" if too_much else "died",
                "place": tracker.phase,
                "place_by_traceback": place_of(error),
                "error": f"{type(error).__module__}.{type(error).__qualname__}",
                "message": str(error)[:4_000],
                "frames": " > ".join(frame.name for frame in traceback.extract_tb(error.__traceback__)),
            }
            if not dry:
                measured["allocated_at_death_bytes"] = torch.cuda.memory_allocated()
                measured["reserved_at_death_bytes"] = torch.cuda.memory_reserved()
    return measured | {"seconds": round(time.perf_counter() - started, 1)}


# ---------------------------------------------------------------- all rows


def show(row: dict) -> str:
    text = f"{row['label']:46}{row['outcome']:15}"
    if row["outcome"] == "out of memory":
        return f"{text} in {row['place']} (by traceback {row['place_by_traceback']}): {row['message'][:150]}"
    peak = row.get("peak_allocated_bytes")
    text += f"{peak / GIB:7.2f} GiB" if peak else ""
    text += f"{row['tokens_per_second']:8,} tokens/s" if row.get("tokens_per_second") else ""
    return f"{text}  {row.get('seconds', 0):.0f} s"


def unexpected(row: dict) -> str:
    """How a row deviated from the plan; empty if it did not. A "trial" may run or die."""
    died, role = row["outcome"] == "out of memory", row.get("role")  # no other kind of death is planned
    if (row["outcome"] != "ran" and not died) or (role != "trial" and died != (role == "death")):
        return f"planned: {role or 'to run'}"
    if died and role == "death" and row["place"] != row["place_expected"]:
        return f"planned to die in: {row['place_expected']}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", metavar="LABEL", nargs="+", default=[""], help="only rows whose label contains one of these"
    )
    parser.add_argument("--missing", action="store_true", help="only rows that are not measured yet in the table")
    parser.add_argument("--list", action="store_true", help="show the rows and measure nothing")
    parser.add_argument("--table", type=Path, help="default: data/measured/oom.json, or none with --dry")
    parser.add_argument("--dry", action="store_true", help="tiny models on a CPU, to test this script")
    args = parser.parse_args()
    planned = all_rows()
    rows = [row for row in planned if any(words in row["label"] for words in args.row)]
    if not rows:
        parser.error(f"no row matches --row {' '.join(args.row)}; see --list")
    if args.list:
        print(*(row["label"] for row in rows), f"{len(rows)} rows", sep="\n")
        return 0
    about: dict = {} if args.dry else gpu_about()
    about["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    about["command"] = "python -m data.scripts.measure.out_of_memory"
    table = Table(args.table or (None if args.dry else TABLE), about, planned)
    if args.missing:
        there = {row["label"] for row in table.content["rows"] if row["outcome"] in ("ran", "out of memory")}
        rows = [row for row in rows if row["label"] not in there]
    measure_memory.load_libraries(about.get("compute_capability"))
    started, failed = time.monotonic(), 0
    for row, tail in in_turn(rows, 1, args.dry, measure):
        print(show(row), flush=True)
        if fault := unexpected(row):
            failed += 1
            print(f"    {fault}", *(f"    {line}" for line in tail), sep="\n", flush=True)
        table.put(row)
    print(f"{len(rows) - failed} of {len(rows)} rows went as planned, in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
