"""TROUBLESHOOTING.md: its messages are those of the installed libraries, and each is found from what a learner pastes.

The first part provokes each message with the real libraries, on the CPU; what needs a GPU is in
tests/gpu/test_troubleshooting_on_a_gpu.py.
"""

import ast
import contextlib
import gc
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import textwrap
import time
import types
import weakref
from functools import cache

import pytest
import torch
from packaging.version import Version

from qlora_helpers.__main__ import main
from qlora_helpers.course.troubleshooting import (
    PAGE,
    Entry,
    _literals,
    _shared_runs,
    _shares_of_words,
    find,
    read_entries,
    report,
    search,
)
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.training.trainer import SFTConfig, SFTTrainer  # quietens the libraries first
from tests.colab.environment import stand_in
from tests.course.provoke import (
    CHAT,
    CHATS,
    ENTRIES,
    LORA,
    ROOT,
    SHIPPED,
    four_bit,
    is_entry,
    random_llama,
    seen,
    settings,
    tokenizer,
    trainer_of,
)

import bitsandbytes as bnb  # isort: skip
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.import_utils import is_torchao_available
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

TEXT = (ROOT / PAGE).read_text()
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))


# ---- Installing and importing


@pytest.mark.parametrize(
    "how", [["-m", "qlora_helpers"], ["-c", "import qlora_helpers.training.run"], ["-c", "import torch"]]
)
def test_the_course_s_package_is_not_found(how):
    """-I and -S leave this Python as bare as a kernel of another environment."""
    done = subprocess.run([sys.executable, "-I", "-S", *how], capture_output=True, text=True, check=False)
    is_entry("No module named 'qlora_helpers', 'torch' or another package of the course", done.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_is_asked_for_and_there_is_none():
    heading = "Torch not compiled with CUDA enabled"
    is_entry(heading, seen(lambda: bnb.functional.get_4bit_type("nf4")))
    is_entry(heading, seen(lambda: torch.ones(1).cuda()))


def test_bitsandbytes_is_not_found(monkeypatch):
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    is_entry("bitsandbytes is asked for although it is installed", seen(four_bit))


def test_the_device_is_not_supported(monkeypatch):
    monkeypatch.setattr(bnb, "supported_torch_devices", {"a device of another make"})
    is_entry("None of the available devices are supported by bitsandbytes", seen(four_bit))


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16; bitsandbytes sees none")
def test_bitsandbytes_misses_an_optional_package(monkeypatch):
    """Its module is run again under another name, because a second process would take seconds."""
    monkeypatch.setitem(sys.modules, "kernels", None)  # as if it were not installed
    monkeypatch.setattr(bnb._ops, "register_kernel", lambda *names: lambda function: function)
    origin = importlib.util.find_spec("bitsandbytes.backends.cpu.ops").origin
    spec = importlib.util.spec_from_file_location("bitsandbytes.backends.cpu.again", origin)
    module = importlib.util.module_from_spec(spec)
    is_entry("Failed to load CPU gemm_4bit_forward", seen(lambda: spec.loader.exec_module(module)))


def needs(package: str, version: str) -> None:
    """Skip where a package is older than what the page's entry names, as Colab's may be."""
    if Version(importlib.metadata.version(package)) < Version(version):
        pytest.skip(f"{package} {importlib.metadata.version(package)}: the entry is about {version} and later")


def test_the_command_of_the_hub_is_called_hf():
    needs("huggingface_hub", "2.0")
    commands = {point.name for point in importlib.metadata.distribution("huggingface_hub").entry_points}
    assert "hf" in commands and "huggingface-cli" not in commands
    is_entry("huggingface-cli: command not found", "bash: line 1: huggingface-cli: command not found")


def test_flash_attention_is_not_installed():
    if "flash-attn" in {name.metadata["Name"] for name in importlib.metadata.distributions()}:
        pytest.skip("flash-attn is installed")
    model = lambda: AutoModelForCausalLM.from_pretrained(SHIPPED, attn_implementation="flash_attention_2")  # noqa: E731
    is_entry("FlashAttention2 has been toggled on, but it cannot be used", seen(model))


def test_the_normal_map_needs_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)  # as if it were not installed
    is_entry("Scipy is required for create_normal_map", seen(bnb.functional.create_normal_map))


def test_bitsandbytes_is_used_without_its_library():
    library = bnb.cextension.ErrorHandlerMockBNBNativeLibrary("No compatible CUDA binary found at /some/where")
    is_entry("CUDA Setup failed despite GPU being available", seen(lambda: library.cquantize()))


def test_torchao_is_too_old(monkeypatch, tmp_path):
    stand_in(tmp_path, "torchao", "0.10.0", imports=["torchao"])
    monkeypatch.syspath_prepend(tmp_path)
    is_torchao_available.cache_clear()  # else PEFT remembers that it found no torchao
    get_peft_model(four_bit(), LoraConfig(**LORA))  # layers in 4 bits are matched before torchao is looked for
    in_32_bit = lambda: get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))  # noqa: E731
    is_entry("Found an incompatible version of torchao", seen(in_32_bit))


NAMES_THAT_ARE_GONE = [
    "trl.DataCollatorForCompletionOnlyLM", "trl.setup_chat_format", "trl.ConstantLengthDataset",
    "trl.trainer.utils.PeftSavingCallback", "trl.AutoModelForCausalLMWithValueHead", "trl.PPOTrainer",
    "peft.prepare_model_for_int8_training", "transformers.AdamW", "datasets.load_metric", "huggingface_hub.HfFolder",
    "huggingface_hub.cached_download",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_THAT_ARE_GONE)
def test_names_that_are_gone(name):
    module, _, attribute = name.rpartition(".")
    text = seen(lambda: exec(f"from {module} import {attribute}"))
    is_entry("A class or function is gone: cannot import name", text)
    assert f"`{attribute}`" in find(text, ENTRIES).cure


def test_what_took_the_place_of_gone_names_is_there():
    from huggingface_hub import get_token, hf_hub_download
    from torch.optim import AdamW
    from trl import clone_chat_template, experimental

    assert all((get_token, hf_hub_download, AdamW, clone_chat_template, experimental, prepare_model_for_kbit_training))
    names = inspect.signature(SFTConfig.__init__).parameters
    assert {"assistant_only_loss", "packing"} <= set(names)


@pytest.mark.parametrize("name", ["HybridCache", "SlidingWindowCache"])
def test_a_cache_that_is_gone(name):
    text = seen(lambda: exec(f"from transformers import {name}"))
    is_entry("cannot import name 'HybridCache' from 'transformers'", text)


def test_the_disk_is_full():
    """Linux's /dev/full refuses every byte with this error."""

    def fill():
        with open("/dev/full", "w", encoding="utf-8") as file:
            file.write("a checkpoint")

    is_entry("No space left on device: the disk is full", seen(fill))


# ---- Loading a model


@pytest.mark.parametrize("elsewhere", ["cpu", "disk"])
def test_modules_lie_on_the_cpu_or_the_disk(elsewhere):
    split = {"model": "cpu" if elsewhere == "disk" else 0, "lm_head": elsewhere}
    is_entry("Some modules are dispatched on the CPU or the disk", seen(lambda: four_bit(device_map=split)))


MIXTURE = {
    "model_type": "qwen3_moe", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}  # fmt: skip


def test_a_mixture_is_not_in_4_bits():
    from qlora_helpers.models.in_4_bits import planned_4_bits, refuse_unless_mostly

    shown = seen(lambda: refuse_unless_mostly(planned_4_bits(MIXTURE, name="a mixture"), "nf4"))
    is_entry('A "4-bit" model comes mostly in 16 bits', shown)


