"""Training speed of QLoRA variants on one GPU: the articles' recipe, plain TRL, the course's own, and Unsloth.

    python -m data.scripts.measure.speed --dry-run                  # lists the rows
    python -m data.scripts.measure.speed --rows "8b bf16 4x2048"    # rows whose label matches this regular expression
    python -m data.scripts.measure.speed --rows unsloth --unsloth-site FOLDER --ahead 8     # where pip put Unsloth
    python -m data.scripts.measure.speed --device cpu --rows "1.5b bf16 4x2048" --out dry.jsonl   # a tiny model
    python -m data.scripts.measure.speed --collect FILE ...         # no GPU needed; writes data/measured/speed.json

Every row has a process of its own: load, a few steps to warm up, a few timed ones, the end. Its result is a line of JSON
that is written to --out at once; rows that are there already are left out, unless they failed. `--collect` brings such
files into the plan's order (a later line replaces an earlier one of the same label) and adds what the memory predictor
says of the course's own runs.

`speed_plan.py` says what a row is, and `speed_variants.py` what is timed. What was measured:
    tokens_per_second           tokens of a step, without padding, by its seconds: the median of the timed steps
    tokens_per_second_overall   all tokens of the timed steps by all their seconds: for mixed data, whose steps differ
    step_seconds, step_tokens, step_places, losses      of every step; places are tokens with padding
    first_step_seconds          compilation included, if there is any; `compiled_before` says how many files of earlier
                                rows the compilers' caches held
    peak_allocated_bytes, peak_reserved_bytes           of torch's allocator, over all these steps
    busy_share                  of the time, in which at least one kernel or copy was at work on the GPU: by the profiler
                                on one more step, or by nvidia-smi for rows that are not `profiled`
    bound_by                    "the CPU" if busy_share is below 0.9: such a row says nothing about a slower GPU
    nvidia_smi                  medians during the timed steps: utilisation in per cent, clock in MHz, power in W
    at_work, said               what the course's trainer chose for a memory budget; what it said of a setting that it
                                could not keep to, such as a missing compiler or package
    skipped_steps               float16: steps whose gradients overflowed
    load_seconds, seconds       until the trainer is built, and of the whole row, both without imports
    predicted_peak_allocated_bytes      by `qlora_helpers.memory.predict`; null and `not_predicted` where it refuses
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from data.scripts import ROOT
from data.scripts.measure import speed_plan, speed_process
from qlora_helpers.settings import GPU_OPTIMIZER
from qlora_helpers.units import GIB

__all__ = ["collect", "main", "markdown_table", "read_results"]

TABLE = ROOT / "data" / "measured" / "speed.json"
FINAL = ("ran", "out of memory")  # such a row need not be measured again


def read_results(path: Path) -> dict[str, dict]:
    """The results in a file, by label; the last of each counts. A line that was cut off by a kill is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["label"]] = row
    return found


def show(row: dict) -> str:
    name = f"{row['label']:52}"
    if row["outcome"] != "ran":
        return f"{name} {row['outcome']}: {row.get('error', '')[:300]}"
    peak = f"{row['peak_allocated_bytes'] / 2**30:6.2f} GiB" if "peak_allocated_bytes" in row else ""
    busy = f"busy {row['busy_share']:.0%}, bound by {row['bound_by']}" if "busy_share" in row else ""
    return (
        f"{name} {row['tokens_per_second']:9,.0f} tokens/s, overall {row['tokens_per_second_overall']:9,.0f} {peak} "
        f"first step {row['first_step_seconds']:.1f} s, {busy}; loss {row['losses'][-1]:.3f}; "
        f"{row['process_seconds']:.0f} s" + "".join(f"\n    {line}" for line in row.get("said", []))
    )


def collect(files: list[Path], table: Path) -> dict:
    """Bring results into the table, with predictions and in the plan's order.

    Rows of the table that were not measured again stay. Those of the files get the number of the next `call`: rows of one
    call were measured on the same card, one after the other.
    """
    results: dict[str, dict] = {}
    for file in files:
        if not file.is_file():
            raise SystemExit(f"--collect: there is no file {file}")
        results |= read_results(file)
    there = json.loads(table.read_text(encoding="utf-8"))["rows"] if table.is_file() else []
    call = max((row["call"] for row in there), default=0) + 1
    rows = {row["label"]: row for row in there} | {
        label: predicted(row) | {"call": call} for label, row in results.items()
    }
    places = {row["label"]: place for place, row in enumerate(speed_plan.rows())}
    found = sorted(rows.values(), key=lambda row: places.get(row["label"], len(places)))
    content = {"command": "python -m data.scripts.measure.speed", "rows": found}
    table.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


