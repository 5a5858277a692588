"""What a run on two GPUs takes, how fast it is, and whether it learns the same: beside what is predicted.

    python -m data.scripts.measure.several_gpus                  # for two GPUs; writes data/measured/several_gpus.json
    python -m data.scripts.measure.several_gpus --processes 1    # the same rows with one process, as far as that goes
    python -m data.scripts.measure.several_gpus --rows "8B.*ddp"
    python -m data.scripts.measure.several_gpus --dry            # tiny models on CPU processes, writes nothing
    python -m data.scripts.measure.several_gpus --collect LOG…   # no GPU needed; puts the rows of logs into the table

Each row is a launch of its own with a limit of time: `torchrun`, or `accelerate launch` with a configuration of
data/accelerate. What each gives is written to `--log` at once, one line of JSON for each row, and put together at the end.

Rows "score" run the course's own run, `python -m qlora_helpers run`, on one GPU and on two.

The other rows train a few steps of a model that has a known shape and random weights. torch's memory on each GPU is limited
to `--cap` GiB. The weights are made on the GPU when transformers asks for them, layer by layer; for a sharded run they then go
to main memory, from where FSDP takes them, and the limit begins. So nothing is read from a disk, and how long loading takes is
not measured. Every sequence has the longest length that is predicted to fit; if it does not fit, three quarters of that.

Where there are fewer GPUs than a row has processes, these share one (`data.scripts.measure.shared_gpu`): "share_a_gpu". Then
memory alone is measured. 8B in shards took the same on two GPUs and so, but for 1,536 bytes.

    peak_allocated_bytes, peak_reserved_bytes     of each process, by torch, over all steps
    host_bytes                  the largest resident set of each process; pages that are shared count in each
    tokens_per_second           of all processes together, over the steps after the first two
    predicted                   what `qlora_helpers.memory.predict` says for the same settings
"""

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.scripts import ROOT
from data.scripts.measure.shared_gpu import share_the_gpu
from qlora_helpers.units import GIB

TABLE = ROOT / "data" / "measured" / "several_gpus.json"
CONFIGS = ROOT / "data" / "accelerate"
MODULE = "data.scripts.measure.several_gpus"
STEPS, WARM = 5, 2
WAYS = ("one", "ddp", "fsdp", "fsdp_offload")
SHAPES = {"8B": "Llama-3.1-8B", "70B": "Llama-3.1-70B"}
LONGEST = 65_536  # tokens: no longer sequence is tried
TRIES = 3  # lengths, each three quarters of the one before
LIMIT = 240  # seconds for a row, unless another limit is given
SCORE_STEPS = 300
NO_PACE = "on one GPU: no pace"


def plan(processes: int) -> list[dict]:
    """The rows, what nobody can guess first: what is measured, in which way, and of how long sequences; None for the longest
    that fit.
    """
    rows = [
        {"kind": "step", "model": model, "way": way, "processes": number, "tokens": tokens}
        for model, tokens, ways in (
            ("8B", 2_048, ("fsdp",)),
            ("70B", 512, ("fsdp", "fsdp_offload")),
            ("8B", 2_048, ("fsdp_offload", "ddp", "one")),
            ("70B", None, ("fsdp_offload", "fsdp")),
            ("8B", None, ("fsdp_offload", "fsdp", "ddp", "one")),
        )
        for way, number in ((way, 1 if way == "one" else processes) for way in ways)
    ]
    rows += [{"kind": "score", "way": way, "processes": number} for way, number in (("one", 1), ("ddp", processes))]
    labelled = {label_of(row): row | {"label": label_of(row)} for row in rows}  # with one process some are the same
    return list(labelled.values())


def label_of(row: dict) -> str:
    """Such as "8B ddp x2 2048"."""
    name = row.get("model", "score")
    tokens = "" if row["kind"] == "score" else f" {row['tokens'] or 'longest'}"
    return f"{name} {row['way']} x{row['processes']}{tokens}"