def test_experts_take_no_dropout():
    from qlora_helpers.models.meta import meta_model

    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    mixed = MIXTURE | {"decoder_sparse_step": 2}  # with a dense layer, whose names the experts once had
    is_entry("LoRA on experts does not work with dropout", seen(lambda: get_peft_model(meta_model(mixed), lora)))


@pytest.mark.parametrize("status", [401, 403])
def test_the_hub_refuses_a_gated_model(status, monkeypatch):
    """The Hub's answer is made up; what the libraries say about it is real."""
    from huggingface_hub.utils import _http
    from transformers.utils import hub

    httpx = _http.httpx2 if hasattr(_http, "httpx2") else _http.httpx  # of huggingface_hub 1 and older

    def refuse(*args, **options):
        request = httpx.Request("GET", "https://huggingface.co/some/model/resolve/main/config.json")
        headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model some/model is restricted."}
        _http.hf_raise_for_status(httpx.Response(status, headers=headers, request=request))

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    text = seen(lambda: AutoModelForCausalLM.from_pretrained("some/model"))
    is_entry("You are trying to access a gated repo", text)
    assert f"{status} Client Error" in text and "Cannot access gated repo for url" in text


def test_the_hub_cannot_be_reached():
    text = seen(lambda: AutoModelForCausalLM.from_pretrained("some/model"))  # the tests run offline
    is_entry("We couldn't connect to the Hub to load the files", text)


@pytest.mark.parametrize("name", ["./no-such-folder", "runs/latest/adapter"])
def test_a_folder_that_is_not_there(name):
    is_entry("Repo id must use alphanumeric chars", seen(lambda: AutoTokenizer.from_pretrained(name)))


@pytest.mark.parametrize("old", ["load_in_4bit", "load_in_8bit"])
def test_4_bit_is_asked_for_in_the_old_way(old):
    text = seen(lambda: AutoModelForCausalLM.from_pretrained(SHIPPED, **{old: True}))
    is_entry("Unexpected keyword argument 'load_in_4bit'", text)


def test_a_misspelt_option_is_dropped():
    made = []
    text = seen(lambda: made.append(BitsAndBytesConfig(load_in_4bit=True, load_4bit_use_double_quant=True)))
    assert text == "" and made[0].bnb_4bit_use_double_quant is False
    assert made[0].bnb_4bit_quant_type == "fp4" and made[0].bnb_4bit_compute_dtype == torch.float32
    is_entry(
        "A misspelt option of BitsAndBytesConfig does nothing", "load_4bit_use_double_quant misspelt, nothing printed"
    )


def test_torch_dtype_is_called_dtype():
    text = seen(lambda: AutoModelForCausalLM.from_pretrained(SHIPPED, torch_dtype=torch.float32))
    is_entry("`torch_dtype` is deprecated", text)


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.float16), lambda model: model.half()])
def test_a_4_bit_model_is_cast(cast):
    is_entry("A 4-bit model cannot be cast or moved", seen(lambda: cast(four_bit())))


def test_a_model_without_numbers_is_moved():
    with torch.device("meta"):
        model = random_llama()
    is_entry("Cannot copy out of meta tensor; no data!", seen(lambda: model.to("cpu")))


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM])
def test_a_folder_without_a_model(kind, tmp_path):
    text = seen(lambda: kind.from_pretrained(str(tmp_path)))
    is_entry("No file named config.json: it is an adapter", text)


def test_a_model_that_is_too_new(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of_next_year"}', encoding="utf-8")
    text = seen(lambda: AutoModelForCausalLM.from_pretrained(str(tmp_path)))
    is_entry("Architecture not recognized: the model is too new", text)


def test_mxfp4_is_not_trained(tmp_path):
    """The model only says that it is in MXFP4; what the trainer says about that is real."""
    from transformers import Mxfp4Config

    assert "dequantize" in inspect.signature(Mxfp4Config.__init__).parameters  # the cure
    model = get_peft_model(random_llama(), LoraConfig(**LORA))
    model.is_quantized = True
    model.hf_quantizer = types.SimpleNamespace(is_trainable=False, quantization_config=Mxfp4Config())
    build = lambda: Trainer(model, settings(tmp_path, kind=TrainingArguments), train_dataset=CHATS)  # noqa: E731
    is_entry("Quantised with MXFP4, which cannot be trained", seen(build))


# ---- Setting up the run


# What SFTTrainer of TRL 0.8.6, 0.9.6 or 0.12.2 took, and this one does not, from the signatures in their wheels.
OLD_OF_THE_TRAINER = (
    "tokenizer max_seq_length dataset_text_field packing dataset_num_proc dataset_kwargs model_init_kwargs neftune_noise_alpha "
    "eval_packing infinite num_of_sequences chars_per_token dataset_batch_size model_init"
).split()


@pytest.mark.parametrize("old", OLD_OF_THE_TRAINER)
def test_the_trainer_does_not_know_an_old_argument(old):
    text = seen(lambda: SFTTrainer(model=None, **{old: None}))
    is_entry("SFTTrainer got an unexpected keyword argument", text)
    assert re.search(rf"`{old}\b", find(text, ENTRIES).cure)


def test_the_config_takes_what_the_trainer_no_longer_does():
    now = set(inspect.signature(SFTConfig.__init__).parameters)
    gone = {
        "tokenizer",
        "max_seq_length",
        "infinite",
        "num_of_sequences",
        "chars_per_token",
        "dataset_batch_size",
        "model_init",
    }
    assert now & set(OLD_OF_THE_TRAINER) == set(OLD_OF_THE_TRAINER) - gone


# What old versions took and these do not, and the last of them that did: transformers 4.38.2, 4.46.3 and 4.57.1, and
# TRL 0.9.6, 0.12.2, 0.17.0, 0.23.1 and 0.29.0, from the signatures in their wheels.
GONE = json.loads((ROOT / "tests/course/cases/gone_arguments.json").read_text(encoding="utf-8"))
OLD = sorted({name for names in GONE.values() for name in names})


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
@pytest.mark.parametrize("old", OLD)
def test_the_settings_do_not_know_an_old_option(kind, old, tmp_path):
    text = seen(lambda: settings(tmp_path, kind=kind, **{old: None}))
    is_entry("TrainingArguments or SFTConfig got an unexpected keyword argument", text)
    assert f"For `{old}`: " in report(search(text, ENTRIES))


def test_every_argument_that_is_gone_has_its_cure():
    entry = next(entry for entry in ENTRIES if entry.heading.startswith("TrainingArguments or SFTConfig got"))
    rows = {
        name: cure
        for names, cure in re.findall(r"^\| (`.+) \| (.+) \|$", entry.cure, re.M)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert set(rows) == set(OLD)
    now = set(inspect.signature(SFTConfig.__init__).parameters)
    assert not now.intersection(OLD)
    for old, new in rows.items():
        names = re.findall(r"`(\w+)(?:=[^`]*)?`", new)
        assert all(name in now | {"SFTConfig"} or name.isupper() for name in names), (old, new)
        assert names or "leave it out" in new


def test_the_new_names_of_old_options_are_known(tmp_path):
    new = {"warmup_steps": 0.03, "train_sampling_strategy": "group_by_length", "eval_strategy": "no"}
    made = settings(tmp_path, max_length=8, **new)
    assert made.get_warmup_steps(1_000) == 30 and made.max_length == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_default_settings_need_a_gpu(tmp_path):
    is_entry("Your setup doesn't support bf16/gpu", seen(lambda: SFTConfig(output_dir=str(tmp_path))))


def test_two_adapters_at_once(tmp_path):
    model = get_peft_model(random_llama(), LoraConfig(**LORA))
    is_entry("A PeftModel together with a peft_config", seen(lambda: trainer_of(tmp_path, model)))


def test_a_quantised_model_without_an_adapter(tmp_path):
    build = lambda: SFTTrainer(four_bit(), settings(tmp_path), train_dataset=CHATS, processing_class=tokenizer())  # noqa: E731
    is_entry("You cannot perform fine-tuning on purely quantized models", seen(build))


def prepared(device_map, monkeypatch, processes=1, bypass=False):
    """What accelerate says to a model whose layers lie there. Where they lie, and how many processes there are, is made up."""
    import accelerate.accelerator
    from accelerate.utils import DistributedType

    model = random_llama()
    model.is_loaded_in_4bit, model.hf_device_map = True, device_map
    monkeypatch.setattr(accelerate.accelerator, "is_bitsandbytes_multi_backend_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_BYPASS_DEVICE_MAP", str(bypass).lower())
    if processes > 1:
        kind = property(lambda self: DistributedType.MULTI_GPU)
        monkeypatch.setattr(accelerate.accelerator.Accelerator, "distributed_type", kind)
        monkeypatch.setattr(
            accelerate.accelerator.AcceleratorState, "distributed_type", DistributedType.MULTI_GPU, raising=False
        )
        monkeypatch.setattr(accelerate.accelerator.Accelerator, "verify_device_map", lambda self, model: True)
    return seen(lambda: accelerate.Accelerator(cpu=True).prepare_model(model))


@pytest.mark.parametrize(
    ("device_map", "processes", "bypass"),
    [({"model": 0, "lm_head": 1}, 2, False), ({"model": 0, "lm_head": 1}, 2, True), ({"": 1}, 1, False)],
)
def test_the_model_is_not_on_the_process_s_gpu(device_map, processes, bypass, monkeypatch):
    text = prepared(device_map, monkeypatch, processes, bypass)
    is_entry("You can't train a model that has been loaded with device_map='auto'", text)


def test_layers_that_are_offloaded_are_not_trained(monkeypatch):
    text = prepared({"model": 0, "lm_head": "disk"}, monkeypatch)
    is_entry("You can't train a 4-bit model with CPU or disk offload", text)


def test_an_adapter_on_the_output_head(tmp_path):
    lora = LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]})
    is_entry("An adapter on lm_head is not supported", seen(lambda: trainer_of(tmp_path, peft_config=lora)))


