"""Right and wrong answers to the exercises of lesson 1."""

import numpy as np
import peft

from qlora_helpers.memory import find_shape, predict
from qlora_helpers.models.meta import meta_model
from qlora_helpers.settings import GPU_RUN
from tests.course.exercises.tried import Tried

GB, GIB = 10**9, 2**30
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def weight_bytes(s: dict) -> float:
    shape = find_shape(s)
    return shape.linear_parameters * BITS / 8 + 2 * (shape.parameters - shape.linear_parameters)


# ---- 1.2


def from_a_table(s, rank, targets):
    h, i = s["hidden_size"], s["intermediate_size"]
    kv = h // s["num_attention_heads"] * s["num_key_value_heads"]
    sides = {"q_proj": h + h, "k_proj": h + kv, "v_proj": h + kv, "o_proj": h + h}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), h + i)
    return s["num_hidden_layers"] * rank * sum(sides[name] for name in targets)


def by_peft(s, rank, targets):
    if not targets:
        return 0
    config = peft.LoraConfig(r=rank, target_modules=list(targets), task_type="CAUSAL_LM")
    return peft.get_peft_model(meta_model(s), config).get_nb_trainable_parameters()[0]


def from_the_layers(s, rank, targets):
    total = 0
    for name, module in meta_model(s).named_modules():
        if name.rpartition(".")[2] in targets:
            total += rank * sum(module.weight.shape)
    return total


def by_the_predictor(s, rank, targets):
    """The predictor counts two bytes for each number of a bfloat16 adapter."""
    if not targets:
        return 0
    from dataclasses import replace

    settings = replace(GPU_RUN, rank=rank, target_modules=targets, adapter_dtype="bfloat16")
    return predict(find_shape(s), settings, "h200").parts["adapters"] // 2


def as_a_float(s, rank, targets):
    return float(from_a_table(s, rank, targets))


def of_numpy(s, rank, targets):
    return np.int64(from_a_table(s, rank, targets))


def keys_as_wide_as_queries(s, rank, targets):
    h, i = s["hidden_size"], s["intermediate_size"]
    wide = ("gate_proj", "up_proj", "down_proj")
    return s["num_hidden_layers"] * rank * sum(h + i if name in wide else 2 * h for name in targets)


def of_one_layer(s, rank, targets):
    return from_a_table(s, rank, targets) // s["num_hidden_layers"]


def of_the_weights_themselves(s, rank, targets):
    shape = find_shape(s)
    return shape.num_hidden_layers * sum(
        linear.weights for linear in shape.linears if linear.name.rpartition(".")[2] in targets
    )


def always_q_and_v(s, rank, targets):
    return from_a_table(s, rank, ["q_proj", "v_proj"])


# ---- 1.3


def in_gib(s, card_gib):
    return weight_bytes(s) / GIB + 2 <= card_gib


def in_bytes(s, card_gib):
    return weight_bytes(s) + 2 * GIB <= card_gib * GIB


def in_gb(s, card_gib):
    return weight_bytes(s) / GB + 2 * GIB / GB <= card_gib * GIB / GB


def what_is_left(s, card_gib):
    left = card_gib - weight_bytes(s) / 2**30
    return left >= 2


def of_numpys_bool(s, card_gib):
    return np.float64(card_gib) - 2 >= weight_bytes(s) / GIB


def gb_against_gib(s, card_gib):
    return weight_bytes(s) / GB + 2 <= card_gib


def gb_of_other_things(s, card_gib):
    return weight_bytes(s) + 2 * GB <= card_gib * GIB


def a_card_of_gb(s, card_gib):
    return weight_bytes(s) + 2 * GIB <= card_gib * GB


def with_no_room_for_others(s, card_gib):
    return weight_bytes(s) / GIB <= card_gib


def half_a_byte_each(s, card_gib):
    return find_shape(s).parameters / 2 / GIB + 2 <= card_gib


# ---- 1.4


def config(**options):
    return peft.LoraConfig(
        **{"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    )


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

RIGHT = {
    "shrinking": [
        Tried(["Mistral-7B", "Llama-3.1-8B", "Llama-3.2-1B"]),
        Tried(("mistral 7b", "llama 3.1 8b", "llama 3.2 1b")),
        Tried(["7B", "8B", "1B"]),
        Tried(np.array(["Mistral-7B", "Llama-3.1-8B", "Llama-3.2-1B"])),
        Tried([" Mistral ", "LLAMA-3.1-8B", "llama_3.2_1b"]),
    ],
    "some_layers": [
        Tried(from_a_table), Tried(by_peft), Tried(from_the_layers), Tried(by_the_predictor), Tried(as_a_float), Tried(of_numpy),
    ],
    "room": [Tried(in_gib), Tried(in_bytes), Tried(in_gb), Tried(what_is_left), Tried(of_numpys_bool)],
    "too_much": [
        Tried(config()),
        Tried(config(target_modules=SEVEN)),
        Tried(config(lora_dropout=0.05, bias="none")),
        Tried(config(modules_to_save=None, lora_alpha=16)),
        Tried(config(target_modules=set(SEVEN))),
    ],
}  # fmt: skip

WRONG = {
    "shrinking": [
        Tried(["Llama-3.2-1B", "Llama-3.1-8B", "Mistral-7B"], says="1 of 3 is right"),
        Tried(["Llama-3.1-8B", "Mistral-7B", "Llama-3.2-1B"], says="1 of 3 is right"),
        Tried(["Llama-3.1-8B", "Llama-3.2-1B", "Mistral-7B"], says="0 of 3 are right"),
        Tried("Mistral-7B", says="where a list of 3 words is asked for"),
        Tried(["Mistral-7B"], says="has 1 entries, where 3"),
        Tried(["Mistral-7B", "Llama-3.1-8B", "Llama-2-70B"], says="'Llama-2-70B' in it, which is none of"),
    ],
    "some_layers": [
        Tried(keys_as_wide_as_queries, says="in the case “Llama-3.1-8B at rank 8 on q_proj and v_proj”"),
        Tried(of_one_layer, says="gives 106,496"),
        Tried(of_the_weights_themselves, says="q_proj and v_proj"),
        Tried(always_q_and_v, says="in the case “Llama-3.1-8B at rank 16 on k_proj and v_proj”"),
        Tried(3_407_872, says="not a function"),
    ],
    "room": [
        Tried(gb_against_gib, says="in the case “Llama-3.1-8B on 7.5 GiB” your function gives False"),
        Tried(gb_of_other_things, says="in the case “Llama-3.1-8B on 7.2 GiB” your function gives True"),
        Tried(a_card_of_gb, says="gives False"),
        Tried(with_no_room_for_others, says="gives True"),
        Tried(half_a_byte_each, says="gives True"),
    ],
    "too_much": [
        Tried(config(modules_to_save=["lm_head"]), says="311,296 numbers are trained that belong to no adapter"),
        Tried(config(modules_to_save=["embed_tokens", "lm_head"], r=4), says="622,592 numbers are trained"),
        Tried(config(r=8), says="the adapters have the rank 8"),
        Tried(config(target_modules=["q_proj", "v_proj"]), says="8 of 28 linear layers have an adapter"),
        Tried(config(target_modules=[*SEVEN, "lm_head"]), says="lm_head has an adapter, too"),
        Tried({"r": 16, "target_modules": "all-linear"}, says="not a LoraConfig"),
    ],
}
