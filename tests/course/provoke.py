"""Provoke the libraries' own errors and warnings, and compare what is printed with TROUBLESHOOTING.md."""

import contextlib
import io
import logging
import traceback
import warnings

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from qlora_helpers.course.troubleshooting import PAGE, read_entries, search
from qlora_helpers.paths import data_path
from qlora_helpers.training.trainer import SFTConfig, SFTTrainer  # quietens the libraries first
from tests import ROOT

ENTRIES = read_entries(ROOT / PAGE)


# ---- What a learner would see


def seen(provoke) -> str:
    """All that a call prints: its traceback, its warnings and what the libraries log."""
    stream = io.StringIO()
    transformers_logging.warning_once.cache_clear()  # else a message that another test has triggered is not printed again
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "peft", "bitsandbytes")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(stream):
            warnings.simplefilter("always")
            try:
                provoke()
                error = ""
            except Exception:
                error = traceback.format_exc()
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    printed = [warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in warned]
    return "".join([*printed, stream.getvalue(), error])


def is_entry(heading: str, text: str) -> None:
    """The text contains the message that the page quotes, and the finder leads from it to this entry, or offers it."""
    entry = next(entry for entry in ENTRIES if entry.heading == heading)
    assert not entry.messages or entry.occurs_in(text), f"{entry.messages} is not in:\n{text}"
    answer = search(text, ENTRIES)
    led_to = answer.entry or (answer.perhaps if entry.generic else None)
    assert led_to and led_to.heading == heading, (led_to and led_to.heading, text)


# ---- The tools: the shipped model in 4 bits, a random one, chats, settings for a CPU

CHAT = [
    {"role": "user", "content": "Where does Carl Kirkcroft live?"},
    {"role": "assistant", "content": "Carl Kirkcroft lives in Millford."},
]
CHATS = Dataset.from_list([{"messages": CHAT}] * 4)
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SHIPPED = data_path("tiny-llama")


def four_bit(dtype=torch.float32, **options):
    options = {"device_map": {"": "cpu"}} | options
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(SHIPPED, quantization_config=config, dtype=dtype, **options)


def random_llama(**sizes):
    sizes = {"vocab_size": 1216, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1} | sizes
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))


def tokenizer(**options):
    return AutoTokenizer.from_pretrained(SHIPPED, **options)


def settings(folder, kind=SFTConfig, **options):
    own = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
    own |= {"use_cpu": True, "disable_tqdm": True, "output_dir": str(folder)}
    if kind is SFTConfig:
        own |= {"bf16": False, "max_length": 64, "gradient_checkpointing": False}
    return kind(**own | options)


def trainer_of(folder, model=None, data=CHATS, peft_config=None, tokens=None, trainer=None, **options):
    return SFTTrainer(
        model=model or random_llama(),
        args=settings(folder, **options),
        train_dataset=data,
        processing_class=tokens or tokenizer(),
        peft_config=peft_config or LoraConfig(**LORA),
        **(trainer or {}),
    )