def settings_of(row: dict, tokens: int):
    """The run of a row: one sequence at a time on each GPU, rank 16 on all linear layers, checkpointing."""
    from qlora_helpers.settings import Settings

    return Settings(
        steps=WARM + 1 if row.get("share_a_gpu") else STEPS,
        batch_size=row["processes"],
        max_length=tokens,
        learning_rate=2e-4,
        warmup_steps=1,
        gradient_checkpointing=True,
        num_gpus=row["processes"],
        sharding="fsdp" if row["way"].startswith("fsdp") else None,
        cpu_offload=row["way"] == "fsdp_offload",
    )


def predicted(row: dict, tokens: int, gpu=None):
    """The prediction for a row; on the H200 unless another GPU is given."""
    from qlora_helpers.memory import find_shape, predict

    return predict(find_shape(SHAPES[row["model"]]), settings_of(row, tokens), gpu or "H200")


def longest(row: dict, cap: int, gpu=None) -> int:
    """The longest sequence whose tensors, as predicted, and what the allocator keeps for them, fit into `cap` bytes; 0 if
    none does. A multiple of 128.
    """
    from qlora_helpers.memory.search import STEP, largest_that_fits

    def spare(count: int) -> int:
        return cap - predicted(row, count * STEP, gpu).peak_reserved_bytes

    return STEP * largest_that_fits(spare, 0, LONGEST // STEP)


# ---- In each process of a row


def build_model(row: dict, dry: bool):
    """A model with the row's shape and random weights, as `from_pretrained` makes it; for a sharded run in main memory."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from data.scripts.measure.memory import RandomWeight, tiny
    from qlora_helpers.hardware import detect
    from qlora_helpers.launch import launch_of_this_process
    from qlora_helpers.memory import known_config
    from qlora_helpers.models.cpu_faults import make_safe_on_cpu

    hardware, launch = detect(), launch_of_this_process()
    options = known_config(SHAPES[row["model"]])
    options = tiny(options) | {"vocab_size": 4_096} if dry else options  # no less than the tokenizer of `step_row` has
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    dtype, device = hardware.compute_dtype, "cpu" if dry else launch.local_rank
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict={
            name: RandomWeight(name, weight, config, dtype, device)
            for name, weight in meta.state_dict().items()
            if name not in meta.all_tied_weights_keys
        },
        dtype=dtype,
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if launch.sharding else "uint8",
        ),
        attn_implementation="sdpa",
    )
    model.config._name_or_path = row["model"]
    if dry:
        make_safe_on_cpu(model)
    elif launch.sharding:
        for parameter in model.parameters():
            parameter.data = parameter.data.cpu()
            if hasattr(parameter, "quant_state"):  # else the scales keep hold of the memory that they were made in
                parameter.quant_state.to("cpu")
        torch.cuda.empty_cache()
    return model, hardware


def step_row(row: dict, dry: bool, cap: int) -> dict:
    """Train a few steps of random sequences; what this process has seen."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from data.scripts.make.stand_in_models import chats, make_tokenizer
    from qlora_helpers.hardware import peak_memory_bytes
    from qlora_helpers.launch import settings_in
    from qlora_helpers.training.together import begin_together
    from qlora_helpers.training.trainer import build_trainer

    model, hardware = build_model(row, dry)
    together, marks = begin_together(hardware), []
    if not dry:
        total = torch.cuda.get_device_properties(together.launch.local_rank).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), together.launch.local_rank)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not dry:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    tokens = 64 if dry else row["tokens"]
    settings = settings_in(together.launch, settings_of(row, tokens))
    tokenizer = make_tokenizer()
    made = chats(settings.batch_size * settings.steps, tokens, tokenizer)
    result: dict = {"rank": together.launch.rank}
    with tempfile.TemporaryDirectory() as output:
        try:
            trainer = build_trainer(model, tokenizer, made, Path(output), settings, hardware, together=together)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Clock())
            if not dry:
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
        except torch.OutOfMemoryError as error:
            return result | {"outcome": "out of memory", "said": str(error).splitlines()[0]}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return result | {
        "outcome": "ran",
        "loss": losses[-1],
        "peak_allocated_bytes": None if dry else torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": None if dry else torch.cuda.max_memory_reserved(),
        "host_bytes": peak_memory_bytes(),
        "tokens_per_second": round(
            (settings.steps - WARM) * settings.batch_size * tokens / (marks[-1] - marks[WARM - 1])
        ),
    }


