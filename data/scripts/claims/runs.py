"""Claims about what code does: tried on the shipped model, on the CPU, in a second or less each."""

import copy
import io
import math
import statistics
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from unittest import mock

import bitsandbytes as bnb
import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as CollatorOfTRL

from data.scripts.claims.quality import (
    higher_loss,
    in_nats,
    in_points,
    is_worse,
    loss,
    losses_without_warm_up,
    stability,
)
from data.scripts.claims.rules import NOWHERE, Finding, by_setting, claim, parts, refusal
from data.scripts.claims.size import of_merging
from qlora_helpers import evaluation
from qlora_helpers.chats import read_chats
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_shape, predict_merge
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.paths import data_path
from qlora_helpers.statistics import difference

ALL_LINEAR = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@cache
def tokenizer():
    return load_tokenizer()


@cache
def chats() -> list:
    return read_chats(data_path("chats", "train.jsonl"))[:64]


@cache
def tokens() -> torch.Tensor:
    """Four training chats, cut to the same length: (4, 16)."""
    encoded = [tokenizer().apply_chat_template(chat, return_dict=True)["input_ids"][:16] for chat in chats()[:4]]
    return torch.tensor(encoded)


@cache
def loaded_in_4_bits():
    return load_model(hardware=detect("cpu"))


def base(quantization: str | None = "nf4"):
    """The shipped model, new for each caller. In 4 bits it is a copy: quantising again takes six times as long."""
    return copy.deepcopy(loaded_in_4_bits()) if quantization else load_model(quantization=None, hardware=detect("cpu"))


def with_adapters(model, seed: int = 0):
    """LoRA on all linear layers, with a B that is not zero, so that the adapters do something."""
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **ALL_LINEAR))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return wrapped


@torch.no_grad()
def logits(model) -> torch.Tensor:
    model.train()  # bitsandbytes repacks 4-bit weights in evaluation on some CPUs; there is no dropout here
    return model(input_ids=tokens()).logits


@contextmanager
def silence():
    """Hide progress bars and warnings."""
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trainer_for(rows: list[dict], model=None, args=None) -> SFTTrainer:
    """An SFTTrainer for the shipped model in 4 bits, with rank 16 on all linear layers."""
    with silence():
        return SFTTrainer(
            model=model or base(),
            args=args or SFTConfig(output_dir=NOWHERE, use_cpu=True, bf16=False, assistant_only_loss=True),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=LoraConfig(**ALL_LINEAR),
        )


@cache
def text_trainer() -> SFTTrainer:
    """As in the articles: a column of rendered chats, and plain TrainingArguments."""
    texts = [{"text": tokenizer().apply_chat_template(chat, tokenize=False)} for chat in chats()[:2]]
    return trainer_for(texts, args=TrainingArguments(output_dir=NOWHERE, use_cpu=True, report_to="none"))


@cache
def chat_trainer() -> SFTTrainer:
    """As in this course: the chats themselves, and a loss only on what the assistant says."""
    return trainer_for([{"messages": chat} for chat in chats()[:2]])


# ---- LoRA


def find_all_linear_names(model) -> list[str]:
    """The second article's function, as printed."""
    cls = bnb.nn.Linear4bit
    lora_module_names = set()
    for name, module in model.named_modules():
        if isinstance(module, cls):
            names = name.split(".")
            lora_module_names.add(names[0] if len(names) == 1 else names[-1])
    if "lm_head" in lora_module_names:
        lora_module_names.remove("lm_head")
    return list(lora_module_names)


@claim("B73.1", "B90.1")
def names_of_the_linear_layers() -> Finding:
    printed = ["v_proj", "gate_proj", "o_proj", "q_proj", "up_proj", "k_proj", "down_proj"]
    return parts(printed, find_all_linear_names(base()), value="7 names")


@claim("B92.1")
def names_by_program_are_those_of_peft() -> Finding:
    model = base()
    found = set(find_all_linear_names(model))
    wrapped = get_peft_model(model, LoraConfig(**ALL_LINEAR))
    return by_setting(found == {name.rpartition(".")[2] for name in wrapped.base_model.targeted_module_names})


@claim("B81.1")
def the_head_is_left_out() -> Finding:
    wrapped = get_peft_model(base(None), LoraConfig(**ALL_LINEAR))
    return by_setting(not any("lm_head" in name for name in wrapped.base_model.targeted_module_names))