def test_the_layers_have_other_names():
    lora = LoraConfig(**LORA | {"target_modules": ["query_key_value"]})
    text = seen(lambda: get_peft_model(random_llama(), lora))
    is_entry("Target modules not found in the base model", text)


def test_peft_does_not_know_where():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2))
    layers.config = {"model_type": "of_no_known_kind"}
    is_entry("Please specify target_modules in peft_config", seen(lambda: get_peft_model(layers, LoraConfig())))


def test_every_layer_is_excluded():
    lora = LoraConfig(**LORA | {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]})
    is_entry("No modules were targeted for adaptation", seen(lambda: get_peft_model(random_llama(), lora)))


def test_a_block_is_no_layer():
    lora = LoraConfig(**LORA | {"target_modules": ["self_attn"]})
    text = seen(lambda: get_peft_model(random_llama(), lora))
    is_entry("Target module is not supported", text)


def test_long_texts_are_cut_in_silence(tmp_path):
    texts = Dataset.from_list([{"text": "a " * 3_000}])
    trainers = []
    args = settings(tmp_path, kind=TrainingArguments)
    build = lambda: trainers.append(  # noqa: E731
        SFTTrainer(random_llama(), args, train_dataset=texts, processing_class=tokenizer(model_max_length=10_000))
    )
    text = seen(build)
    assert "1024" not in text and "cut" not in text
    assert trainers[0].args.max_length == len(trainers[0].train_dataset[0]["input_ids"]) == 1024
    is_entry("Sequences are cut at 1,024 tokens without a word", "sequences silently cut at 1024 tokens")


def test_the_text_begins_with_two_bos_tokens(tmp_path):
    tokens = tokenizer()
    bos = tokens.bos_token_id
    assert tokens("a")["input_ids"][0] == bos  # the tokenizer adds one, like Llama's
    text = tokens.apply_chat_template(CHAT, tokenize=False)
    as_text = trainer_of(tmp_path, data=Dataset.from_list([{"text": text}])).train_dataset[0]["input_ids"]
    as_chat = trainer_of(tmp_path).train_dataset[0]["input_ids"]
    assert as_text[:2] == [bos, bos] and as_chat[0] == bos != as_chat[1]
    is_entry("The text begins with two BOS tokens", "input_ids starts with a double BOS token")


def with_template(template):
    tokens = tokenizer()
    tokens.chat_template = template
    return tokens


def test_there_is_no_chat_template(tmp_path):
    text = seen(lambda: trainer_of(tmp_path, tokens=with_template(None)))
    is_entry("tokenizer.chat_template is not set", text)


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def test_the_template_marks_no_answers(tmp_path):
    text = seen(lambda: trainer_of(tmp_path, tokens=with_template(PLAIN), assistant_only_loss=True))
    is_entry("The chat template is not training-compatible", text)


LIKE_GEMMA = """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{ m.content }}{% endfor %}"""


def test_two_questions_in_a_row():
    text = seen(lambda: with_template(LIKE_GEMMA).apply_chat_template([CHAT[0], *CHAT], tokenize=False))
    is_entry("Conversation roles must alternate user/assistant", text)


def test_a_template_without_a_system_role():
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    text = seen(lambda: with_template(LIKE_GEMMA).apply_chat_template(chat, tokenize=False))
    is_entry("System role not supported", text)


def test_answers_are_wanted_of_plain_text(tmp_path):
    data = Dataset.from_list([{"text": "Carl lives in Millford."}])
    text = seen(lambda: trainer_of(tmp_path, data=data, assistant_only_loss=True))
    is_entry("assistant_only_loss, but the dataset is not conversational", text)


def test_a_chat_without_an_answer(tmp_path):
    data = Dataset.from_list([{"messages": CHAT[:1]}])
    text = seen(lambda: trainer_of(tmp_path, data=data, assistant_only_loss=True))
    is_entry("At least one example has no assistant tokens", text)


def test_the_closing_token_is_not_learnt(tmp_path):
    marked = "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
    template = f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ m.content }}}}{{% else %}}{marked}{{% endif %}}{{% endfor %}}"
    text = seen(lambda: trainer_of(tmp_path, tokens=with_template(template), assistant_only_loss=True))
    is_entry("The end-of-turn token is not in the loss mask", text)


def test_the_data_has_other_columns(tmp_path):
    data = Dataset.from_list([{"question": "Where?", "answer": "There."}])
    is_entry("KeyError: 'text'", seen(lambda: trainer_of(tmp_path, data=data)))


def test_the_data_is_a_list(tmp_path):
    is_entry("train_dataset must be a Dataset", seen(lambda: trainer_of(tmp_path, data=[{"messages": CHAT}])))


def test_every_answer_is_cut_off(tmp_path):
    text = seen(lambda: trainer_of(tmp_path, max_length=4, assistant_only_loss=True).train())
    is_entry("num_samples should be a positive integer value", text)


def test_two_gpus_in_one_process(tmp_path):
    """The trainer is told that there are two; what it says about that is real."""
    args = settings(tmp_path)
    assert args.n_gpu < 2
    args._n_gpu = 2
    build = lambda: SFTTrainer(random_llama(), args, train_dataset=CHATS, processing_class=tokenizer())  # noqa: E731
    is_entry("SFTTrainer does not support nn.DataParallel", seen(build))


TWO_TEXTS = ["Where?", "Where does Carl Kirkcroft live?"]


def test_there_is_no_padding_token():
    tokens = tokenizer()
    tokens.pad_token = None
    text = seen(lambda: tokens(TWO_TEXTS, padding=True))
    is_entry("Asking to pad but the tokenizer does not have a padding token", text)


