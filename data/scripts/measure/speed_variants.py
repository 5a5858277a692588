"""The trainers that `speed.py` times: the articles' recipe, plain TRL, the course's own and Unsloth.

All take rank 16 and alpha 32 on all linear layers, learning rate 2e-4, paged 8-bit AdamW, seed 0, and the same
chats in the same order. Models have real shapes and random weights, made on the GPU in 4 bits (`memory.py`).

articles: the recipe that two of the articles print (the third shows no code). It is the 8B one's:
`prepare_model_for_kbit_training` (which makes embeddings, norms and output head float32), dropout 0.05, gradient
checkpointing, cosine schedule, max_grad_norm 0.3, padding with the end token. Repaired, since it does not run as printed:
    warmup_ratio=0.03 is warmup_steps=0.03
    SFTTrainer's tokenizer, max_seq_length and dataset_text_field are processing_class, and SFTConfig's max_length and
        dataset_text_field; so its arguments are an SFTConfig, or max_length would be 1,024
    the adapters are added once, by get_peft_model; one article also gives the trainer a peft_config, which it refuses
    on a T4, bfloat16 is emulated: float16 instead, with float32 adapters, without which the first step fails
    its batch size and accumulation are the row's

trl: SFTTrainer with its own defaults (checkpointing is one of them), but paged 8-bit AdamW; float32 adapters in float16.

ours: `build_trainer`, with a row's settings.

unsloth: as in its notebooks. It loads no file of weights: `AutoModelForCausalLM` in its loader is replaced by one that
makes random ones. The rest of its loader, its patches and its trainer are as they come.
"""

import copy
from pathlib import Path

from data.scripts.measure import speed_data
from data.scripts.measure.t4_gear import as_on_a_t4

__all__ = ["RECIPE", "build", "dtype_of", "settings_of", "sft_options"]

RECIPE = {"warmup_steps": 0.03, "gradient_checkpointing": True, "max_grad_norm": 0.3, "lr_scheduler_type": "cosine"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 4_096  # words that occur; the model's may be larger
DTYPES = {"bf16": "bfloat16", "t4": "float16"}
TINY_LENGTH, TINY_BATCH = 64, 2


def dtype_of(row: dict, dry: bool) -> str:
    """torch's name of the dtype that a row computes in."""
    return "float32" if dry else DTYPES[row["gear"]]


def build(row: dict, dry: bool, steps: int, output: Path):
    """The trainer of a row, ready to train for `steps` steps.

    Args:
        dry: a tiny model on a CPU.
    """
    if row["gear"] == "t4" and not dry:
        as_on_a_t4(math_kernel=row["variant"] != "ours")
    if dry:
        row = row | {"max_length": TINY_LENGTH, "batch_size": min(row["batch_size"], TINY_BATCH)}
    lengths = speed_data.lengths_for(row, steps)
    if dry:
        lengths = lengths[: TINY_BATCH * row["accumulation"] * steps]
    return BUILDERS[row["variant"]](row, dry, steps, output, lengths)


def _model_of(row: dict, dry: bool, t4_kernels: bool = False):
    from data.scripts.measure.memory import build_model

    method = row["settings"].get("method", "qlora")
    about = {"config": row["config"], "method": method, "compute_dtype": dtype_of(row, dry), "double_quant": True}
    return build_model(about | {"attention": "sdpa", "t4_kernels": t4_kernels and not dry}, dry)


def _words(config) -> int:
    return min(config.vocab_size, VOCABULARY)


def _texts(lengths: list[int], tokenizer, vocabulary: int):
    """The chats as the chat template writes them, as a dataset with the column "text"."""
    import datasets

    chats = speed_data.chats_of(lengths, vocabulary)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return datasets.Dataset.from_dict({"text": texts})


def sft_options(row: dict, dry: bool, steps: int, output: Path) -> dict:
    """The options of SFTConfig that all variants share."""
    dtype = dtype_of(row, dry)
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": row["batch_size"],
        "gradient_accumulation_steps": row["accumulation"],
        "learning_rate": 2e-4,
        "max_length": row["max_length"],
        "optim": "adamw_torch" if dry else "paged_adamw_8bit",
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": dry,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show the mean of the earlier losses instead of a NaN
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    } | row["settings"]


