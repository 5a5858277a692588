"""Every kind of LoRA that PEFT can make: a merge gives the live model's logits, or refuses the kind by the option's name."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.adapters.drift import drift, logits
from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.adapters.lora_options import DEFAULTS, IN_MEMORY, PLAIN
from qlora_helpers.adapters.merge import load_base, merge, merge_into
from qlora_helpers.chats import read_chats
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from tests.support.merged_models import BASE, SHIPPED
from tests.support.short_runs import CPU, TOKENIZER

CHATS = read_chats(data_path("chats", "test.jsonl"))[:8]
START = TOKENIZER.apply_chat_template(CHATS[0], return_dict=True)["input_ids"][:1]
SAME = 0.001  # of a logit, in float32; a wrong merge is off by 0.3 to 70

BLOCKS = BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2)
HEAD, EMBEDDING = {"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["embed_tokens"]}
MEMORY = "merge it with merge"

# kind: options, what a merge from file to file says, and what one in memory says; nothing if it is the live model
KINDS = {
    "plain": ({}, None, None),
    "rslora": ({"use_rslora": True}, None, None),
    "rank_pattern": ({"rank_pattern": {"q_proj": 8}}, None, None),
    "alpha_pattern": ({"alpha_pattern": {"layers.1.*q_proj": 3}}, None, None),
    "rslora with patterns": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
        None,
        None,
    ),
    "some layers": ({"layers_to_transform": [1, 2]}, None, None),
    "excluded": ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, None, None),
    "dropout": ({"lora_dropout": 0.3}, None, None),
    "gaussian": ({"init_lora_weights": "gaussian"}, None, None),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, None, None),
    "eva": ({"init_lora_weights": "eva", "eva_config": EvaConfig()}, None, None),
    "no initialisation": ({"init_lora_weights": False}, None, None),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'", None),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'", None),
    "mica": ({"init_lora_weights": "mica"}, "init_lora_weights='mica'", None),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, f"lora_ga_config=.*{MEMORY}", None),
    "dora": ({"use_dora": True}, f"use_dora=True: .*{MEMORY}", None),
    "head": (HEAD, r"no place for .* such as base_model\.model\.lm_head\.base_layer\.weight", None),
    "embedding": (EMBEDDING, "changes model.embed_tokens, which is no linear layer", None),
    "tokens": ({"trainable_token_indices": [1, 2, 50]}, f"trainable_token_indices=.*{MEMORY}", None),
    "replication": ({"layer_replication": [[0, 3], [1, 4]]}, "layer_replication=.*keep the adapter", "layer_replication="),
    "saved head": ({"modules_to_save": ["lm_head"]}, f"modules_to_save=.*{MEMORY}", None),
    "saved norm": ({"modules_to_save": ["norm"]}, f"modules_to_save=.*{MEMORY}", None),
    "bias": ({"bias": "lora_only"}, "bias='lora_only'", None),
    "all biases": ({"bias": "all"}, "bias='all'", None),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True: .*keep the adapter", "lora_bias=True"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, None, None),  # PEFT switches it off for torch.nn.Linear
    "alora": ({"alora_invocation_tokens": START}, "alora_invocation_tokens=", "alora_invocation_tokens="),
    "kasa": ({"kasa_config": KasaConfig()}, "kasa_config=", None),
    "velora": ({"velora_config": VeloraConfig()}, "velora_config=", None),
    "monteclora": ({"monteclora_config": MontecloraConfig()}, "monteclora_config=", None),
    "bdlora": ({"use_bdlora": BLOCKS}, "use_bdlora=", None),
    "parameters": ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters=", None),
    "qalora": ({"use_qalora": True}, "use_qalora=True", None),
    "tying": ({"ensure_weight_tying": True}, "ensure_weight_tying=True", None),
    "tied, plain": ({}, None, None),
    "tied, embedding": (EMBEDDING, "changes model.embed_tokens", "target_modules, tie_word_embeddings"),
    "tied, head": (HEAD, "changes lm_head .*shares its weight", "target_modules, tie_word_embeddings"),
    "tied, both": ({"target_modules": ["embed_tokens", "lm_head"]}, "changes model.embed_tokens", "tie_word_embeddings"),
    "tied, tokens": ({"trainable_token_indices": [1, 2, 50]}, "trainable_token_indices=", None),
    "tied, saved head": ({"modules_to_save": ["lm_head"]}, "modules_to_save=", None),
    "gpt2": ({"target_modules": ["c_attn"]}, "fan_in_fan_out=True", None),
    "gpt2, square": ({"target_modules": ["attn.c_proj"]}, "fan_in_fan_out=True", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The shipped model; it with its embedding as output head; a random GPT-2, whose layers are not torch.nn.Linear."""
    folder = tmp_path_factory.mktemp("bases")
    config = AutoConfig.from_pretrained(BASE, trust_remote_code=False)
    config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_pretrained(BASE, config=config, dtype=torch.bfloat16, trust_remote_code=False)
    with torch.no_grad():
        tied.model.embed_tokens.weight *= 0.05
    tied.save_pretrained(folder / "tied")
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 1216, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape), dtype=torch.bfloat16)
    gpt2.save_pretrained(folder / "gpt2")
    return {"tied": str(folder / "tied"), "gpt2": str(folder / "gpt2"), "tiny-llama": str(BASE)}