# the labels of the README's table, with what each is
README = {
    "8b bf16 4x2048 full articles": "the articles' recipe, with what stops it repaired",
    "8b bf16 4x2048 full trl": "plain TRL",
    "8b bf16 4x2048 full ours": "this course",
    "8b bf16 4x2048 full unsloth": "Unsloth",
    "8b bf16 4x2048 full ours liger": "`liger_layers`",
    "8b bf16 4x2048 full ours compiled": "`compile_layers`",
    "8b bf16 4x2048 full ours compiled 16-of-32": "the same, 16 of 32 layers checkpointed",
    "8b bf16 4x2048 full ours compiled none-checkpointed": "the same, no layer checkpointed",
    "8b bf16 4x2048 full ours compiled in-14.3GiB": '`compile_layers`, `memory_budget="14.3GiB"`',
    "8b bf16 4x2048 full ours compiled in-24GiB": '`compile_layers`, `memory_budget="24GiB"`',
    "8b bf16 4x2048 full ours compiled in-48GiB": '`compile_layers`, `memory_budget="48GiB"`',
    "8b bf16 4x2048 full ours compiled in-auto": '`compile_layers`, `memory_budget="auto"`',
    "8b bf16 32x1024 mixed ours": "mixed lengths, 32 chats padded",
    "8b bf16 12x1024x8 mixed ours packed compiled": "mixed lengths, 96 chats packed, `compile_layers`",
    "8b bf16 12x1024x8 mixed ours packed compiled none-checkpointed": "the same, no layer checkpointed",
    "8b bf16 8x1024 mixed unsloth packed": "mixed lengths, rows of 1,024 packed by Unsloth",
    "8b t4 4x2048 full ours compiled in-14GiB": 'float16, a T4\'s kernels: `compile_layers`, `memory_budget="14GiB"`',
    "8b t4 4x2048 full unsloth": "float16, a T4's kernels: Unsloth",
    "8b t4 1x32768 full ours offloaded liger": "float16, a T4's kernels, 32,768 tokens: `activation_offloading`, `liger_layers`",
}


def markdown_table(table: Path = TABLE) -> str:
    """The rows that the README shows: pace, in tokens that are no padding, and memory, measured and predicted."""
    rows = {row["label"]: row for row in json.loads(table.read_text(encoding="utf-8"))["rows"]}
    gpu, versions = rows[next(iter(README))]["gpu"], rows[next(iter(README))]["versions"]
    lines = [
        f"| 8B, bfloat16, on one {gpu} | tokens per second | peak, GiB | predicted | call |",
        "|---|---|---|---|---|",
    ]
    for label, what in README.items():
        row = rows[label]
        pace = row["tokens_per_second_overall" if row["data"] == "mixed" else "tokens_per_second"]
        said = row.get("predicted_peak_allocated_bytes")
        peaks = f"{row['peak_allocated_bytes'] / GIB:.2f} | {f'{said / GIB:.2f}' if said else ''}"
        lines.append(f"| {what} | {pace:,.0f} | {peaks} | {row['call']} |")
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "bitsandbytes"))
    lines += [
        "",
        f"Measured with {used}; Unsloth {rows['8b bf16 4x2048 full unsloth']['versions']['unsloth']} with its own TRL.",
    ]
    return "\n".join(lines)


