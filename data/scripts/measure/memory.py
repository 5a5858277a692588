"""GPU memory of many fine-tuning runs: the tables with which the predictor (`qlora_helpers.memory`) is tested.

    python -m data.scripts.measure.memory --workers 8          # needs a GPU; writes data/measured/memory.json
    python -m data.scripts.measure.memory --fresh              # the rows of FRESH; writes data/measured/memory_fresh.json
    python -m data.scripts.measure.memory --families --workers 8    # NEW_FAMILIES; writes memory_families.json there, and
                                                               # the rows that are held out to memory_families_held_out.json
    python -m data.scripts.measure.memory --row "llama-3.2-1b qlora" --table FILE   # only the rows with these words
    python -m data.scripts.measure.memory --dry                # the same code with tiny models on a CPU, writes nothing

Every row runs in its own process. Models have real shapes and random weights, which are made on the GPU when
transformers' `from_pretrained` asks for them: it quantises, ties and allocates as it does with files. Then TRL's
unmodified SFTTrainer trains on full sequences without padding for four steps.

A row describes itself by `model`, `config` (as `AutoConfig.for_model` takes it), and the `MEMORY_SETTINGS` of its
`Settings`. What was measured, in bytes unless noted:
    loaded_bytes                allocated by torch after the model is loaded, before there are adapters
    trainer_bytes               allocated after the trainer is built and the adapters have their training dtype
    first_steps_peak_bytes      peak allocated in steps 1 and 2
    peak_allocated_bytes        peak allocated in steps 3 and 4, when the optimizer has its state
    peak_reserved_bytes         peak reserved by torch's allocator during training
    context_bytes               the size of the CUDA context, before there is a model
    device_used_bytes           the process's memory on the card at the end of training, including paged states
    device_used_by              how it was read: "mem_get_info" (the card's memory in use, minus what was in use before
                                the process started: only if no other row runs) or "nvml" (the driver's figure for this
                                process, which does not include managed memory: null with a paged optimizer)
    nvml_process_bytes          the driver's figure at the end of training; null if it gives none
    mem_get_info_used_bytes, nvml_used_before_bytes     what "mem_get_info" was computed from
    requires_grad_parameters    the number of trainable parameters
    skipped_steps               float16: steps whose gradients overflowed; they change no weight and do not count
    losses, seconds, train_seconds      of every step; of the whole row without imports; of training
Rows of NEW_FAMILIES also have
    allocated_at_start_bytes, reserved_at_start_bytes   when the first step begins, before its batch is on the GPU
    allocator                   torch's allocator in steps 1 and 2 ("first_steps"), and in steps 3 and 4 ("last_steps"):
                                the peaks of `torch.cuda.memory_stats`, each of them taken by itself; "all" is not
                                always the sum of its pools, whose peaks may be at other times
    segments_at_start, segments_at_end      how many segments the allocator holds when the first step begins and when the
                                last has ended: {pool: {bytes: how many}}
    evaluation_peak_bytes       peak allocated in `trainer.evaluate()` after training, with `eval_batch_size` sequences
                                at once; null without
Paged optimizers keep their state in managed memory, which torch's figures do not include.

`memory_plan.py` and `memory_families.py` list these runs, and say which are `held_out`.
"""

import argparse
import copy
import faulthandler
import gc
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

from qlora_helpers.units import GIB

if __name__ == "__main__":  # before torch is imported: rows share the cores, and threads do not survive a fork
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
import torch  # the other libraries touch CUDA at import: see load_libraries

from data.scripts import ROOT
from data.scripts.measure.memory_families import family_rows
from data.scripts.measure.memory_plan import all_rows

TABLE, FRESH_TABLE, FAMILIES_TABLE, HELD_OUT_TABLE = (
    ROOT / "data" / "measured" / f"memory{name}.json" for name in ("", "_fresh", "_families", "_families_held_out")
)
ROOM = 120  # GiB for all rows that run at the same time
TIMEOUT = 200  # seconds for one row
STEPS = 4  # steps that change the weights
FLOAT16_STEPS = (
    24  # loss scaling starts at 2^16 and halves at each overflow: at most this many until four have succeeded
)
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


# ---------------------------------------------------------------- one row, in its own process


