"""`python -m qlora_helpers memory`: will it fit, what takes the memory, and what helps."""

import argparse
import json
import textwrap
from dataclasses import asdict

from qlora_helpers.memory.catalogue import find_shape, known_models
from qlora_helpers.memory.gpus import GPU, find_gpu, known_gpus
from qlora_helpers.memory.ladder import cures
from qlora_helpers.memory.prediction import EAGER_ONLY, GIB, MIB, FineTuning, Prediction, predict
from qlora_helpers.memory.search import largest_batch, longest_sequence
from qlora_helpers.memory.shape import ModelShape

WIDTH, BAR = 100, 60  # characters
SEQ_LEN = 2_048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options. What they may be is checked by `FineTuning`, whose errors name what is allowed."""
    usual = FineTuning()
    parser.add_argument("model", nargs="?", help="a Hub name, a model's folder or its config.json")
    parser.add_argument("--gpu", default="t4", help="such as t4, l4, 4090, a100-80 (default: %(default)s)")
    parser.add_argument(
        "--seq-len",
        type=int,
        help=f"tokens per sequence (default: {SEQ_LEN:,}, or the model's longest if that is less)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per forward pass (default: %(default)s)")
    parser.add_argument("--method", default=usual.method, help="qlora, lora or full (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=usual.lora_rank, help="of the adapters (default: %(default)s)")
    parser.add_argument(
        "--dropout", type=float, default=usual.lora_dropout, help="of the adapters (default: %(default)s)"
    )
    parser.add_argument("--optimizer", default=usual.optimizer, help="transformers' optim (default: %(default)s)")
    parser.add_argument(
        "--compute-dtype", help="default: bfloat16; below compute capability 8.0 float16, float32 for full"
    )
    parser.add_argument("--adapter-dtype", default=usual.adapter_dtype, help="default: %(default)s")
    parser.add_argument(
        "--targets", default="all-linear", help="adapted layers, such as q_proj,v_proj (default: %(default)s)"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--no-double-quant", action="store_true", help="scales in float32")
    parser.add_argument("--upcast", action="store_true", help="prepare_model_for_kbit_training is called")
    parser.add_argument("--attention", default=usual.attention, help="sdpa, math or eager (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object; sizes in bytes")
    parser.add_argument("--list", action="store_true", help="print the known models and GPUs")


def command(args: argparse.Namespace) -> int:
    """Print the report: 0 if the run fits, 1 if it does not.

    Raises:
        ValueError: names the option's field, its value, and what is allowed.
        FileNotFoundError: there is no such config.json.
    """
    if args.list or not args.model:
        _print_known(args.json)
        return 0
    gpu, shape = find_gpu(args.gpu), find_shape(args.model)
    seq_len = args.seq_len
    if seq_len is None:
        seq_len = min(SEQ_LEN, shape.max_position_embeddings or SEQ_LEN)
    usual = "bfloat16"
    if gpu.compute_capability < (8, 0):
        usual = "float32" if args.method == "full" else "float16"  # torch trains no float16 weights with loss scaling
    run = FineTuning(
        method=args.method,
        compute_dtype=args.compute_dtype or usual,
        adapter_dtype=args.adapter_dtype,
        double_quant=not args.no_double_quant,
        lora_rank=args.rank,
        lora_dropout=args.dropout,
        target_modules="all-linear"
        if args.targets == "all-linear"
        else [name.strip() for name in args.targets.split(",")],
        batch_size=args.batch_size,
        seq_len=seq_len,
        gradient_checkpointing=not args.no_checkpointing,
        optimizer=args.optimizer,
        upcast_fp32=args.upcast,
        attention=args.attention,
    )
    prediction = predict(shape, run, gpu)
    found = as_dict(prediction)
    print(json.dumps(found, indent=1) if args.json else as_text(prediction, found))
    return 0 if prediction.fits else 1


def as_dict(prediction: Prediction) -> dict:
    """A prediction with all that follows from it, as JSON can hold it: sizes in bytes, whole numbers."""
    shape, run, gpu = prediction.shape, prediction.run, prediction.gpu
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "trainable_parameters": prediction.trainable_parameters,
        "gpu": gpu.name,
        "compute_capability": list(gpu.compute_capability),
        "run": asdict(run),
        "parts": prediction.parts,
        "peak_phase": prediction.peak_phase,
        "loaded_bytes": prediction.loaded_bytes,
        "peak_allocated_bytes": prediction.peak_allocated_bytes,
        "peak_reserved_bytes": prediction.peak_reserved_bytes,
        "device_bytes": prediction.device_bytes,
        "usable_bytes": gpu.usable_bytes,
        "spare_bytes": prediction.spare_bytes,
        "fits": prediction.fits,
        "largest_batch": largest_batch(shape, run, gpu),
        "longest_sequence": longest_sequence(shape, run, gpu),
        "max_position_embeddings": shape.max_position_embeddings,
        "host_bytes_to_load": prediction.host_bytes_to_load,
        "disk_bytes": prediction.disk_bytes,
        "cures": [
            {
                "what": change.what,
                "price": change.price,
                "steps": change.steps,
                "run": change.run and asdict(change.run),
                "device_bytes": change.prediction.device_bytes,
                "spare_bytes": change.prediction.spare_bytes,
            }
            for change in cures(shape, run, gpu)
        ],
    }


def _amount(size: int) -> str:
    """Bytes in words; small ones in MiB, so that what is not nothing does not read 0.0."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / GIB:6.2f} GiB"