def test_texts_of_different_lengths():
    text = seen(lambda: tokenizer()(TWO_TEXTS, return_tensors="pt"))
    is_entry("Unable to create tensor", text)


def test_checkpointing_has_a_new_name(tmp_path):
    needs("transformers", "5.23")
    text = seen(lambda: SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    is_entry("`gradient_checkpointing` is deprecated", text)


# ---- The first step


def test_float16_weights_are_trained_in_float16():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler.scale(weight.float().sum()).backward()
    is_entry("Attempting to unscale FP16 gradients", seen(lambda: scaler.unscale_(optimizer)))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(random_llama(), LoraConfig(**LORA)).save_pretrained(folder)
    return folder


def plain_trainer(folder, model, **options):
    return SFTTrainer(model, settings(folder, **options), train_dataset=CHATS, processing_class=tokenizer())


def test_nothing_is_trainable(adapter, tmp_path):
    heading = "element 0 of tensors does not require grad"
    model = PeftModel.from_pretrained(random_llama(), adapter)
    is_entry(heading, seen(lambda: plain_trainer(tmp_path, model).train()))
    layer = torch.nn.Linear(2, 2)  # trainable, but its input requires no gradient
    checkpoint = lambda: torch.utils.checkpoint.checkpoint(layer, torch.ones(2), use_reentrant=True)  # noqa: E731
    is_entry(heading, seen(checkpoint))


def test_a_frozen_adapter_is_trained_in_silence(adapter, tmp_path):
    heading = "The adapter is frozen: training runs, and nothing is learnt"
    model = PeftModel.from_pretrained(random_llama(), adapter)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = plain_trainer(tmp_path, model, gradient_checkpointing=True, learning_rate=0.1)
    text = seen(trainer.train)
    assert "Error" not in text and trainer.state.global_step == 1
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    is_entry(heading, seen(model.print_trainable_parameters))
    is_entry(
        heading, "training runs but the adapter's weights are frozen, trainable params: 0 || all params: 3,049,728"
    )


def test_preparing_a_model_doubles_its_16_bit_part():
    model = four_bit(torch.bfloat16)
    packed = sum(p.nbytes for p in model.parameters() if isinstance(p, bnb.nn.Params4bit))
    before = sum(p.nbytes for p in model.parameters()) - packed
    seen(lambda: prepare_model_for_kbit_training(model))
    assert sum(p.nbytes for p in model.parameters()) - packed == 2 * before
    trace = "line 216, in prepare_model_for_kbit_training\n    param.data = param.data.to(torch.float32)\n"
    is_entry("Out of memory in prepare_model_for_kbit_training", f"{trace}torch.OutOfMemoryError: CUDA out of memory.")


def test_nothing_can_be_compiled():
    from torch._inductor import config

    from qlora_helpers.training.layer_options import compile_layers

    torch.compiler.reset()  # else what an earlier test has compiled is taken
    model = random_llama()
    # its own way to change it: pytest's monkeypatch deletes what it put back, and nothing is compiled in this process any more
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        text = seen(lambda: compile_layers(model, "cpu"))
    torch.compiler.reset()
    is_entry("torch.compile does not work here", text)
    assert "no-such-compiler" in text


def test_a_budget_is_too_little():
    from qlora_helpers.memory import find_gpu, find_shape
    from qlora_helpers.memory.budget import plan_for
    from qlora_helpers.settings import GPU_RUN

    plan = lambda: plan_for(find_shape("llama-3.1-8b"), GPU_RUN, find_gpu("t4"), 4 * 2**30)  # noqa: E731
    is_entry("A memory budget is too little for the run", seen(plan))


def test_a_model_that_cannot_be_packed():
    from transformers import MambaConfig

    from qlora_helpers.training.packing import check_packing

    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    )
    chats = [{"input_ids": list(range(1, 9))}, {"input_ids": list(range(20, 26))}]
    is_entry("This model cannot be packed", seen(lambda: check_packing(model, chats, pad_token_id=0)))


def test_a_step_is_made_again_with_less(tmp_path, monkeypatch):
    """A CPU never runs out of GPU memory, so the error is made up, and so is the plan that allows a second try."""
    from qlora_helpers.settings import Settings
    from qlora_helpers.training import trainer as trainer_module
    from tests.support.short_runs import trainer_of as course_trainer

    plain = trainer_module._Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **options):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return plain(self, model, inputs, *args, **options)

    monkeypatch.setattr(trainer_module._Trainer, "compute_loss", compute_loss)
    trainer = course_trainer(tmp_path, settings=Settings(steps=1, batch_size=4, rank=4, memory_budget="auto"))
    trainer.plan = object()
    monkeypatch.setattr(trainer_module, "kept_within", lambda plan: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    is_entry("Out of GPU memory in a step, which is made again", seen(trainer.train))


def test_label_smoothing_needs_all_logits(tmp_path):
    text = seen(lambda: trainer_of(tmp_path, label_smoothing_factor=0.1))
    is_entry("Memory jumps at the loss: the whole logits are made", text)


def test_there_is_no_managed_memory():
    if hasattr(bnb.cextension.lib._lib, "cget_managed_ptr"):
        pytest.skip("this bitsandbytes library has managed memory")
    page = lambda: bnb.functional.get_paged(8, dtype=torch.float32, device=torch.device("cpu"))  # noqa: E731
    is_entry("The paged optimizer fails: no managed memory", seen(page))


def test_paging_without_a_gpu(tmp_path):
    text = seen(lambda: trainer_of(tmp_path, optim="paged_adamw_8bit").train())
    is_entry("Paged optimizers are not supported on CPU", text)


def test_products_in_float32_are_slow():
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    text = seen(lambda: layer(torch.ones(2, 64, dtype=torch.float16)))
    is_entry("Input type into Linear4bit is torch.float16", text)


def test_a_token_that_the_model_does_not_have():
    model = random_llama()
    text = seen(lambda: model(torch.tensor([[model.get_input_embeddings().num_embeddings]])))
    is_entry("index out of range in self, or device-side assert triggered", text)


def test_weights_of_two_dtypes_meet():
    model = random_llama().to(torch.bfloat16)
    model.lm_head.float()
    is_entry("Two matrices of different dtypes", seen(lambda: model(torch.tensor([[1, 2]]))))


def test_sampling_from_nan():
    model = random_llama()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    text = seen(lambda: model.generate(torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=1))
    is_entry("probability tensor contains either inf, nan or element < 0", text)


def test_the_second_forward_pass_differs():
    calls = itertools.count()

    def once_long_once_short(x):
        part = x[: 4 - next(calls)]
        return (part * part).sin().sum()

    step = lambda: torch.utils.checkpoint.checkpoint(  # noqa: E731
        once_long_once_short, torch.ones(4, requires_grad=True), use_reentrant=False
    ).backward()
    is_entry("Recomputed values have different metadata (CheckpointError)", seen(step))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.uint8, torch.uint8)])