def unquantised(base):
    return load_model(base, quantization=None, hardware=CPU)


def make(base, folder, options):
    """Save an adapter of one kind with random values, and load it: the live model."""
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(unquantised(base), LoraConfig(**config | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.02 * torch.randn_like(parameter.float())).to(parameter.dtype)
    model.save_pretrained(folder)
    return load_adapter(unquantised(base), folder)


@pytest.mark.filterwarnings("ignore")  # PEFT's and torch's, on rare kinds
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_gives_the_live_model_or_is_refused_by_the_option_s_name(kind, bases, tmp_path):
    options, from_files, in_memory = KINDS[kind]
    base = bases.get(kind.partition(",")[0], bases["tiny-llama"])
    live = make(base, tmp_path / "adapter", options)
    wanted = logits(live, TOKENIZER, CHATS)
    assert drift(logits(unquantised(base), TOKENIZER, CHATS), wanted).largest > 0.05  # the adapter does something
    if from_files:
        with pytest.raises(ValueError, match=from_files):
            merge_files(base, tmp_path / "adapter", tmp_path / "merged")
        assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    else:
        merge_files(base, tmp_path / "adapter", tmp_path / "merged")
    if in_memory:
        with pytest.raises(ValueError, match=f"^model.*{in_memory}"):
            merge_into(live)
        assert torch.equal(logits(live, TOKENIZER, CHATS), wanted)
    else:
        merged = merge_into(live)
        assert drift(logits(merged, TOKENIZER, CHATS), wanted).largest < SAME
        merged.save_pretrained(tmp_path / "saved")  # a tied head can come back as another
        assert drift(logits(unquantised(str(tmp_path / "saved")), TOKENIZER, CHATS), wanted).largest < SAME
    if not from_files:  # the same, rounded once to the dtype of the files
        for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
            assert torch.equal(weight, merged.state_dict()[name].to(torch.bfloat16)), name


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_stores_its_weight_the_other_way_round_is_refused_although_its_weight_is_square(bases, tmp_path):
    folder = tmp_path / "adapter"
    make(bases["gpt2"], folder, {"target_modules": ["attn.c_proj"]})
    config = json.loads((folder / "adapter_config.json").read_text()) | {"fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"changes transformer\.h\.0\.attn\.c_proj, which is no linear layer"):
        merge_files(bases["gpt2"], folder, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_is_refused_also_if_the_file_has_nothing_but_a_and_b(bases, tmp_path):
    folder = tmp_path / "adapter"
    make(bases["tied"], folder, HEAD)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: value for key, value in tensors.items() if "lora_" in key}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"changes lm_head \(target_modules\), which shares its weight"):
        merge_files(bases["tied"], folder, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_its_own_is_merged_if_the_file_has_nothing_but_a_and_b(tmp_path):
    folder = tmp_path / "adapter"
    live = make(str(BASE), folder, HEAD)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: value for key, value in tensors.items() if "lora_" in key}, folder / "adapter_model.safetensors")
    merged = load_file(merge_files(BASE, folder, tmp_path / "merged") / "model.safetensors")["lm_head.weight"]
    assert torch.equal(merged, merge_into(live).lm_head.weight.to(torch.bfloat16))