@claim("B54.1", "B65.1")
def output_is_scaled_by_alpha_over_rank() -> Finding:
    outputs = []
    for alpha in (16, 32):
        torch.manual_seed(0)
        model = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"])
        )
        layer = model.base_model.model[0]
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        x = torch.ones(1, 8)
        outputs.append((layer(x) - layer.base_layer(x)) / (alpha / 8))
    return by_setting(torch.allclose(*outputs, rtol=1e-4))


@claim("B94.1")
def no_bias_is_trained() -> Finding:
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(bias="none", **ALL_LINEAR))
    biases = [parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith("bias")]
    return by_setting(bool(biases) and not any(biases), value=f"{len(biases)} biases, {sum(biases)} trained")


@claim("B47.1", "C49.2", "A84.1")
def the_base_stays_as_it_is() -> Finding:
    model = with_adapters(base())
    before = {name: layer.weight.data.clone() for name, layer in linear_layers(model)}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if name in trained}
    optimizer.step()
    same = all(torch.equal(before[name], layer.weight.data) for name, layer in linear_layers(model))
    moved = all(not torch.equal(adapters[name], p) for name, p in model.named_parameters() if name in trained)
    return by_setting(same and moved and all("lora_" in name for name in trained))


@claim("A196.2", "B63.2")
def adapters_are_bfloat16() -> Finding:
    of_peft, of_trl = (
        {p.dtype for p in model.parameters() if p.requires_grad}
        for model in (get_peft_model(base(), LoraConfig(**ALL_LINEAR)), text_trainer().model)
    )
    return by_setting(of_peft == {torch.bfloat16}, of_trl == {torch.bfloat16})


@claim("A196.1")
def four_bit_weights_serve_the_forward_pass_only() -> Finding:
    layer = base().model.layers[0].mlp.up_proj
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, generator=generator).requires_grad_()
    gradient = torch.randn(4, 512, generator=generator)
    layer(x).backward(gradient)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    used = torch.allclose(x.grad, gradient @ weight, atol=1e-4)
    return by_setting(not used)


@claim("B220.1")
def states_of_adamw_are_float32() -> Finding:
    dtypes = []
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(torch.ones(4, dtype=dtype))
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter])
        optimizer.step()
        dtypes.append(optimizer.state[parameter]["exp_avg"].dtype)
    return by_setting(*(dtype == torch.float32 for dtype in dtypes))