def child(row: dict, dry: bool, cap: int) -> int:
    """One process of a row: 0 if it ran, or ran out of memory, which ends the others."""
    import qlora_helpers  # noqa: F401  before bitsandbytes: it silences the libraries

    if row.get("share_a_gpu"):
        share_the_gpu()
    result = step_row(row, dry, cap)
    print("RESULT " + json.dumps(result), flush=True)
    if result["outcome"] != "ran":
        os._exit(3)  # at once, since the others wait for this process in the middle of a step
    return 0


# ---- The launches


def command_of(row: dict, dry: bool, cap: int, folder: Path) -> list[str]:
    """How a row is launched."""
    job = ["-m", MODULE, "--job", json.dumps(row), "--cap", str(cap / GIB), *["--dry"] * dry]
    if row["kind"] == "score":
        steps = ["--steps", "4" if dry else str(SCORE_STEPS)]
        share = ["data.scripts.measure.shared_gpu"] if row.get("share_a_gpu") else []
        job = ["-m", *share, "qlora_helpers", "run", *steps, "--output", str(folder / "run")]
    if row["way"].startswith("fsdp"):
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{row['way']}.yaml")]
        return [sys.executable, *launcher, "--num_processes", str(row["processes"]), *job]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(row["processes"])]
    return [sys.executable, *launcher, *job]


def launched(row: dict, dry: bool, cap: int, limit: int = LIMIT) -> dict:
    """Measure one row in processes of its own, which have `limit` seconds."""
    started = time.monotonic()
    visible = {"CUDA_VISIBLE_DEVICES": ""} if dry else {}
    environment = (
        os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")} | visible
    )
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command_of(row, dry, cap, Path(folder)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            # torchrun ends its processes, which have sessions of their own, when it is asked to end
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
            return row | {"outcome": f"not done in {limit} s", "seconds": limit}
        seconds = {"seconds": round(time.monotonic() - started, 1)}
        if row["kind"] == "score" and process.returncode == 0:
            report = json.loads(Path(folder, "run", "report.json").read_text(encoding="utf-8"))
            return without_pace_if_shared(row | of_report(report) | seconds)
    results = [json.loads(line[7:]) for line in out.splitlines() if line.startswith("RESULT ")]
    if any(result["outcome"] == "out of memory" for result in results):
        return row | {"outcome": "out of memory", "processes_said": results} | seconds
    if process.returncode or len(results) != row["processes"]:
        # the launcher adds as much of its own
        own = "\n".join(line for line in err.splitlines() if re.match(r"\[rank\d+\]", line))
        return row | {"outcome": f"ended with {process.returncode}", "stderr": (own or err)[-3_000:]} | seconds
    return without_pace_if_shared(row | put_together(sorted(results, key=lambda result: result["rank"])) | seconds)


def without_pace_if_shared(found: dict) -> dict:
    """A row without how fast it was, if its processes shared a GPU: they took turns."""
    paces = {"tokens_per_second", "train_seconds"} & found.keys() if found.get("share_a_gpu") else ()
    return found | dict.fromkeys(paces)


def with_sharing(rows: list[dict], gpus: int) -> list[dict]:
    """The rows as this machine can measure them: where a row has more processes than there are GPUs, they share one."""
    return [row | {"share_a_gpu": True} if row["processes"] > gpus else row for row in rows]


def put_together(results: list[dict]) -> dict:
    """The figures of a row's processes: lists of each process's own, and those that all have in common."""
    own = ("peak_allocated_bytes", "peak_reserved_bytes", "host_bytes")
    slowest = min(result["tokens_per_second"] for result in results)
    common = {"outcome": "ran", "loss": results[0]["loss"], "tokens_per_second": slowest}
    return common | {name: [result[name] for result in results] for name in own}


def of_report(report: dict) -> dict:
    """What a run's report says of its score."""
    after = report["scores"]["after"]
    return {
        "outcome": "ran",
        "loss": report["loss_history"][-1][1],
        "exact_match": after["exact_match"],
        "exact_match_error": after["exact_match_error"],
        "validation_loss": after["loss"],
        "validation_loss_error": after["loss_error"],
        "train_seconds": report["train_seconds"],
    }


def attempts(row: dict, dry: bool, cap: int, limit: int = LIMIT):
    """A row for each length that is tried, from the longest one that is predicted to fit, until one fits."""
    if row["kind"] == "score":
        yield launched(row, dry, cap, limit)
        return
    tokens = row["tokens"] or (512 if dry else longest(row, cap))
    if not tokens:
        yield row | {"outcome": "predicted not to fit"}
        return
    for _ in range(1 if row["tokens"] else TRIES):
        foreseen = predicted(row, tokens)
        found = launched(row | {"tokens": tokens}, dry, cap, limit)
        found["predicted"] = {
            "peak_allocated_bytes": foreseen.peak_allocated_bytes,
            "peak_reserved_bytes": foreseen.peak_reserved_bytes,
            "host_bytes": foreseen.host_bytes_of_run,
        }
        yield found
        if found["outcome"] != "out of memory":
            return
        tokens = tokens * 3 // 4 // 128 * 128
        if not tokens:
            return


def here() -> dict:
    """The GPUs and the versions with which rows are measured."""
    import torch

    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"gpu": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count(), "versions": versions}