def test_fsdp_wants_one_dtype(dtypes):
    """FSDP's own check, on the weights of one block, without the processes around it."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    weights = [torch.nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False) for dtype in dtypes]
    handle = types.SimpleNamespace(_use_orig_params=True)
    check = lambda: FlatParamHandle._validate_tensors_to_flatten(handle, weights)  # noqa: E731
    is_entry("FSDP: Must flatten tensors with uniform dtype", seen(check))
    assert "bnb_4bit_quant_storage" in inspect.signature(BitsAndBytesConfig.__init__).parameters  # the cure


def test_a_loss_of_one_s_own_from_before(tmp_path):
    class Old(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            return super().compute_loss(model, inputs, return_outputs)

    trainer = Old(
        random_llama(), settings(tmp_path), train_dataset=CHATS, processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    text = seen(trainer.train)
    is_entry("Unexpected keyword argument 'num_items_in_batch'", text)


# ---- During training


def test_a_loss_that_is_nan_is_shown_as_0(tmp_path):
    def log(**options):
        model = random_llama()
        torch.nn.init.constant_(model.model.norm.weight, torch.nan)
        return seen(trainer_of(tmp_path, model, logging_steps=1, **options).train)

    is_entry("The loss is 0.0 and grad_norm is nan", log())
    assert "'loss': 'nan'" in log(logging_nan_inf_filter=False)  # the cure


def test_evaluation_keeps_all_logits(tmp_path):
    kept = []

    def metrics(prediction):
        kept.append(prediction.predictions.shape)
        return {}

    extra = {"eval_dataset": CHATS, "compute_metrics": metrics}
    trainer = trainer_of(tmp_path, trainer=extra)
    text = seen(trainer.evaluate)
    tokens = len(trainer.train_dataset[0]["input_ids"])
    assert kept == [(len(CHATS), tokens, trainer.model.config.vocab_size)]
    is_entry("Out of memory in evaluation, though training was fine", text)


def test_the_cache_is_of_no_use_in_training():
    model = random_llama()
    seen(model.gradient_checkpointing_enable)
    text = seen(lambda: model.train()(torch.tensor([[1, 2]]), use_cache=True))
    is_entry("`use_cache=True` is incompatible with gradient checkpointing", text)


def test_there_is_nothing_to_resume(tmp_path):
    text = seen(lambda: trainer_of(tmp_path / "new").train(resume_from_checkpoint=True))
    is_entry("No valid checkpoint found in output directory", text)


def test_a_resumed_run_has_adapters_of_another_dtype(tmp_path):
    small = {
        "peft_config": LoraConfig(**LORA | {"target_modules": ["q_proj"]}),
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainers = [trainer_of(tmp_path, four_bit(), **small, max_steps=steps) for steps in (1, 2)]

    def dtypes(trainer):
        return {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad}

    assert dtypes(trainers[0]) == dtypes(trainers[1]) == {torch.bfloat16}
    seen(trainers[0].train)
    seen(lambda: trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    assert trainers[1].state.global_step == 2
    assert dtypes(trainers[0]) == {torch.bfloat16} and dtypes(trainers[1]) == {torch.float32}
    is_entry("A resumed run does not go on as it would have", "adapters are float32 after resume_from_checkpoint")


def test_a_text_longer_than_the_model_was_made_for():
    text = seen(lambda: tokenizer()("Where? " * 500))
    is_entry("Token indices sequence length is longer than the maximum", text)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16; bitsandbytes sees none")
def test_training_after_an_evaluation_on_avx512():
    layer = bnb.nn.Linear4bit(256, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    with torch.no_grad():
        layer.eval()(torch.ones(2, 256))
    text = seen(lambda: layer.train()(torch.ones(2, 256).requires_grad_()).sum().backward())
    is_entry("bitsandbytes::gemv_4bit: an autograd kernel was not registered", text)


# ---- Saving, loading and merging adapters


def test_merging_into_4_bits_rounds():
    model = get_peft_model(four_bit(), LoraConfig(**LORA | {"target_modules": ["q_proj"]}))
    is_entry("Merging into a 4-bit model changes its answers", seen(model.merge_and_unload))


def test_a_folder_without_an_adapter(tmp_path):
    text = seen(lambda: PeftModel.from_pretrained(random_llama(), str(tmp_path)))
    is_entry("Can't find 'adapter_config.json'", text)


def test_an_adapter_of_another_base(adapter):
    text = seen(lambda: PeftModel.from_pretrained(random_llama(hidden_size=128), adapter))
    is_entry("Size mismatch: the weights belong to another base", text)


def test_an_adapter_in_an_adapter():
    model = random_llama()
    for _ in range(2):
        text = seen(lambda: get_peft_model(model, LoraConfig(**LORA)))
    is_entry("Already found a `peft_config` attribute in the model", text)


def test_an_adapter_that_is_not_all_there(adapter, tmp_path):
    """As a vision model saves it: its layers have longer names."""
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.language_model.layers"): weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    text = seen(lambda: PeftModel.from_pretrained(random_llama(), tmp_path))
    is_entry("Found missing adapter keys while loading the checkpoint", text)


def test_a_base_cannot_be_merged():
    is_entry("No attribute 'merge_and_unload'", seen(lambda: random_llama().merge_and_unload()))


# ---- Using the model


def test_the_end_token_is_taken_for_padding():
    tokens = load_tokenizer()
    row = tokens.apply_chat_template(CHAT, return_dict=True)
    assert row["input_ids"][-1] == tokens.eos_token_id
    own = DataCollatorForLanguageModeling(tokens, mlm=False)([row])["labels"][0, -1]
    tokens.pad_token = tokens.eos_token
    same = DataCollatorForLanguageModeling(tokens, mlm=False)([row])["labels"][0, -1]
    assert own == tokens.eos_token_id and same == -100
    is_entry("The model never stops talking", "my fine-tuned model never stops generating")


def test_generating_behind_padding():
    tokens = tokenizer(padding_side="right")
    batch = tokens(TWO_TEXTS, padding=True, return_tensors="pt")
    text = seen(lambda: random_llama(pad_token_id=tokens.pad_token_id).generate(**batch, max_new_tokens=1))
    is_entry("Right-padding was detected", text)


def test_the_trainer_keeps_the_model(tmp_path):
    model = random_llama()
    there = weakref.ref(model)
    trainer = trainer_of(tmp_path, model)
    del model
    gc.collect()
    assert there() is not None
    del trainer
    gc.collect()
    assert there() is None
    heading = "Loading the model again after training runs out of memory"
    is_entry(heading, "out of memory loading the model for inference after training in the same notebook")


# ---- The page

HEADINGS = [entry.heading for entry in ENTRIES]
FILES = ("tests/course/test_troubleshooting.py", "tests/gpu/test_troubleshooting_on_a_gpu.py")


def test_there_are_at_least_27_entries_and_12_reproduced_ones():
    assert len(ENTRIES) >= 27
    assert sum(1 for entry in ENTRIES if entry.tests) >= 12


def test_every_entry_says_what_it_means_the_cure_and_where():
    for entry in ENTRIES:
        assert entry.group and entry.meaning and entry.cure and entry.where
        for message in entry.messages:
            assert sum(map(len, _literals(message))) >= 12, "too short to be recognised"
        assert max(map(len, _literals(" … ".join((*entry.messages, entry.symptom))))) >= 12


def test_every_entry_is_reproduced_or_says_that_it_is_not_and_who_reports_it():
    for entry in ENTRIES:
        if "Not reproduced here" in entry.where:
            assert not entry.tests and entry.reports
        else:
            assert entry.tests


@cache
def functions_of(path: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def entries_shown_by(function: ast.FunctionDef) -> set[str]:
    """The headings that a test passes to `is_entry`."""
    headings = set()
    names = {
        node.targets[0].id: node.value.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "is_entry":
            heading = node.args[0]
            headings.add(heading.value if isinstance(heading, ast.Constant) else names[heading.id])
    return headings


def test_the_tests_that_entries_name_exist_and_show_it():
    for entry in ENTRIES:
        for test in entry.tests:
            path, _, name = test.partition("::")
            function = functions_of(path).get(name)
            assert function, f"{path} has no {name}"
            if path in FILES:
                assert entries_shown_by(function) == {entry.heading}


def test_every_test_that_shows_an_entry_is_named_by_it():
    named = {test for entry in ENTRIES for test in entry.tests}
    for path in FILES:
        for name, function in functions_of(path).items():
            if name.startswith("test_") and entries_shown_by(function):
                assert f"{path}::{name}" in named


def test_every_entry_says_in_which_versions_it_was_seen():
    """A version, a year, a device's name, or that it does not matter; report numbers do not count."""
    for entry in ENTRIES:
        where = re.sub(r"[\w.-]+/[\w.-]+ #\d+|`[^`]*`", "", " ".join(entry.where.split()))
        assert re.search(r"\d|\b[Aa]ny\b", where), (entry.heading, where)