def _described(run: FineTuning) -> str:
    words = [f"batch {run.batch_size:,} x {run.seq_len:,} tokens", run.compute_dtype]
    if run.method != "full":
        targets = run.target_modules if isinstance(run.target_modules, str) else "+".join(run.target_modules)
        words.append(f"rank {run.lora_rank} on {targets}")
        if run.adapter_dtype != "float32":
            words.append(f"adapters in {run.adapter_dtype}")
        if not run.lora_dropout:
            words.append("no dropout")
        if run.upcast_fp32:
            words.append("upcast to float32")
    words.append(run.optimizer)
    if not run.gradient_checkpointing:
        words.append("no checkpointing")
    if run.method == "qlora" and not run.double_quant:
        words.append("no double quantisation")
    if run.accumulation > 1:
        words.append(f"{run.accumulation:,} steps of accumulation")
    if run.attention != "sdpa":
        words.append(f"{run.attention} attention")
    return f"{run.method}: {', '.join(words)}"


def _notes(shape: ModelShape, run: FineTuning, gpu: GPU) -> list[str]:
    """What a reader should know before trusting the figures."""
    notes = []
    shared = shape.num_key_value_heads != shape.num_attention_heads and shape.model_type not in EAGER_ONLY
    if run.attention == "sdpa" and shared and gpu.compute_capability < (8, 0):
        notes.append(
            "this is with the course's attention (qlora_helpers.models.attention). transformers' own sdpa falls back to the math "
            "kernel on this card: --attention math"
        )
    trained = run.compute_dtype if run.method == "full" else run.adapter_dtype
    if run.compute_dtype == "float16" and trained != "float32":
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
    shape, run, gpu = prediction.shape, prediction.run, prediction.gpu
    of = f"{prediction.trainable_parameters:,} of {shape.parameters:,} parameters trained"
    lines = [_wrapped(f"{shape.name}: {of}"), _wrapped(_described(run), rest="  ")]
    lines += [_wrapped(note, "note: ", "  ") for note in _notes(shape, run, gpu)] + [""]

    parts = {name: size for name, size in prediction.parts.items() if size}
    largest = max(parts.values())
    lines.append(f"{'part':26}       GiB")
    for name, size in parts.items():
        bar = "#" * max(1, round(BAR * size / largest))
        lines.append(f"{name:26}{_gib(size)}  {bar}")

    host, disk = prediction.host_bytes_to_load, prediction.disk_bytes
    lines += [
        "",
        f"{'peak allocated':26}{_gib(prediction.peak_allocated_bytes)}  by torch, at: {prediction.peak_phase}",
        f"{'peak reserved':26}{_gib(prediction.peak_reserved_bytes)}  by torch, gaps included",
        f"{'on the card':26}{_gib(prediction.device_bytes)}  with CUDA context and paged optimizer",
        f"{'usable':26}{_gib(gpu.usable_bytes)}  {gpu.name}",
        "",
        f"fits with {_amount(prediction.spare_bytes)} to spare"
        if prediction.fits
        else f"does not fit: {_amount(-prediction.spare_bytes)} too much",
        *(["too close to promise: the real run may take a few per cent more or less"] if _close(prediction) else []),
        "",
        f"{'largest batch':26}{found['largest_batch']:6,}      of {run.seq_len:,} tokens each",
        f"{'longest sequence':26}{found['longest_sequence']:6,}      at batch {run.batch_size:,}{_limit(found)}",
        f"{'host memory to load':26}{_gib(host)}",
        f"{'disk':26}{_gib(disk)}",
    ]
    if found["cures"]:
        lines += ["", "What helps, the cheapest first:"]
        for number, change in enumerate(found["cures"], 1):
            together = change["run"] and len(change["steps"]) > 1
            what = change["what"]
            if together:
                what = "all of this together:"
            elif number > 1:
                what = f"or {what}"
            lines.append(_wrapped(what, f"{number:2}. ", "    "))
            if not together:
                lines.append(_wrapped(change["price"], "    costs: " if change["run"] else "    ", "    "))
            if together or not change["run"]:
                lines += [_wrapped(f"{what} (costs: {price})", "    - ", "      ") for what, price in change["steps"]]
            if change["run"]:
                lines.append(f"    then {_gib(change['device_bytes']).strip()} on the card")
    return "\n".join(lines)


def _close(prediction: Prediction) -> bool:
    """Whether the verdict hangs on less than 1 GiB or a tenth of what the run takes, whichever is less."""
    return abs(prediction.spare_bytes) < min(GIB, prediction.device_bytes / 10)


def _limit(found: dict) -> str:
    """Why the longest sequence is not longer, where memory is not the reason."""
    longest = found["max_position_embeddings"]
    if longest and found["longest_sequence"] > longest - 128:
        return f"; the model takes {longest:,}"
    return ""


def _print_known(as_json: bool) -> None:
    models = {name: find_shape(name) for name in known_models()}
    gpus = known_gpus()
    if as_json:
        of_models = {
            name: {"parameters": shape.parameters, "max_position_embeddings": shape.max_position_embeddings}
            for name, shape in models.items()
        }
        of_gpus = {key: {"name": gpu.name, "usable_bytes": gpu.usable_bytes} for key, gpu in gpus.items()}
        print(json.dumps({"models": of_models, "gpus": of_gpus}, indent=1))
        return
    print(f"{'model':40}{'parameters':>18}{'longest sequence':>18}")
    for name, shape in models.items():
        longest = f"{shape.max_position_embeddings:,}" if shape.max_position_embeddings else "not stated"
        print(f"{name:40}{shape.parameters:18,}{longest:>18}")
    print("and any other of these families by its folder or config.json\n")
    print(f"{'gpu':10}{'name':28}{'usable':>12}{'compute capability':>20}")
    for key, gpu in gpus.items():
        print(f"{key:10}{gpu.name:28}{_gib(gpu.usable_bytes):>12}{'{}.{}'.format(*gpu.compute_capability):>20}")