def collect(logs: list[Path], table: Path) -> None:
    """Put the rows of logs into a table, in the order of the plan. Rows of the table that were not measured again stay; of a
    label, a length and a cap the last one counts.
    """
    there = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {"rows": []}
    rows = there["rows"] + [json.loads(line) for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    order = [label_of(row) for row in plan(max(row["processes"] for row in rows))]
    found = {(row["label"], row.get("tokens"), row["cap_bytes"], row.get("share_a_gpu")): row for row in rows}
    rows = sorted(found.values(), key=lambda row: order.index(row["label"]))
    content = {"command": "python -m data.scripts.measure.several_gpus", "rows": rows}
    table.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(row: dict) -> str:
    """A row in a line."""
    said = f"{row['label']:26}{row['outcome']:16}"
    if row["outcome"] != "ran":
        return said + (row.get("stderr", "").strip().splitlines() or [""])[-1]
    if row["kind"] == "score":
        took = f"{row['train_seconds']:.0f} s" if row["train_seconds"] else NO_PACE
        return said + f"exact match {row['exact_match']:.1%}, validation loss {row['validation_loss']:.4f}, {took}"
    peak = max(row["peak_allocated_bytes"], default=0, key=lambda size: size or 0) or 0
    pace = f"{row['tokens_per_second']:7,} tokens/s" if row["tokens_per_second"] else NO_PACE
    return said + (
        f"{row['tokens']:7,} tokens  {peak / GIB:6.2f} GiB ({row['predicted']['peak_allocated_bytes'] / GIB:.2f} predicted)  "
        f"{sum(row['host_bytes']) / GIB:6.1f} GiB main memory ({row['predicted']['host_bytes'] / GIB:.1f})  "
        f"{pace}  loss {row['loss']:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=2, help="of the rows on several GPUs (default: %(default)s)")
    parser.add_argument("--cap", type=float, default=24.0, help="GiB of each GPU for torch (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds for a row (default: %(default)s)")
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="only rows whose label this matches")
    parser.add_argument("--log", type=Path, help="a file for the rows as they come (default: beside the table)")
    parser.add_argument(
        "--collect", type=Path, nargs="+", metavar="LOG", help="only put the rows of these into the table"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="the file at the end (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny models on CPU processes, writes no table")
    args = parser.parse_args()
    cap = int(args.cap * GIB)
    if args.job:
        return child(args.job, args.dry, cap)
    if args.collect:
        collect(args.collect, args.table)
        return 0
    log = args.log or args.table.with_suffix(".jsonl")
    rows = [row for row in plan(args.processes) if args.rows.search(row["label"])]
    made_on = {} if args.dry else here()
    if not args.dry:
        rows = with_sharing(rows, made_on["gpus"])
    done: list[dict] = []
    for row in rows:
        if args.dry and row["way"].startswith("fsdp"):
            print(f"{row['label']:26}not tried: accelerate shards on GPUs alone")
            continue
        for found in attempts(row, args.dry, cap, args.limit):
            done.append(found)
            print(show(found), flush=True)
            if not args.dry:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found | {"cap_bytes": cap, "made_on": made_on}) + "\n")
    if not args.dry:
        collect([log], args.table)
    failed = [row["label"] for row in done if row["outcome"].startswith(("ended", "not done"))]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