LIBRARIES = {"transformers": "transformers", "TRL": "trl", "PEFT": "peft", "bitsandbytes": "bitsandbytes"}
LIBRARIES |= {"torch": "torch", "huggingface_hub": "huggingface_hub"}


def test_reproduced_entries_name_the_version_that_the_test_met():
    """That of requirements.txt; tests that need a GPU are run with another torch, on the machine that has one."""
    compared = 0
    for entry in ENTRIES:
        if not any(not test.startswith("tests/gpu/") for test in entry.tests) or "Any version" in entry.where:
            continue
        found = re.findall(rf"\b({'|'.join(LIBRARIES)}) (\d+\.\d+)", entry.where)
        pinned = [PINS[LIBRARIES[library]].startswith(version + ".") for library, version in found]
        assert any(pinned), (entry.heading, found)
        compared += 1
    assert compared > 60


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


TEN = re.findall(r"^- \[(.*)\]\(#", TEXT[: TEXT.index(f"**{ENTRIES[0].group}**")], re.M)


def contents() -> str:
    """The list at the top of the page, made of its headings: the ten commonest, then the others under their groups."""
    link = lambda entry: f"- [{entry.heading}](#{slug(entry.heading)})"  # noqa: E731
    commonest = sorted((entry for entry in ENTRIES if entry.heading in TEN), key=lambda entry: TEN.index(entry.heading))
    lines, group = ["**The ten commonest**", "", *map(link, commonest)], None
    for entry in ENTRIES:
        if entry.group != group:
            group = entry.group
            lines += ["", f"**{group}**", ""]
        if entry not in commonest:
            lines.append(link(entry))
    return "\n".join(lines)


def test_the_ten_commonest_come_first_and_the_page_stays_readable():
    assert len(TEN) == len(set(TEN)) == 10
    assert len(TEXT.encode()) < 100_000


def test_the_table_of_contents_lists_every_entry():
    written = re.search(r"<!-- contents -->\n(.*)\n<!-- end of contents -->", TEXT, re.S)
    assert written and written[1] == contents(), contents()
    assert len({slug(heading) for heading in HEADINGS}) == len(HEADINGS)


# ---- Finding

TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 88, in <module>
    main()
  File "train.py", line 71, in main
    trainer = build(model, tokenizer, dataset)
              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "site-packages/some/library.py", line 1234, in wrapper
    return function(*args, **kwargs)
{}

During handling of the above exception, another exception occurred:
  File "site-packages/some/other.py", line 7, in close
"""


def as_printed(message: str, example: str = "") -> str:
    """A message with something in the place of each `…`, behind what fulfils its entry's condition."""
    return f"{example}\n{message}".strip().replace("…", " something-123 ")


def sights(entry):
    return (*entry.messages, entry.symptom) if entry.symptom else entry.messages


def found(text: str) -> str | None:
    """The heading of the entry that is found."""
    entry = find(text, ENTRIES)
    return entry and entry.heading


def led_to(text: str) -> str | None:
    """The heading of the entry that is found, or offered since other programs print the same."""
    answer = search(text, ENTRIES)
    entry = answer.entry or answer.perhaps
    return entry and entry.heading


def test_every_entry_is_found_by_its_own_message():
    for entry in ENTRIES:
        for message in sights(entry):
            assert led_to(as_printed(message, entry.example)) == entry.heading


def test_every_entry_is_found_in_a_long_traceback():
    for entry in ENTRIES:
        for message in sights(entry):
            text = TRACEBACK.format("\x1b[31m" + as_printed(message, entry.example) + "\x1b[0m")
            if message in entry.notices:  # it is not what ended the program
                assert led_to(text) is None and entry in search(text, ENTRIES).also
                continue
            assert led_to(text) == entry.heading
            assert led_to(text * 20) == entry.heading


def test_every_entry_is_found_wherever_the_terminal_breaks_its_lines():
    for entry in ENTRIES:
        for message in sights(entry):
            printed, example = as_printed(message), f"{entry.example}\n"
            for width in (17, 40):
                lines = [printed[start : start + width] for start in range(0, len(printed), width)]
                assert led_to(example + "\n".join(lines)) == entry.heading
                assert led_to(example + "\n".join(f"│ {line:{width}} │" for line in lines)) == entry.heading
            assert led_to(example + textwrap.indent(textwrap.fill(printed, 60), "> ")) == entry.heading
            assert led_to(example + printed.upper().replace("'", "’").replace("`", '"')) == entry.heading


def test_every_entry_is_found_by_half_of_its_message():
    tried = 0
    for entry in ENTRIES:
        for message in entry.messages:
            longest = max(re.sub(r"^\w+Error: ", "", message).split("…"), key=len).strip()
            if len(longest) >= 60 and not re.search("unexpected keyword|You can't train", longest):  # half says nothing
                kind = "" if message in entry.notices else "ValueError: "
                half = f"{entry.example}\n{kind}{longest[: len(longest) * 2 // 3]}".strip()
                assert led_to(half) == entry.heading
                tried += 1
    assert tried >= len(ENTRIES) / 3


def made_up(heading: str, *messages: str, symptom: str = "", meaning: str = "", cure: str = "") -> Entry:
    return Entry(heading, "made up", messages, symptom, meaning, cure, "nowhere")


@pytest.mark.parametrize(("characters", "known"), [(31, True), (30, False)])
def test_a_piece_of_31_characters_is_a_message(characters, known):
    message = "abcdefghijklmnopqrstuvwxyz0123456789"
    entry, other = made_up("letters", message), made_up("digits", message[::-1])
    assert list(_shared_runs(f"###{message[:characters]}###", (entry, other))) == [entry] * known
    assert not _shared_runs(message[:characters], (entry, made_up("the same letters", message)))


def test_of_several_pieces_the_longest_tells_and_equal_ones_do_not():
    letters = "abcdefghijklmnopqrstuvwxyz"
    messages = [letters + letters[::step] + letters[::-1] for step in (3, 5, 7)]
    entries = tuple(made_up(f"number {step}", message) for step, message in zip((3, 5, 7), messages, strict=True))

    def pieces(*lengths: int) -> str:
        middles = [message[20 : 20 + length] for message, length in zip(messages, lengths, strict=True)]
        return "###".join(middles)

    assert [search(pieces(*lengths), entries).entry for lengths in ((40, 32, 32), (32, 32, 38), (32, 40, 32))] == [
        entries[0], entries[2], entries[1],
    ]  # fmt: skip
    undecided = search(pieces(32, 32, 10), entries)
    assert undecided.entry is None and set(undecided.others) == set(entries[:2])


@pytest.mark.parametrize(("words", "known"), [(60, True), (61, False)])
def test_of_more_than_60_words_the_last_line_and_those_that_name_an_error_count(words, known):
    entry = made_up("the kettle whistles", symptom="steam everywhere")
    text = "kettle whistles\n" + "word " * (words - 3) + "\nlast"
    assert len(text.split()) == words
    assert (entry in _shares_of_words(text, (entry,))) == known
    assert entry in _shares_of_words(text.replace("kettle", "KettleError kettle"), (entry,))