def predicted(row: dict) -> dict:
    """A row without its configuration; with the predicted peak, if it is of the course's own trainer and ran on a GPU."""
    config = row.pop("config")
    if row["variant"] != "ours" or "peak_allocated_bytes" not in row:
        return row
    from data.scripts.measure.speed_variants import dtype_of, settings_of
    from qlora_helpers.memory import find_shape, predict

    more = row.get("at_work", {}) | {"memory_budget": None} if "memory_budget" in row["settings"] else {}
    more |= {"compute_dtype": dtype_of(row, False), "optimizer": GPU_OPTIMIZER}
    try:
        settings = settings_of(row | {"settings": row["settings"] | more})
        prediction = predict(find_shape(config), settings, "t4" if row["gear"] == "t4" else "h200")
    except ValueError as error:  # a setting that the predictor does not know
        return row | {"predicted_peak_allocated_bytes": None, "not_predicted": str(error)[:300]}
    return row | {"predicted_peak_allocated_bytes": prediction.peak_allocated_bytes}


def chosen(pattern: str, device: str, more: dict) -> list[dict]:
    """The rows whose label matches, those of the course's own with more settings."""
    found = [row for row in speed_plan.rows() if re.search(pattern, row["label"])]
    if device == "cpu":
        found = [row for row in found if row["variant"] != "unsloth"]
    for row in found:
        if more and row["variant"] == "ours":
            row["settings"] |= more
            row["label"] += "".join(f" {name}={value}" for name, value in more.items())
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="PATTERN", default="", help="a regular expression, searched in the labels")
    parser.add_argument("--out", type=Path, default=Path("speed.jsonl"), help="default: speed.jsonl")
    parser.add_argument("--limit-seconds", type=float, metavar="N", help="stop after so long, also within a row")
    parser.add_argument("--dry-run", action="store_true", help="list the rows and measure nothing")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny models, to test this script"
    )
    parser.add_argument("--unsloth-site", type=Path, metavar="FOLDER", help="a folder of packages, for Unsloth's rows")
    parser.add_argument(
        "--with", type=json.loads, default={}, dest="more", metavar="JSON", help="more Settings for ours"
    )
    parser.add_argument("--collect", type=Path, nargs="+", metavar="FILE", help="results to write into the table")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--ahead", type=int, default=0, metavar="N", help="so many of Unsloth's rows import it first")
    parser.add_argument("--waiting", action="store_true", help=argparse.SUPPRESS)  # a process for a row of Unsloth
    args = parser.parse_args(arguments)
    if args.waiting:
        speed_process.waiting()
        return 0
    if args.collect:
        content = collect(args.collect, args.table)
        print(f"{len(content['rows'])} rows in {args.table}")
        return 0
    rows, there = chosen(args.rows, args.device, args.more), read_results(args.out)
    if not rows:
        parser.error(f"no row matches --rows {args.rows!r}; see --dry-run")
    rows = [row for row in rows if there.get(row["label"], {}).get("outcome") not in FINAL]
    if args.dry_run:
        print(*(row["label"] for row in rows), f"{len(rows)} rows", sep="\n")
        return 0
    return measure_all(rows, args)


def measure_all(rows: list[dict], args: argparse.Namespace) -> int:
    """Measure rows one after the other; each is written at once."""
    started, failed, dry = time.perf_counter(), 0, args.device == "cpu"
    with tempfile.TemporaryDirectory(prefix="speed-") as made:
        folder = Path(made)
        speed_process.prepare_environment(folder)
        of_unsloth = [row["label"] for row in rows if row["variant"] == "unsloth"]
        # all at the same time, while this process imports the libraries for the others
        early = {label: speed_process.New(folder, args.unsloth_site) for label in of_unsloth[: args.ahead]}
        try:
            speed_process.import_libraries(dry)
            for process in early.values():
                process.wait_until_ready(started + speed_process.IMPORT_SECONDS)
            print(f"ready after {time.perf_counter() - started:.0f} s", flush=True)
            for row in rows:
                left = args.limit_seconds and max(0.0, args.limit_seconds - (time.perf_counter() - started))
                if row["variant"] == "unsloth":
                    run = early.get(row["label"]) or speed_process.New(folder, args.unsloth_site)
                else:
                    run = speed_process.Forked(folder)
                try:
                    result = run.result(row, dry, left)
                except speed_process.TimeIsOver:
                    print(f"--limit-seconds: stopped before {row['label']!r} was done", flush=True)
                    return 1
                with args.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(result) + "\n")
                print(show(result), flush=True)
                failed += result["outcome"] == "failed"
        finally:
            for process in early.values():
                process.end()
    print(f"{len(rows)} rows in {time.perf_counter() - started:.0f} s, {failed} of them failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