@claim("B179.1")
def accumulation_gives_the_same_gradient() -> Finding:
    model = with_adapters(base())
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    gradients = []
    for batches in ([tokens()], tokens().split(1)):
        model.zero_grad()
        for batch in batches:
            (model(input_ids=batch, labels=batch).loss / len(batches)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    together, apart = gradients
    return by_setting((together - apart).norm() < 1e-4 * together.norm())


# ---- preparing the model


@cache
def prepared():
    """A 4-bit model with its other parameters in bfloat16, before and after `prepare_model_for_kbit_training`."""
    model = base()
    for parameter in model.parameters():
        if not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.bfloat16()
    halves = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    with silence():
        model = prepare_model_for_kbit_training(model)
    floats = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    return model, halves & floats


def kind(name: str) -> str:
    return next(kind for kind in ("norm", "lm_head", "embed_tokens") if kind in name)


@claim("B216.1")
def what_becomes_float32() -> Finding:
    kinds = {kind(name) for name in prepared()[1]}
    if base(None).config.tie_word_embeddings:  # one tensor, under the name of the embeddings
        kinds.add("lm_head")
    return parts({"norm", "lm_head"}, kinds)


@claim("B216.2")
def preparing_enables_checkpointing() -> Finding:
    return by_setting(prepared()[0].is_gradient_checkpointing)


# ---- data


@claim("A68.1", "B147.1")
def pad_as_eos_is_harmless() -> Finding:
    padded = load_tokenizer()
    padded.pad_token = padded.eos_token
    answer = [5, 6, padded.eos_token_id]
    by_transformers = DataCollatorForLanguageModeling(padded, mlm=False)([{"input_ids": answer}])["labels"][0]
    row = {"input_ids": answer, "labels": answer}
    by_trl = CollatorOfTRL(pad_token_id=padded.eos_token_id)([row])["labels"][0]
    ends = [100 * statistics.mean(stability()[f"collator, {pad}"]["ends"]) for pad in ("pad = end", "a pad of its own")]
    return by_setting(
        *(labels[-1].item() == padded.eos_token_id for labels in (by_trl, by_transformers)), ends[0] > 0.9 * ends[1],
        value="{:.1f} % and {:.0f} %".format(*ends),
    )  # fmt: skip


@claim("A130.1")
def rendered_text_begins_once() -> Finding:
    begin = tokenizer().bos_token_id
    counts = [trainer.train_dataset[0]["input_ids"].count(begin) for trainer in (text_trainer(), chat_trainer())]
    one, two = "loss on the question, too", "loss on the question, too; two first tokens"
    cost = higher_loss(two, one)
    shown = [*(f"{loss(name):.3f}" for name in (one, two)), f"{cost.mean:.3f}", f"{cost.half:.3f}"]
    return by_setting(*(count == 1 for count in counts), value=f"{counts[0]} and {counts[1]}", shown=shown)


@claim("A133.1")
def only_the_answer_is_learnt() -> Finding:
    shares = []
    for trainer in (text_trainer(), chat_trainer()):
        labels = trainer.train_dataset[0]["labels"]
        shares.append(sum(label != -100 for label in labels) / len(labels))
    right = [
        statistics.mean(stability()[name]["exact_match"]) for name in ("loss on the question, too", "as it should be")
    ]
    more = difference(*(stability()[name]["exact_match"] for name in ("as it should be", "loss on the question, too")))
    return by_setting(
        *(share < 1 for share in shares), value=f"{100 * shares[0]:.0f} % and {100 * shares[1]:.0f} %",
        shown=[*(f"{100 * share:.1f}" for share in right), *in_points(more)],
    )  # fmt: skip


@claim("A136.1")
def training_arguments_are_kept() -> Finding:
    return by_setting(
        text_trainer().args.max_length == 2048,
        value=f"{text_trainer().args.max_length:,} tokens",
        claimed="2,048 tokens",
    )


@claim("B191.2")
def grouping_by_length_saves_padding() -> Finding:
    file = data_path("chats", "qlora", "train.jsonl")
    lengths = [sum(len(message["content"].split()) for message in chat) for chat in read_chats(file)]  # in words

    def padding(order: list[int]) -> int:
        batches = [order[i : i + 8] for i in range(0, len(order), 8)]
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) - sum(lengths)

    generator = torch.Generator().manual_seed(0)
    grouped = padding(list(LengthGroupedSampler(8, lengths=lengths, generator=generator)))
    shuffled = padding(torch.randperm(len(lengths), generator=generator).tolist())
    return by_setting(grouped < shuffled)


# ---- trainer, saving, merging


@claim("B199.1")
def peft_model_and_config_together() -> Finding:
    said = refusal(trainer_for, [{"text": "a"}], model=get_peft_model(base(), LoraConfig(**ALL_LINEAR)))
    if said and "You passed a `PeftModel` instance together with a `peft_config`" not in said:
        raise RuntimeError(f"expected a refusal of a wrapped model with a config, and got {said}")
    return Finding("outdated" if said else "right", said.partition(":")[0])


@claim("B210.1", "B261.1")
def save_model_saves_the_adapter() -> Finding:
    with tempfile.TemporaryDirectory() as folder, silence():
        text_trainer().save_model(folder)
        weights = [path.name for path in Path(folder).glob("*.safetensors")]
    return by_setting(weights == ["adapter_model.safetensors"])


@claim("B278.1")
def two_adapters_share_one_base() -> Finding:
    first, second = with_adapters(base(), 1), with_adapters(base(), 2)
    with tempfile.TemporaryDirectory() as folder, silence():
        for name, model in (("one", first), ("two", second)):
            model.save_pretrained(f"{folder}/{name}")
        both = PeftModel.from_pretrained(base(), f"{folder}/one", adapter_name="one")
        both.load_adapter(f"{folder}/two", "two")
    same = []
    for name, model in (("one", first), ("two", second)):
        both.set_adapter(name)
        same.append(torch.allclose(logits(both), logits(model), atol=1e-4))
    layers = sum(isinstance(module, bnb.nn.Linear4bit) for module in both.modules() if not hasattr(module, "lora_A"))
    return by_setting(all(same) and layers == len(list(linear_layers(base()))))


@claim("B265.1")
def several_adapters_share_one_base() -> Finding:
    shape = find_shape("meta-llama/Llama-3.1-8B")
    copies = 2 * predict_merge(shape, "16bit").merged_bytes
    one_base = predict_merge(shape, "4bit").base_bytes + 2 * 2 * shape.lora_parameters(16)  # two adapters in bfloat16
    return by_setting(
        two_adapters_share_one_base().verdict == "right", one_base < copies,
        value=f"{one_base / 1e9:.1f} GB instead of {copies / 1e9:.1f} GB", shown=["16"],
    )  # fmt: skip