def test_a_word_of_what_is_seen_counts_twice_as_much_as_one_of_the_explanation():
    seen, explained = made_up("the kettle whistles"), made_up("the kettle", meaning="It whistles.")
    scores = _shares_of_words("kettle whistles", (seen, explained))
    assert scores[seen] == 1 and explained not in scores  # one word of its own is not enough
    explained = made_up("a loud kettle", meaning="It whistles.")
    scores = _shares_of_words("loud kettle whistles", (seen, explained))
    weight = {"loud": math.log(3 / 1), "kettle": math.log(3 / 2), "whistles": math.log(3 / 2)}
    total = sum(weight.values())
    assert scores[seen] == pytest.approx((weight["kettle"] + weight["whistles"]) / total)
    assert scores[explained] == pytest.approx((weight["loud"] + weight["kettle"] + weight["whistles"] / 2) / total)
    named = made_up("another", meaning="See save_steps.")
    assert _shares_of_words("save_steps", (named,)) == {named: 1}  # a name_like_this is enough


def test_the_last_message_of_a_text_counts_and_the_others_are_named():
    text = "`torch_dtype` is deprecated! Use `dtype` instead!\nRuntimeError: index out of range in self\n"
    answer = search(text, ENTRIES)
    assert answer.entry.heading == "index out of range in self, or device-side assert triggered"
    assert [entry.heading for entry in answer.others] == ["`torch_dtype` is deprecated"]


OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1002.00 MiB. GPU 0 has a total capacity of 14.74 GiB"
)


@pytest.mark.parametrize(
    ("where", "heading"),
    [
        ("in training_step", "CUDA out of memory (OOM)"),
        ("in prepare_model_for_kbit_training", "Out of memory in prepare_model_for_kbit_training"),
        ("in evaluation_loop(self, dataloader)", "Out of memory in evaluation, though training was fine"),
    ],
)
def test_running_out_of_memory_is_told_apart_by_where_it_happened(where, heading):
    text = f'  File "/usr/lib/transformers/x.py", line 5, {where}\n    y = x.float()\n{OUT_OF_MEMORY}'
    assert found(text) == heading


# As they are in public reports, for other versions than ours.
REPORTED = {
    "a notebook": (
        "SFTTrainer got",
        """---------------------------------------------------------------------------
TypeError                                 Traceback (most recent call last)
Cell In[18], line 3
      1 from trl import SFTTrainer
----> 3 trainer = SFTTrainer(
      4     model=model,
      7     tokenizer=tokenizer,

File ~/venvs/lib/python3.11/site-packages/transformers/utils/deprecation.py:165, in deprecate_kwarg.<locals>.wrapper
    162     # DeprecationWarning is ignored by default, so we use FutureWarning instead
--> 165 return func(*args, **kwargs)

TypeError: SFTTrainer.__init__() got an unexpected keyword argument 'dataset_text_field'""",
    ),
    "an older wording, indented": (
        "Some modules",
        """ValueError:
                        Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit
                        the quantized model. If you want to dispatch the model on the CPU or the disk while keeping
                        these modules in 32-bit, you need to set `load_in_8bit_fp32_cpu_offload=True` and pass a custom""",
    ),
    "a progress bar after it": (
        "Attempting to unscale",
        """    raise ValueError("Attempting to unscale FP16 gradients.")
ValueError: Attempting to unscale FP16 gradients.
  0%|          | 0/6931 [00:01<?, ?it/s]""",
    ),
    "a log": (
        "grad_norm is nan",
        """{'loss': 1.0446, 'grad_norm': nan, 'learning_rate': 1.4925373134328357e-08, 'epoch': 0.0}
  0%|          | 1/666 [00:24<4:08:53, 22.46s/it]
{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 2.9850746268656714e-08, 'epoch': 0.01}""",
    ),
    "a frame": (
        "'load_in_4bit'",
        """╭──────────────────────── Traceback (most recent call last) ────────────────────────╮
│ /home/someone/projects/LLM/qlora/qlora.py:758 in <module>                         │
│ ❱ 758 │   train()                                                                 │
╰───────────────────────────────────────────────────────────────────────────────────╯
TypeError: LlamaForCausalLM.__init__() got an unexpected keyword argument
'load_in_4bit'""",
    ),
    "another exception class": (
        "in prepare_model",
        """  File "/usr/local/lib/python3.9/site-packages/peft/utils/other.py", line 98, in prepare_model_for_kbit_training
    param.data = param.data.to(torch.float32)
torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 250.00 MiB (GPU 0; 14.75 GiB total capacity)""",
    ),
}


@pytest.mark.parametrize("kind", REPORTED)
def test_what_stands_in_public_reports_is_found(kind, capsys):
    heading, text = REPORTED[kind]
    assert heading in found(text)
    assert doctor(capsys, "--error", text)[0] == 0  # even if it begins with dashes


# What people paste or type; the second is a piece of the entry's heading.
PASTES = [
    ("bf16/gpu", "bf16/gpu"),
    (
        "ValueError: Your setup doesn't support bf16/gpu. You need torch>=1.10, using Ampere GPU with cuda>=11.0",
        "bf16/gpu",
    ),
    ("'_amp_foreach_non_finite_check_and_unscale_cuda' not implemented", "_amp_foreach"),
    ("dispatched on the CPU or the disk", "Some modules"),
    ("requires the latest version of bitsandbytes", "bitsandbytes is asked for"),
    ("got an unexpected keyword argument 'max_seq_length' SFTTrainer", "SFTTrainer got"),
    ("the model never stops talking and repeats itself", "never stops"),
    ("colab crashed all available RAM", "Your session crashed"),
    ("grad_norm nan loss 0.0", "grad_norm is nan"),
    ("loss is nan", "grad_norm is nan"),
    ("no kernel image is available", "No kernel image"),
    (
        "Error operation not supported at line 380 in file /mmfs1/gscratch/bitsandbytes/csrc/pythonInterface.c",
        "managed memory",
    ),
    ("huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-68)", "gated"),
    ("double BOS", "two BOS"),
    ("bf16 is very slow on a T4", "on a T4"),
    ("merged model gives different answers than the 4-bit model", "Merging into"),
    ("evaluation out of memory, training was fine", "in evaluation"),
    ("trainable params: 0", "frozen"),
    ("module 'torch.cuda' get_device_properties total_mem", "total_mem"),
    ("unsloth is no faster than trl", "Unsloth"),
    ("my GPU is too old", "No kernel image"),
    ("warmup_ratio", "TrainingArguments"),
    ("OOM during evaluation", "in evaluation"),
    ("lora trains but learns nothing", "frozen"),
    ("gradient checkpointing slow", "far slower"),
    ("misspelt option BitsAndBytesConfig", "misspelt"),
    ("training after generate() on AVX512 gradients are wrong", "gemv_4bit"),
    ("No module named 'qlora_helpers'", "No module named"),
    ("ModuleNotFoundError: No module named 'qlora_helpers.training.run'", "No module named"),
    ("/usr/bin/python3: No module named qlora_helpers", "No module named"),
    ("ModuleNotFoundError: No module named 'bitsandbytes'", "No module named"),
]


@pytest.mark.parametrize(("text", "heading"), PASTES)
def test_what_people_paste_is_found(text, heading):
    assert heading in (found(text) or "nothing")