def test_every_option_of_peft_is_one_of_these_kinds_or_refused():
    """A new option of PEFT is in no list; this test names it, and someone tries it out."""
    tried = {option for options, *_ in KINDS.values() for option in options}
    refused = {"arrow_config", "layer_replication", "lora_bias", "alora_invocation_tokens", "megatron_config"}
    assert set(DEFAULTS) == IN_MEMORY | refused
    notes = set("auto_mapping base_model_name_or_path inference_mode megatron_core peft_type peft_version "
                "qalora_group_size revision task_type r lora_alpha layers_pattern".split())  # fmt: skip
    assert PLAIN - notes <= tried and IN_MEMORY - PLAIN - tried == {
        "corda_config",
        "loftq_config",
    }  # of initialisations


@pytest.mark.parametrize(
    ("option", "value"),
    [("arrow_config", ArrowConfig()), ("megatron_config", {"a": 1}), ("corda_config", CordaConfig()),
     ("loftq_config", {"loftq_bits": 4}), ("new_option", True),
     ("task_type", "SEQ_CLS"), ("peft_type", "ADALORA"), ("peft_type", None), ("bias", None), ("fan_in_fan_out", True)],
)  # fmt: skip
def test_an_option_in_the_file_that_no_list_has_is_refused_by_name(option, value, tmp_path):
    adapter = shutil.copytree(SHIPPED, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config[option] = vars(value) if hasattr(value, "__dict__") else value
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"adapter' ?.* ?has {option}="):
        merge_files(BASE, adapter, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("value", [None, False, {}])
def test_an_unknown_option_that_is_off_changes_nothing(value, tmp_path):
    """A newer PEFT writes those that it has, with their defaults."""
    adapter = shutil.copytree(SHIPPED, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"new_option": value}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged, wanted = merge_files(BASE, adapter, tmp_path / "merged"), merge_files(BASE, SHIPPED, tmp_path / "wanted")
    assert (merged / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()


def test_an_unknown_option_is_refused_by_a_merge_in_memory_too(tmp_path):
    """PEFT drops it with a warning."""
    adapter = shutil.copytree(SHIPPED, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"new_option": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has new_option=True: PEFT .* does not know it"):
        merge(adapter, "16bit")


def test_every_default_and_every_note_passes(tmp_path):
    adapter = shutil.copytree(SHIPPED, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    notes = {
        "revision": "abc",
        "auto_mapping": {"base_model_class": "X"},
        "inference_mode": False,
        "peft_version": "0.3.0",
    }
    everything = DEFAULTS | {"loftq_config": None} | config | notes
    (adapter / "adapter_config.json").write_text(json.dumps(everything))
    one = merge_files(BASE, adapter, tmp_path / "one") / "model.safetensors"
    assert one.read_bytes() == (merge_files(BASE, SHIPPED, tmp_path / "other") / "model.safetensors").read_bytes()


@pytest.fixture
def two():
    model = load_adapter(load_base("16bit", hardware=CPU), SHIPPED, "one")
    return load_adapter(model, SHIPPED, "two")


def test_all_active_adapters_are_merged_and_no_other(two):
    wanted = logits(two, TOKENIZER, CHATS)
    two.base_model.set_adapter(["one", "two"])
    both = logits(two, TOKENIZER, CHATS)
    assert drift(both, wanted).largest > 1
    assert drift(logits(merge_into(two), TOKENIZER, CHATS), both).largest < SAME


def test_the_inactive_adapter_is_not_merged(two):
    wanted = logits(two, TOKENIZER, CHATS)
    assert drift(logits(merge_into(two), TOKENIZER, CHATS), wanted).largest < SAME


@pytest.mark.parametrize("how", ["disabled", "none", "in some layers"])
def test_a_model_without_an_active_adapter_is_not_merged(how, two):
    if how == "disabled":
        two.base_model.disable_adapter_layers()
    elif how == "none":
        two.base_model.set_adapter([])
    else:
        two.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").set_adapter("one")
    with pytest.raises(ValueError, match=r"model has no adapter that is active in every layer: .* one of one, two"):
        merge_into(two)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "IA3"),
     (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING")],
)  # fmt: skip
def test_another_kind_than_lora_is_refused_by_name(config, kind):
    model = get_peft_model(load_base("16bit", hardware=CPU), config)
    with pytest.raises(ValueError, match=rf"^model's adapter 'default' has peft_type=.*{kind}.*: only LoRA is merged"):
        merge_into(model)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM without adapters: load one"):
        merge_into(load_base("16bit", hardware=CPU))