def _float32_adapters(trainer) -> None:
    """TRL makes the adapters of a 4-bit model bfloat16, whose gradients float16's loss scaling cannot unscale."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _articles(row: dict, dry: bool, steps: int, output: Path, lengths: list[int]):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from trl import SFTConfig, SFTTrainer

    model = prepare_model_for_kbit_training(_model_of(row, dry))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    tokenizer = speed_data.make_tokenizer(_words(model.config), pad_token="</s>")
    options = sft_options(row, dry, steps, output) | RECIPE
    trainer = SFTTrainer(
        model=get_peft_model(model, lora),
        args=SFTConfig(**options, dataset_text_field="text"),
        train_dataset=_texts(lengths, tokenizer, _words(model.config)),
        processing_class=tokenizer,
    )
    if dtype_of(row, dry) != "bfloat16":
        _float32_adapters(trainer)
    return trainer


def _trl(row: dict, dry: bool, steps: int, output: Path, lengths: list[int]):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, options = _model_of(row, dry), sft_options(row, dry, steps, output)
    tokenizer = speed_data.make_tokenizer(_words(model.config))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options, dataset_text_field="text"),
        train_dataset=_texts(lengths, tokenizer, _words(model.config)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if dtype_of(row, dry) != "bfloat16":
        _float32_adapters(trainer)
    return trainer


def _ours(row: dict, dry: bool, steps: int, output: Path, lengths: list[int]):
    from qlora_helpers.hardware import detect
    from qlora_helpers.training.trainer import build_trainer

    settings = settings_of(row, steps)  # first: a setting that is wrong costs no time on the GPU
    hardware = detect("cpu" if dry else {"bf16": "ampere", "t4": "t4"}[row["gear"]])
    model = _model_of(row, dry, t4_kernels=row["gear"] == "t4")
    words = _words(model.config)
    chats = speed_data.chats_of(lengths, words)
    return build_trainer(model, speed_data.make_tokenizer(words), chats, output, settings, hardware)


def settings_of(row: dict, steps: int | None = None):
    """The `Settings` of a row of the variant "ours"."""
    from qlora_helpers.settings import Settings

    usual = {"batch_size": row["batch_size"], "max_length": row["max_length"], "gradient_checkpointing": True}
    usual |= {
        "accumulation": row["accumulation"],
        "steps": steps or 1,
        "learning_rate": 2e-4,
        "warmup_steps": 1,
        "log_steps": 1,
    }
    return Settings(**usual | row["settings"])


def _unsloth(row: dict, dry: bool, steps: int, output: Path, lengths: list[int]):
    if dry:
        raise ValueError("Unsloth needs a GPU: leave its rows out with --device cpu")
    import torch
    import unsloth  # before transformers and TRL, which it patches
    import unsloth.models.llama
    from transformers import AutoConfig

    fields = copy.deepcopy(row["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    dtype, words = getattr(torch, dtype_of(row, dry)), _words(config)
    folder = output / "model-without-weights"
    config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]]
    config.dtype = dtype
    tokenizer = speed_data.make_tokenizer(words)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    unsloth.models.llama.AutoModelForCausalLM = _random_weights(config)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=row["max_length"],
        dtype=dtype,
        load_in_4bit=True,
        device_map={"": 0},
        use_exact_model_name=True,  # it would look for the name on the Hub
        local_files_only=True,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        target_modules=LINEAR,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    from trl import SFTConfig, SFTTrainer  # as Unsloth has patched them

    options = sft_options(row, dry, steps, output)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**options, dataset_text_field="text", dataset_num_proc=1),
        train_dataset=_texts(lengths, tokenizer, words),
        processing_class=tokenizer,
    )


def _random_weights(config):
    """In place of transformers' `AutoModelForCausalLM`: a class whose models have this configuration and random weights.

    It must be made before Unsloth patches the classes of the model.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    from data.scripts.measure.memory import RandomWeight

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: weight for name, weight in meta.state_dict().items() if name not in meta.all_tied_weights_keys}

    class RandomWeights:
        @staticmethod
        def from_pretrained(
            folder, *, dtype, device_map, quantization_config=None, attn_implementation, config=config, **others
        ):
            if quantization_config is None:
                raise RuntimeError("Unsloth asked for a model that is not in 4 bits")
            if others.get("max_position_embeddings"):
                config.max_position_embeddings = others["max_position_embeddings"]
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict={
                    name: RandomWeight(name, weight, config, dtype, device_map[""]) for name, weight in shapes.items()
                },
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config,
                attn_implementation=attn_implementation,
            )
            model.config._name_or_path = str(folder)
            return model

    return RandomWeights


BUILDERS = {"articles": _articles, "trl": _trl, "ours": _ours, "unsloth": _unsloth}