UNRELATED = [
    "hello",
    "model",
    "error",
    "it does not work",
    "How do I install Python on Windows?",
    "ZeroDivisionError: division by zero",
    "IndexError: list index out of range",
    "RuntimeError: CUDA error: invalid device ordinal",
    "AttributeError: 'LlamaForCausalLM' object has no attribute 'print_trainable_parameters'",
    "ValueError: PEFT backend is required for this method.",
    "NameError: name 'LoraConfig' is not defined. Did you mean: 'ModelConfig'?",
    "RuntimeError: CUDA error: an illegal memory access was encountered",
    "KeyError: 'name'",
    "ModuleNotFoundError: No module named 'pandas'",
    "ModuleNotFoundError: No module named 'my_module'",
    "python: command not found",
    "TypeError: LoraConfig.__init__() got an unexpected keyword argument 'foo'",
    "ImportError: cannot import name 'train' from 'qlora_helpers.training.run'",
    "the loss goes up",
    "FileNotFoundError: [Errno 2] No such file or directory: 'data.csv'",
    "IndentationError: expected an indented block after 'for' statement on line 3",
    "ValueError: could not convert string to float: 'abc'",
    "TypeError: Foo.__init__() got an unexpected keyword argument 'bar'",
    "see the documentation at https://huggingface.co/docs/transformers/main/en/chat_templating for more details",
    "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    "pip install torch",
    "what is the capital of France",
    "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x16 and 8x4)",
    "AttributeError: 'dict' object has no attribute 'loss'",
    "bash: jupyter: command not found",
    "what is a tokenizer",
    "which learning rate is best",
    "my laptop has a GPU with 8 GB of memory",
    "RuntimeError: shape '[1, 2]' is invalid for input of size 3",
    "ImportError: cannot import name 'Foo' from 'transformers'",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: train.py FAILED",
    TRACEBACK.format("AttributeError: 'NoneType' object has no attribute 'shape'"),
]


@pytest.mark.parametrize("text", UNRELATED)
def test_unrelated_text_finds_nothing(text):
    assert found(text) is None


@pytest.mark.parametrize("text", ["", "  \n", "'"])
def test_an_empty_text_is_refused(text):
    with pytest.raises(ValueError, match=r"empty\. Paste the message"):
        find(text, ENTRIES)


# ---- The limits of the three steps, on made-up entries

WORDS = ["".join(letters) for letters in itertools.product("bdfgk", "aeiou", "lmnpr", "aeiou")]  # no two begin alike


def entry(heading="A heading", message="", **parts):
    return Entry(
        heading, "A group", (message,) if message else (), "" if message else "It is seen.", **PARTS_OF | parts
    )


PARTS_OF = {"meaning": "", "cure": "", "where": ""}
LONG = "".join(WORDS)  # every run of 24 letters occurs once


def found_by_pieces(*lengths):
    """Whether pieces of a message are enough, each at another place of it and followed by something else."""
    starts = itertools.accumulate(lengths, initial=0)
    text = " 0123456789 ".join(LONG[start : start + length] for start, length in zip(starts, lengths, strict=False))
    return find(f"1234 {text} 5678", (entry(message=LONG), entry("Another", "something else altogether"))) is not None


def test_eight_runs_of_24_letters_are_needed():
    assert found_by_pieces(31) and not found_by_pieces(30)
    assert found_by_pieces(*[24] * 8) and not found_by_pieces(*[24] * 7)
    assert not found_by_pieces(*[23] * 20)


def test_a_short_text_is_a_piece_of_a_message_from_eight_letters_on():
    entries = (entry(message="it says abcd efgh ijkl"), entry("Another", "something else altogether"))
    assert find("abcd efgh", entries) and not find("abcd efg", entries)
    assert not find("efghijkl", entries)  # a single word


def test_the_class_of_an_error_may_change_if_its_text_has_sixteen_letters():
    for letters, told in ((16, True), (15, False)):
        entries = (entry(message=f"ValueError: {LONG[:letters]}"), entry("Another", "something else altogether"))
        assert (find(f"1 2 3 RuntimeError: {LONG[:letters]} 4 5 6", entries) is not None) == told


def test_65_of_100_of_the_words_by_weight_are_needed():
    """Words that one entry or none has weigh the same."""
    for known, told in ((33, True), (32, False)):
        text = " ".join([*WORDS[:known], *WORDS[100 : 150 - known]])
        entries = (entry(" ".join(reversed(WORDS[:known]))), entry("Another"), entry("A third"))
        assert (find(text, entries) is not None) == told


def test_the_best_entry_must_be_a_tenth_ahead_of_the_next():
    """Both have all words; one of them has some only in its explanation, where they count half."""
    words = WORDS[:50]
    for in_heading, told in ((39, True), (41, False)):
        best = entry(" ".join(reversed(words)))
        other = entry(" ".join(reversed(words[:in_heading])), meaning=" ".join(words[in_heading:]))
        found = find(" ".join(words), (other, best, *(entry(f"Another {n}") for n in range(5))))
        assert found == (best if told else None)


# ---- The reader of the page

ENTRY = "## One\n\n```text\nan error of some length\n```\n\n**What it means.** A.\n\n**Cure.** B.\n\n**Where.** C.\n"


def page(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


def test_a_page_is_taken_apart(tmp_path):
    text = (
        "# Page\n\nwords\n\n# Group\n\n"
        + ENTRY.replace("B.", "B:\n\n```python\n## no heading\n```")
        + ENTRY.replace("One", "Two")
    )
    one, two = read_entries(page(tmp_path, text))
    assert (one.heading, one.group, one.messages) == ("One", "Group", ("an error of some length",))
    assert (one.meaning, one.where, one.tests, one.reports) == ("A.", "C.", (), ())
    assert one.cure == "B:\n\n```python\n## no heading\n```"
    assert two.heading == "Two"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("**Cure.** B.", ""), r"entry 'One': \*\*Cure.\*\* occurs 0 times"),
        (("B.", "**Cure.** B."), r"entry 'One': \*\*Cure.\*\* occurs 2 times"),
        (("```text\nan error of some length\n```", ""), "neither a message in a fenced block nor a symptom"),
        (("## One", "# One"), "no entry: no heading begins with"),
    ],
)
def test_a_page_of_another_form_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_entries(page(tmp_path, ENTRY.replace(*change)))


def test_a_heading_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 entries have the heading 'One'"):
        read_entries(page(tmp_path, ENTRY + ENTRY))


def test_a_page_that_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("qlora_helpers.course.troubleshooting.PAGE", "NOSUCHPAGE.md")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"NOSUCHPAGE.md is neither in .* run this from a copy"):
        read_entries()


# ---- The doctor


def doctor(capsys, *arguments):
    status = main(["doctor", *arguments])
    return status, *capsys.readouterr()


def test_the_doctor_prints_the_entry(capsys):
    status, text, errors = doctor(capsys, "--error", "RuntimeError: index out of range in self")
    assert (status, errors) == (0, "")
    entry = find("index out of range in self", ENTRIES)
    for part in (
        "What it means",
        "Cure",
        "Where",
        entry.heading,
        entry.meaning,
        entry.cure,
        entry.where,
        entry.group,
        PAGE,
    ):
        assert part in text


def test_the_doctor_says_that_there_is_no_entry_and_names_the_nearest(capsys):
    status, text, _ = doctor(capsys, "--error", "TypeError: Foo.__init__() got an unexpected keyword argument 'bar'")
    assert status == 1 and f"No entry of {PAGE} fits this text" in text
    assert "- SFTTrainer got an unexpected keyword argument" in text


def test_the_doctor_names_further_messages_of_the_text(capsys):
    paste = f"`torch_dtype` is deprecated! Use `dtype` instead!\n{OUT_OF_MEMORY}"
    status, text, _ = doctor(capsys, "--error", paste)
    assert status == 0 and text.startswith("CUDA out of memory (OOM)\n")
    assert "The text also contains messages of other entries:\n- `torch_dtype` is deprecated" in text


def test_the_doctor_refuses_an_empty_text(capsys):
    status, _, errors = doctor(capsys, "--error", " ")
    assert status == 2 and "Paste the message" in errors


def test_the_doctor_answers_from_standard_input_without_torch_and_at_once():
    command = [sys.executable, "-X", "importtime", "-m", "qlora_helpers", "doctor", "--error", "-"]
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, input=TRACEBACK.format(OUT_OF_MEMORY), capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 0 and done.stdout.startswith("CUDA out of memory (OOM)\n")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "qlora_helpers.course.troubleshooting" in imported and not imported & {"torch", "transformers", "numpy"}
    assert seconds < 5  # a fifth of a second on a quiet machine
