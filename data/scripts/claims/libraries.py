"""Claims about libraries: names, arguments and defaults in the articles' code, tried on the installed versions."""

import importlib.metadata
import importlib.util
import io
import json
import logging
import logging.handlers
import re
import tempfile
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path

import accelerate
import bitsandbytes as bnb
import peft
import torch
import transformers
import trl
from datasets import load_dataset
from datasets.utils.logging import disable_progress_bar
from packaging.version import Version
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from data.scripts.claims.rules import NOWHERE, Finding, by_setting, claim, refusal, still_taken
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.paths import data_path

disable_progress_bar()
ON_CPU = {"output_dir": NOWHERE, "use_cpu": True}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL = str(data_path("tiny-llama"))


@contextmanager
def without_bars():
    """Switch off transformers' progress bars; afterwards, restore the setting."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


@cache
def tiny_shape():
    """The shipped model without its values."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(MODEL, trust_remote_code=False)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


# ---- names


@claim("A21.1")
def first_snippet_without_import_of_torch() -> Finding:
    code = "from transformers import BitsAndBytesConfig\nBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16)"
    said = refusal(exec, code, {})
    return by_setting(not said, value=said.partition(":")[0])


@claim("A46.1")
def names_can_be_imported() -> Finding:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments\n"
        "from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training\n"
        "from trl import SFTTrainer\nfrom datasets import load_dataset"
    )
    return by_setting(not refusal(exec, code, {}))