def tiny(config: dict) -> dict:
    """A tiny model of the same architecture: the same number of query heads per key head, a layer of each kind.

    Every input of a linear layer has a multiple of 64 features, which bitsandbytes needs on a CPU.
    """
    of_heads = config.get("num_attention_heads") or config.get("n_head") or 8
    shared_by = of_heads // config.get("num_key_value_heads", of_heads)
    heads = shared_by if shared_by > 1 else 4
    by_layer = [name for name in ("layer_types", "no_rope_layers") if name in config]
    kinds = [*zip(*(config[name] for name in by_layer), strict=True)]
    kept = sorted({kind: place for place, kind in reversed([*enumerate(kinds)])}.values())  # the first of each kind
    kept = kept if len(kept) > 1 else [0, 1]
    width = 64 * shared_by
    small = {name: width for name in ("hidden_size", "n_embd", "word_embed_proj_dim")}
    small |= {name: len(kept) for name in ("num_hidden_layers", "n_layer")}
    small |= {name: [config[name][place] for place in kept] for name in by_layer}
    small |= {name: 128 for name in ("intermediate_size", "n_inner", "ffn_dim", "n_positions")}
    small |= {name: 4 for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    small |= {"num_attention_heads": heads, "n_head": heads, "num_key_value_heads": heads // shared_by}
    small |= {"head_dim": 64, "rotary_dim": 16, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
    small |= {"kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
    small |= {"attn_layer_indices": [1], "mamba_d_state": 16, "mamba_chunk_size": 32, "mamba_n_heads": width // 32}
    small |= {"block_multiple_of": 64, "image_size": 56, "mm_tokens_per_image": 4}
    if config.get("sliding_window"):
        small["sliding_window"] = 32  # half of the tokens
    parts = {name: tiny(part) for name, part in config.items() if name.endswith("_config")}
    words = {} if parts else {"vocab_size": 512}  # also where the class's default would be many
    return config | {name: size for name, size in small.items() if name in config} | words | parts


class RandomWeight:
    """A weight that is made when it is requested, like a slice of a safetensors file.

    Matrices are normal, biases 0, norms 1, except Gemma's norms, which multiply by 1 + weight.
    """

    def __init__(self, name: str, like: torch.Tensor, config, dtype: torch.dtype, device: str):
        self.shape, self.dtype, self.device = like.shape, dtype, device
        zero = name.endswith("bias") or config.model_type.startswith("gemma")
        self.constant = None if like.dim() > 1 else 0.0 if zero else 1.0

    def __getitem__(self, _) -> torch.Tensor:
        values = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        # in place: a second tensor of this size would fragment the allocator's blocks
        return values.normal_(std=0.02) if self.constant is None else values.fill_(self.constant)


def attention_of(row: dict, dry: bool) -> str:
    """Enable only the row's attention kernels; returns `attn_implementation` for transformers."""
    from qlora_helpers.models.attention import REPEATED_KV

    t4 = row.get("t4_kernels", False)
    if t4 or row["attention"] == "math":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(t4)
        torch.backends.cuda.enable_math_sdp(not t4 or dry)  # a CPU has no other kernel
    return "eager" if row["attention"] == "eager" else REPEATED_KV if t4 else "sdpa"


def build_model(row: dict, dry: bool):
    """The row's model on its device, loaded by `from_pretrained` with weights that are made on demand."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_helpers.models.cpu_faults import make_safe_on_cpu

    # a copy: transformers writes into nested dictionaries
    options = copy.deepcopy(tiny(row["config"]) if dry else row["config"])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    for part in (config, config.get_text_config()) if dry else ():
        part.pad_token_id = part.bos_token_id = part.eos_token_id = None  # they may be outside the vocabulary
    dtype, device = (torch.float32, "cpu") if dry else (getattr(torch, row["compute_dtype"]), "cuda")
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=row["double_quant"],
        bnb_4bit_compute_dtype=dtype,
    )
    model, loading = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict={
            name: RandomWeight(name, weight, config, dtype, device)
            for name, weight in meta.state_dict().items()
            if name not in meta.all_tied_weights_keys
        },
        dtype=dtype,
        device_map={"": "cpu" if dry else 0},
        quantization_config=four_bit if row["method"] == "qlora" else None,
        attn_implementation=attention_of(row, dry),
        output_loading_info=True,
    )
    if any(loading.values()) or any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise RuntimeError(f"weights and model do not match, or a part of the model was not made: {loading}")
    if dry:
        make_safe_on_cpu(model)
    return model


def random_sequences(model, count: int, tokens: int):
    """A dataset of full sequences of random words, none of them a special one."""
    import datasets

    words = min(model.config.get_text_config().vocab_size, getattr(model.config, "image_token_index", 2**31))
    return datasets.Dataset.from_dict({"input_ids": torch.randint(3, words, (count, tokens)).tolist()})


def build_trainer(model, row: dict, dry: bool, output: str, config_options: dict | None = None, **trainer_options):
    """TRL's trainer, or transformers', on full random sequences, the adapters in the row's dtype.

    Args:
        config_options, trainer_options: further options of SFTConfig and SFTTrainer; a row with whole logits has none.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    float16, tokens = row["compute_dtype"] == "float16", 64 if dry else row["max_length"]
    if row["upcast_fp32"]:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=row["gradient_checkpointing"])
    # the model's own loss, with the logits of all tokens, or TRL's
    whole = row.get("logits") == "whole"
    common = {
        "output_dir": output,
        "max_steps": FLOAT16_STEPS if float16 else STEPS,
        "per_device_train_batch_size": row["batch_size"],
        "gradient_accumulation_steps": row.get("accumulation", 1),
        "gradient_checkpointing": row["gradient_checkpointing"],
        "optim": "adamw_torch" if dry else row["optimizer"],
        "learning_rate": 1e-4,
        "bf16": not dry and not float16,
        "fp16": not dry and float16,
        "use_cpu": dry,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show the mean of the earlier losses instead of a NaN
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    config = TrainingArguments(**common) if whole else SFTConfig(**common, max_length=tokens, **config_options or {})
    config.per_device_eval_batch_size = row.get("eval_batch_size") or config.per_device_eval_batch_size
    config._n_gpu = min(config.n_gpu, 1)  # TRL refuses to split a batch over several GPUs
    lora = LoraConfig(
        r=row["rank"],
        lora_alpha=2 * row["rank"],
        lora_dropout=row["dropout"],
        target_modules=row["target_modules"],
        task_type="CAUSAL_LM",
    )
    train_dataset = random_sequences(model, row["batch_size"] * row.get("accumulation", 1) * STEPS, tokens)
    if whole:
        if row["method"] != "full":
            model = get_peft_model(model, lora)
            if row["gradient_checkpointing"]:
                model.enable_input_require_grads()  # as TRL does
        trainer = Trainer(
            model=model,
            args=config,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),  # labels are the tokens
        )
    else:
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=None if row["method"] == "full" else lora,
            **trainer_options,
        )
    # TRL makes a 4-bit base's adapters bfloat16, PEFT makes a 16-bit base's float32
    for parameter in trainer.model.parameters() if row["method"] != "full" else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if dry else getattr(torch, row["adapter_dtype"]))
    return trainer


def decoder_layers(model) -> list[torch.nn.Module]:
    """The layers of the language model that can be checkpointed, in their order: its longest list of such layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [
        [layer for layer in part if isinstance(layer, GradientCheckpointingLayer)]
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.ModuleList) and "vision" not in name
    ]
    return max(lists, key=len)


def allocator_peaks() -> dict:
    """{"reserved_bytes": {"small_pool": ...}, ...} since the last reset, and how often the allocator was out of memory."""
    stats = torch.cuda.memory_stats()
    peaks = {
        name: {pool: stats[f"{name}.{pool}.peak"] for pool in ("all", "small_pool", "large_pool")}
        for name in ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes", "segment")
    }
    return peaks | {name: stats[name] for name in ("num_alloc_retries", "num_ooms")}


def segments() -> dict:
    """{pool: {bytes: how many segments}}, the largest first."""
    found: dict = {"large": Counter(), "small": Counter()}
    for segment in torch.cuda.memory_snapshot():
        found[segment["segment_type"]][segment["total_size"]] += 1
    return {pool: {str(size): sizes[size] for size in sorted(sizes, reverse=True)} for pool, sizes in found.items()}


def watch(trainer, on_gpu: bool, checkpointed_layers: int | None = None):
    """A callback that records the peaks and stops after four steps that changed the weights.

    Args:
        checkpointed_layers: checkpoint only so many layers, the first ones. The trainer switches all on.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.peaks, self.skipped, self.done, self.at_start, self.allocator = [], [], 0, {}, []
            self.checkpointed = 0

        def on_step_begin(self, args, state, control, **kwargs):
            layers = decoder_layers(trainer.model)
            for place, layer in enumerate(layers if checkpointed_layers is not None else ()):
                layer.gradient_checkpointing = place < checkpointed_layers
            self.checkpointed = sum(layer.gradient_checkpointing for layer in layers)
            if on_gpu and not self.at_start:
                self.at_start = {
                    "allocated_at_start_bytes": torch.cuda.memory_allocated(),
                    "reserved_at_start_bytes": torch.cuda.memory_reserved(),
                    "segments_at_start": segments(),
                }

        def on_step_end(self, args, state, control, **kwargs):
            if trainer.accelerator.optimizer_step_was_skipped:
                self.skipped.append(state.global_step)
                return
            self.done += 1
            control.should_training_stop |= self.done == STEPS
            if on_gpu and self.done in (2, STEPS):
                self.peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
                self.allocator.append(allocator_peaks())
                torch.cuda.reset_peak_memory_stats()

    return Watch()


def nvml() -> tuple[int | None, int | None]:
    """Bytes in use on the first GPU, and by this process; None if the driver does not report them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        # version 2 leaves out the driver's own reserve, as `mem_get_info` does
        used = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except Exception as error:
        print(f"NVML: {error!r}", file=sys.stderr)
        return None, None
    return used, {process.pid: process.usedGpuMemory for process in processes}.get(os.getpid())


def used_at_rest() -> int | None:
    """Bytes in use on the first GPU once they no longer change: an earlier row may still be releasing memory."""
    used = nvml()[0]
    for _ in range(30):
        time.sleep(0.1)
        before, used = used, nvml()[0]
        if used == before:
            break
    return used


def on_the_card(alone: bool, before: int | None) -> dict:
    """This process's memory on the card, including the CUDA context; `before` was in use when it started."""
    free, total = torch.cuda.mem_get_info()
    own, by_card = nvml()[1], None if before is None else total - free - before
    return {
        "device_used_bytes": by_card if alone else own,
        "device_used_by": "mem_get_info" if alone else "nvml",
        "nvml_process_bytes": own,
        "mem_get_info_used_bytes": total - free if alone else None,
        "nvml_used_before_bytes": before,
    }


def allocated(on_gpu: bool) -> int | None:
    """Bytes that torch has allocated, after freeing everything unused; the peaks are reset."""
    gc.collect()
    if not on_gpu:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure(row: dict, dry: bool) -> dict:
    """Load, build, train; the measured fields of a row."""
    from transformers import set_seed

    alone, measured = row["alone"], {}
    before = used_at_rest() if alone and not dry else None
    if not dry:
        block = torch.zeros(1, device="cuda")  # creates the context
        used, reserved = on_the_card(alone, before)["device_used_bytes"], torch.cuda.memory_reserved()
        measured["context_bytes"] = None if used is None else used - reserved
        del block
    allocated(not dry)
    started = time.perf_counter()
    set_seed(0)
    model = build_model(row, dry)
    measured["loaded_bytes"] = allocated(not dry)
    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(model, row, dry, output)
        trained = [(p.numel(), str(p.dtype)) for p in trainer.model.parameters() if p.requires_grad]
        measured["requires_grad_parameters"] = sum(count for count, _ in trained)
        measured["trained_dtypes"] = sorted({dtype.removeprefix("torch.") for _, dtype in trained})
        checkpointed_layers = row.get("checkpointed_layers")
        if dry and checkpointed_layers is not None:
            checkpointed_layers = 1  # of two
        watcher = watch(trainer, not dry, checkpointed_layers)
        trainer.add_callback(watcher)
        measured["trainer_bytes"] = allocated(not dry)
        train_started = time.perf_counter()
        trainer.train()
        measured["train_seconds"] = round(time.perf_counter() - train_started, 1)
        on_card = {} if dry else on_the_card(alone, before)
        if "logits" in row:  # a row of NEW_FAMILIES
            measured |= family_figures(trainer, row, watcher, checkpointed_layers, not dry)
    if watcher.done < STEPS:
        raise RuntimeError(f"only {watcher.done} steps changed the weights; these overflowed: {watcher.skipped}")
    if not dry:
        (first, held_at_first), (peak, held) = watcher.peaks
        measured |= {"first_steps_peak_bytes": first, "peak_allocated_bytes": peak}
        measured |= {"peak_reserved_bytes": max(held_at_first, held)} | on_card
        if not alone and row["optimizer"].startswith("paged"):
            measured["device_used_bytes"] = None  # the driver's figure for a process does not include managed memory
    measured["skipped_steps"] = watcher.skipped
    measured["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return measured | {"seconds": round(time.perf_counter() - started, 1)}


def family_figures(trainer, row: dict, watcher, checkpointed_layers: int | None, on_gpu: bool) -> dict:
    """What is only measured in rows of NEW_FAMILIES: the allocator's state, and evaluation.

    Raises:
        RuntimeError: not as many layers were checkpointed as the row says.
    """
    total = len(decoder_layers(trainer.model)) if row["gradient_checkpointing"] else 0
    expected = total if checkpointed_layers is None else checkpointed_layers
    if watcher.checkpointed != expected:
        raise RuntimeError(f"{watcher.checkpointed} layers were checkpointed, not {expected}")
    figures: dict = {"evaluation_peak_bytes": None}
    if on_gpu:
        first_steps, last_steps = watcher.allocator
        figures |= watcher.at_start | {"segments_at_end": segments()}
        figures["allocator"] = {"first_steps": first_steps, "last_steps": last_steps}
    if row["eval_batch_size"] is not None:
        allocated(on_gpu)
        tokens = row["max_length"] if on_gpu else 64
        sequences = random_sequences(trainer.model, 2 * row["eval_batch_size"], tokens)
        figures["evaluation_loss"] = trainer.evaluate(sequences)["eval_loss"]
        figures["evaluation_peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
        figures["evaluation_reserved_bytes"] = torch.cuda.max_memory_reserved() if on_gpu else None
    return figures


def child(row: dict, dry: bool, log: Path, sender, measure=measure) -> None:
    """Measure one row and send the outcome; printed output goes to a log."""
    with open(log, "w", encoding="utf-8") as written:
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
    faulthandler.enable()
    try:
        outcome = {"outcome": "ran"} | measure(row, dry)
    except Exception as error:
        traceback.print_exc()
        too_much = isinstance(error, torch.OutOfMemoryError)
        outcome = {"outcome": "out of memory" if too_much else f"{type(error).__name__}: {error}"[:300]}
    sender.send(outcome)


# ---------------------------------------------------------------- all rows


def load_libraries(capability: str | None) -> None:
    """Import what the rows need, once: each row is then a fork of this process.

    The CUDA driver must not be called here, or no forked process could use the GPU. bitsandbytes queries the GPU at
    import, which would initialise CUDA, so this function answers the query.

    Args:
        capability: the GPU's compute capability, such as "9.0"; None without a GPU.
    """
    answers: dict = {"is_available": False}
    if capability:
        major, minor = capability.split(".")
        answers = {"is_available": True, "device_count": 1, "get_device_capability": (int(major), int(minor))}
    answering = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    with mock.patch.multiple(torch.cuda, **answering):
        import bitsandbytes  # noqa: F401
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer  # noqa: F401
        from trl import SFTTrainer  # noqa: F401

        import qlora_helpers.models.loading
        import qlora_helpers.training.trainer  # noqa: F401
    if torch.cuda.is_initialized():
        raise SystemExit("importing the libraries has initialised CUDA: no forked process can use the GPU now")


class Running:
    """A row that is being measured, in its own process."""

    def __init__(self, row: dict, dry: bool, folder: str, measure=measure):
        context = multiprocessing.get_context("fork")
        self.row, self.log, self.since = row, Path(folder, row["label"].replace(" ", "_")), time.monotonic()
        self.log.touch()
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=child, args=(row, dry, self.log, sender, measure))
        self.process.start()
        sender.close()  # only the child's copy is left, so this process sees when it ends

    def outcome(self) -> dict | None:
        """The outcome of the process; None while it runs. A process that takes too long is killed."""
        if self.process.is_alive():
            if time.monotonic() - self.since < TIMEOUT:
                return None
            self.process.kill()
            return {"outcome": f"not finished after {TIMEOUT} seconds"}
        try:
            return self.receiver.recv()
        except EOFError:
            return {"outcome": f"the process ended with {self.process.exitcode} and left nothing"}


def in_turn(rows: list[dict], workers: int, dry: bool, measure=measure):
    """Measure rows, several at a time if there is memory for all of them; yield each with its log when it ends.

    Rows marked `alone` come first, one at a time. `measure` is called in each row's process.
    """
    waiting, running = list(rows), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                for row in list(waiting):
                    alone = row["alone"] or any(run.row["alone"] for run in running)
                    if len(running) >= workers or (alone and running):
                        break
                    if not running or sum(run.row["gib"] for run in running) + row["gib"] <= ROOM:  # else a smaller one
                        waiting.remove(row)
                        running.append(Running(row, dry, folder, measure))
                time.sleep(0.05)
                for run in list(running):
                    if (outcome := run.outcome()) is not None:
                        running.remove(run)
                        yield (
                            run.row | outcome,
                            run.log.read_text(errors="replace", encoding="utf-8").splitlines()[-15:],
                        )
        finally:
            for run in running:
                run.process.kill()


class Table:
    """A table in a file, or only in memory if `path` is None; its rows keep the plan's order.

    Raises:
        SystemExit: the file is from another GPU or other versions than `about`.
    """

    def __init__(self, path: Path | None, about: dict, planned: list[dict]):
        self.path, self.content = path, about | {"rows": []}
        self.places = {row["label"]: place for place, row in enumerate(planned)}
        if path and path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        if unlike := {key: (self.content.get(key), about[key]) for key in about if self.content.get(key) != about[key]}:
            raise SystemExit(f"{path.name} was measured elsewhere; remove it or name another --table: {unlike}")

    def put(self, row: dict) -> None:
        """Put a row in its place, replace the row with its label, and write the file atomically."""
        rows = [row, *(old for old in self.content["rows"] if old["label"] != row["label"])]
        self.content["rows"] = sorted(rows, key=lambda one: self.places.get(one["label"], len(rows)))
        if self.path:
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path)


def gpu_about() -> dict:
    """Name, driver and compute capability of the first GPU, queried outside this process."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return dict(zip(("gpu", "driver", "compute_capability"), answer.split(", "), strict=True))


def show(row: dict) -> str:
    name = f"{row['label']:92}"
    if row["outcome"] != "ran":
        return name + row["outcome"]
    if row["held_out"] and "logits" in row:
        return f"{name} ran; its figures are held out; {row['seconds']:.0f} s"
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")
    peak, reserved, used = (f"{row[name] / GIB:6.2f}" if row.get(name) else "     ?" for name in names)
    return (
        f"{name} peak {peak} GiB, reserved {reserved}, on the card {used} (planned {row['gib']}); "
        f"{row['seconds']:.0f} s, {row['train_seconds']:.0f} of it training; loss {row['losses'][-1]:.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="the rows of FRESH, one at a time, and their table")
    parser.add_argument("--families", action="store_true", help="the rows of NEW_FAMILIES, and their two tables")
    parser.add_argument(
        "--row", metavar="LABEL", nargs="+", default=[""], help="only rows whose label contains one of these"
    )
    parser.add_argument("--missing", action="store_true", help="only rows that the table does not have as run")
    parser.add_argument("--list", action="store_true", help="show the rows and measure nothing")
    parser.add_argument("--table", type=Path, help="default: the one in data/measured, or none with --dry")
    parser.add_argument("--workers", type=int, default=1, help="rows at the same time")
    parser.add_argument("--dry", action="store_true", help="tiny models on a CPU, to test this script")
    args = parser.parse_args()
    planned = family_rows() if args.families else all_rows(args.fresh)
    rows = [
        row | {"alone": row["alone"] or args.workers == 1}
        for row in planned
        if any(words in row["label"] for words in args.row)
    ]
    if not rows:
        parser.error(f"no row matches --row {' '.join(args.row)}; see --list")
    if args.list:
        for row in rows:
            print("held out" if row["held_out"] else " " * 8, f"{row['gib']:4} GiB  {row['label']}")
        print(f"{len(rows)} rows, {sum(row['held_out'] for row in rows)} of them held out")
        return 0
    about: dict = {} if args.dry else gpu_about()
    about["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    about["command"] = "python -m data.scripts.measure.memory" + (
        " --families" if args.families else " --fresh" if args.fresh else ""
    )
    usual = FAMILIES_TABLE if args.families else FRESH_TABLE if args.fresh else TABLE
    path = args.table or (None if args.dry else usual)
    tables = {False: Table(path, about, planned)}
    tables[True] = tables[False]
    if args.families:
        tables[True] = Table(
            path and path.with_name(path.name.replace(FAMILIES_TABLE.stem, HELD_OUT_TABLE.stem)), about, planned
        )
    if args.missing:
        there = {row["label"] for table in tables.values() for row in table.content["rows"] if row["outcome"] == "ran"}
        rows = [row for row in rows if row["label"] not in there]
    load_libraries(about.get("compute_capability"))
    started, failed = time.monotonic(), 0
    for row, tail in in_turn(rows, args.workers, args.dry):
        print(show(row), flush=True)
        if row["outcome"] != "ran":
            failed += 1
            print(*(f"    {line}" for line in tail), sep="\n", flush=True)
        tables[row["held_out"]].put(row)
    print(f"{len(rows) - failed} of {len(rows)} rows ran, in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