@claim("A202.1")
def a_4_bit_model_cannot_be_merged() -> Finding:
    model = with_adapters(base())
    with silence():
        merged = model.merge_and_unload()
    still_4_bit = all(isinstance(layer, bnb.nn.Linear4bit) for _, layer in linear_layers(merged))
    rows = of_merging()  # 8B after a short run: how far its logits are from the unmerged model's
    far = [rows[way]["mean"] / rows["no adapter"]["mean"] for way in ("4bit", "16bit, then 4bit")]
    return Finding("outdated" if still_4_bit else "right", shown=tuple(f"{100 * share:.0f}" for share in far))


@claim("B285.1")
def merging_dequantises_the_base() -> Finding:
    dequantised = []
    for quantization in ("nf4", None):
        model = with_adapters(base(quantization))
        with (
            silence(),
            mock.patch("bitsandbytes.functional.dequantize_4bit", wraps=bnb.functional.dequantize_4bit) as decode,
        ):
            model.merge_and_unload()
        dequantised.append(decode.call_count)
    return by_setting(*(count > 0 for count in dequantised), value="{} and {} weights".format(*dequantised))


@claim("B283.1")
def merged_is_less_work() -> Finding:
    counts = []
    model = with_adapters(base(None))
    for prepare in (lambda: model, model.merge_and_unload):
        candidate = prepare()
        with FlopCounterMode(display=False) as counter:
            logits(candidate)
        counts.append(counter.get_total_flops())
    times = {way: row["ms_per_token"] for way, row in of_merging().items() if "ms_per_token" in row}
    merged = [times[way] for way in ("16bit", "dequantised", "4bit")]
    return by_setting(
        counts[1] < counts[0], *(time < times["unmerged"] for time in merged),
        value=f"{times['16bit']:.1f} instead of {times['unmerged']:.1f} ms",
        shown=[f"{100 * (1 - counts[1] / counts[0]):.1f}", *(f"{time:.1f}" for time in merged)],
    )  # fmt: skip


@claim("B285.2", "B299.1", "B305.1")
def a_merged_model_loads_without_peft() -> Finding:
    model = with_adapters(base(None))
    before = logits(model)
    merged = model.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder, silence():
        merged.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    return by_setting(type(loaded).__name__ == "LlamaForCausalLM" and torch.allclose(logits(loaded), before, atol=1e-3))


# ---- the schedule


@claim("B255.1")
def the_authors_schedule_warms_up_or_decays() -> Finding:
    parameter = torch.nn.Parameter(torch.ones(1))
    rates = {}
    for name in ("constant", "cosine"):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=100)
        rates[name] = set()
        for _ in range(100):
            rates[name].add(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    if len(rates["cosine"]) < 50:
        raise RuntimeError(f"the cosine schedule has {len(rates['cosine'])} rates: is this the right function?")
    worse, losses = losses_without_warm_up()
    constant = "the paper's: constant, clipped at 0.3"
    return by_setting(
        len(rates["constant"]) > 1, *worse, is_worse(constant, "as it should be"),
        value=f"test loss {losses[0]} without, {losses[1]} with it", 
        shown=[*losses, f"{loss(constant):.3f}", *in_nats(higher_loss(constant, "as it should be"))],
    )  # fmt: skip


# ---- float16


@claim("B43.6")
def bfloat16_is_crucial() -> Finding:
    """Larger activations do not change the output: each layer normalises its input. float16 ends at 65,504."""
    model, losses = base(None), {}
    writers = [part for name, part in model.named_modules() if name.endswith(("embed_tokens", "o_proj", "down_proj"))]
    for factor in (1, 1024):
        model.float()
        with torch.no_grad():
            for part in writers:
                part.weight *= factor
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            losses[factor, dtype] = evaluation.loss(model.to(dtype), tokenizer(), chats()[:4])
    right = losses[1, torch.float32]
    same = {key: math.isclose(value, right, rel_tol=0.05) for key, value in losses.items()}
    if not all(same[key] for key in same if torch.float16 not in key):
        raise RuntimeError(f"being louder was to change nothing but in float16: {losses}")
    broken = [not same[factor, torch.float16] for factor in (1, 1024)]
    if math.isfinite(losses[1024, torch.float16]):
        raise RuntimeError(f"float16 was to overflow 1,024 times as loud: {losses}")
    return by_setting(
        *broken, value="NaN" if broken[1] else "", shown=[f"{torch.finfo(torch.float16).max:,.0f}", "1,024"]
    )