@claim("A73.1", "B52.1")
def lora_config_takes_the_arguments() -> Finding:
    said = refusal(
        peft.LoraConfig,
        r=16,
        lora_alpha=32,
        target_modules=SEVEN,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return by_setting(not said)


@claim("A109.1", "A112.1", "B237.1")
def version_and_memory_functions_exist() -> Finding:
    names = (
        "is_available",
        "get_device_name",
        "memory_allocated",
        "memory_summary",
        "max_memory_allocated",
        "empty_cache",
    )
    return by_setting(hasattr(bnb, "__version__") and all(hasattr(torch.cuda, name) for name in names))


@claim("A114.1")
def total_mem_is_an_attribute() -> Finding:
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text(encoding="utf-8")
    body = re.search(r"class _CudaDeviceProperties:\n((?: .*\n)+)", stub).group(1)
    attributes = re.findall(r"^    (\w+):", body, re.M)
    (similar,) = [name for name in attributes if name.startswith("total_mem")]
    return by_setting("total_mem" in attributes, value=similar, claimed="total_mem")


@claim("B137.1")
def login_command() -> Finding:
    scripts = importlib.metadata.entry_points(group="console_scripts")
    commands = [script.name for script in scripts if script.dist.name == "huggingface_hub"]
    return Finding(
        "right" if "huggingface-cli" in commands else "outdated", "hf" if "hf" in commands else "", "huggingface-cli"
    )


# ---- bitsandbytes


@claim("A106.1")
def bitsandbytes_is_installed_by_pip() -> Finding:
    files = importlib.metadata.files("bitsandbytes")
    return by_setting(any("libbitsandbytes_cuda" in file.name for file in files))


@claim("A116.1")
def bitsandbytes_needs_cuda() -> Finding:
    said = refusal(bnb.functional.quantize_4bit, torch.ones(64, 64))  # on the CPU
    backends = [
        name
        for name in ("cuda", "cpu", "xpu", "hpu", "mps")
        if importlib.util.find_spec(f"bitsandbytes.backends.{name}")
    ]
    return Finding("right" if said else "outdated", ", ".join(backends))


@claim("A117.1")
def apple_silicon_needs_another_library() -> Finding:
    found = importlib.util.find_spec("bitsandbytes.backends.mps.ops")
    kernels = Path(found.origin).read_text(encoding="utf-8") if found else ""
    has_4_bit = 'register_kernel("bitsandbytes::quantize_4bit", "mps")' in kernels
    return Finding("outdated" if has_4_bit else "right")


@claim("A118.1")
def oldest_bitsandbytes() -> Finding:
    needed = transformers.utils.import_utils.BITSANDBYTES_MIN_VERSION
    return Finding("right" if Version(needed) <= Version("0.42") else "outdated", needed, "0.42")


# ---- loading


@claim("A62.1")
def a_model_loads_with_these_arguments() -> Finding:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    with without_bars():
        said = refusal(load, MODEL, quantization_config=config, device_map="auto")
    return by_setting(not said)


@claim("B142.1")
def llama_needs_remote_code() -> Finding:
    said = refusal(tiny_shape)
    return by_setting(bool(said) or not tiny_shape().__class__.__module__.startswith("transformers.models.llama"))


def placed(room: dict) -> dict:
    """Where accelerate puts the parts of the shipped model, given each place's bytes, as with device_map="auto"."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that this machine has no such GPUs
    try:
        return accelerate.infer_auto_device_map(tiny_shape(), room, ["LlamaDecoderLayer"])
    finally:
        logger.setLevel(level)


def tiny_bytes() -> int:
    return sum(parameter.nbytes for parameter in tiny_shape().parameters())


@claim("B141.1")
def device_map_spreads_over_gpus() -> Finding:
    return by_setting(set(placed({0: tiny_bytes() // 2, 1: tiny_bytes()}).values()) == {0, 1})


@claim("B214.1")
def device_map_spreads_into_main_memory() -> Finding:
    found = placed({0: tiny_bytes() // 2, "cpu": tiny_bytes()})
    quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True))
    said = refusal(quantizer.validate_environment, device_map=found)
    if said and "dispatched on the CPU or the disk" not in said:
        raise RuntimeError(f"expected a refusal of parts on the CPU, and got {said}")
    spread = set(found.values()) == {0, "cpu"}
    return by_setting(spread, spread and not said)


@claim("B214.2")
def device_map_keeps_all_on_one_gpu() -> Finding:
    maps = [placed({0: room, "cpu": tiny_bytes()}) for room in (2 * tiny_bytes(), tiny_bytes() // 2)]
    return by_setting(*(set(found.values()) == {0} for found in maps))


@claim("B293.1")
def torch_dtype_is_the_argument() -> Finding:
    logger = logging.getLogger("transformers")
    heard = logging.handlers.BufferingHandler(100)
    kept, logger.handlers[:] = logger.handlers[:], [heard]
    transformers.utils.logging.warning_once.cache_clear()  # it may have been printed already
    try:
        with without_bars():
            said = refusal(transformers.AutoModelForCausalLM.from_pretrained, MODEL, torch_dtype=torch.float16)
    finally:
        logger.handlers[:] = kept
    gone = bool(said) or any("`torch_dtype` is deprecated" in record.getMessage() for record in heard.buffer)
    return Finding("outdated" if gone else "right", "dtype", "torch_dtype")


@claim("A122.1")
def load_dataset_reads_json_lines() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "my_data.jsonl"
        file.write_text(json.dumps({"question": "Why?", "answer": "Because."}) + "\n", encoding="utf-8")
        rows = load_dataset("json", data_files=str(file), split="train", cache_dir=folder)
        return by_setting(rows[0] == {"question": "Why?", "answer": "Because."})


@claim("A131.1")
def chat_template_gives_text() -> Finding:
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    text = load_tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    return by_setting(isinstance(text, str) and "Because." in text)


# ---- the trainer's arguments


@claim("A142.1", "B190.1")
def warmup_ratio_is_taken() -> Finding:
    return still_taken(TrainingArguments, "warmup_ratio", warmup_ratio=0.03, **ON_CPU)


@claim("B191.1")
def group_by_length_is_taken() -> Finding:
    return still_taken(TrainingArguments, "group_by_length", group_by_length=True, **ON_CPU)


@claim("A148.2")
def gradient_checkpointing_is_the_argument() -> Finding:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        TrainingArguments(gradient_checkpointing=True, **ON_CPU)
    gone = any("`gradient_checkpointing` is deprecated" in str(warning.message) for warning in heard)
    return Finding("outdated" if gone else "right", "activation_checkpointing", "gradient_checkpointing")


@claim("A147.1", "A201.1")
def paged_optimizers_have_these_names() -> Finding:
    names = {name.value for name in transformers.training_args.OptimizerNames}
    return by_setting({"paged_adamw_8bit", "paged_adamw_32bit"} <= names)


@claim("A137.1")
def other_training_arguments_are_taken() -> Finding:
    said = refusal(
        TrainingArguments, num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=4, learning_rate=2e-4,
        logging_steps=10, save_strategy="epoch", fp16=False, bf16=True, optim="paged_adamw_8bit", max_grad_norm=0.3,
        lr_scheduler_type="cosine", max_steps=-1, report_to="tensorboard", **ON_CPU,
    )  # fmt: skip
    return by_setting(not said)


@claim("B187.1")
def fp16_must_be_false_with_bf16() -> Finding:
    said = refusal(TrainingArguments, fp16=True, bf16=True, **ON_CPU)
    return by_setting("At most one of fp16 and bf16" in said)


@claim("A155.1", "B202.1")
def trainer_takes_tokenizer() -> Finding:
    return still_taken(trl.SFTTrainer, "tokenizer", model=None, tokenizer=None)


@claim("A158.1", "B201.1")
def trainer_takes_max_seq_length() -> Finding:
    return still_taken(trl.SFTTrainer, "max_seq_length", model=None, max_seq_length=2048)


@claim("A159.1", "B200.1")
def trainer_takes_dataset_text_field() -> Finding:
    return still_taken(trl.SFTTrainer, "dataset_text_field", model=None, dataset_text_field="text")


@claim("B186.1")
def epochs_override_max_steps() -> Finding:
    planned = []
    for max_steps in (-1, 3):
        args = TrainingArguments(
            max_steps=max_steps, num_train_epochs=1, per_device_train_batch_size=1, report_to="none", **ON_CPU
        )
        trainer = transformers.Trainer(torch.nn.Linear(1, 1), args, train_dataset=[{"x": 0}] * 8)
        planned.append(trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1])
    return by_setting(planned[0] == planned[1], value=f"{planned[1]} steps", shown=[f"{planned[0]}", "1"])


@claim("C49.1")
def lora_has_an_adapter_in_each_layer() -> Finding:
    by_default = set(peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"])
    with redirect_stdout(io.StringIO()):
        wrapped = peft.get_peft_model(tiny_shape(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    everywhere = {name.rpartition(".")[2] for name in wrapped.base_model.targeted_module_names}
    wrapped.unload()
    linear = set(SEVEN)
    return by_setting(by_default == linear, everywhere == linear, value=f"{len(by_default)} of {len(linear)}")
