"""The exercises of lesson 1, memory maths."""

from __future__ import annotations

import copy
from typing import Any

import peft

from qlora_helpers.course.exercises.asking import Exercise, function
from qlora_helpers.course.exercises.in_order import in_order
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_shape, known_config
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.units import GIB

__all__ = ["config_of_a_colleague", "room", "shrinking", "some_layers", "too_much"]

BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a parameter under double quantisation
RANK = 16


# ---- 1.1


def _shrinks(name: str) -> float:
    """How many times smaller the weights of a model are under QLoRA than in 16 bits."""
    shape = find_shape(name)
    rest = shape.parameters - shape.linear_parameters
    return 2 * shape.parameters / (shape.linear_parameters * BITS / 8 + 2 * rest)


_MODELS = {
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Mistral-7B": "mistralai/Mistral-7B-v0.1",
}

shrinking = Exercise(
    number="1.1",
    title="which shrinks most?",
    kind="predict",
    difficulty="easy",
    minutes=5,
    hints=(
        "What does QLoRA leave in 16 bits, and how large is that in each of the three?",
        "Compare vocab_size * hidden_size with the linear layers; KNOWN has the shapes.",
    ),
    fault=in_order(
        sorted(_MODELS, key=lambda name: -_shrinks(_MODELS[name])),
        {"Llama-3.2-1B": ["1B"], "Llama-3.1-8B": ["8B"], "Mistral-7B": ["7B", "Mistral"]},
    ),
)


# ---- 1.2


def _lora_parameters_of(s: dict, rank: int, targets: list[str]) -> int:
    shape = find_shape(s)
    adapted = [linear for linear in shape.linears if linear.name.rpartition(".")[2] in targets]
    return shape.num_hidden_layers * sum(rank * (linear.in_features + linear.out_features) for linear in adapted)


_8B, _7B, _70B, _1B = (
    known_config(name)
    for name in (
        "meta-llama/Llama-3.1-8B",
        "mistralai/Mistral-7B-v0.1",
        "meta-llama/Llama-2-70b-hf",
        "meta-llama/Llama-3.2-1B",
    )
)

some_layers = Exercise(
    number="1.2",
    title="LoRA on some layers",
    kind="build",
    difficulty="medium",
    minutes=10,
    hints=(
        "Each adapted layer has rank * (in + out) parameters, in every decoder layer.",
        "Keys and values are narrower than queries: lora_parameters above has their width as kv. The MLP's three have the "
        "hidden size on one side and the intermediate size on the other.",
    ),
    fault=function(
        _lora_parameters_of,
        cases={
            "Llama-3.1-8B at rank 8 on q_proj and v_proj": (_8B, 8, ["q_proj", "v_proj"]),
            "Llama-3.1-8B at rank 16 on k_proj and v_proj": (_8B, 16, ["k_proj", "v_proj"]),
            "Mistral-7B at rank 4 on the MLP": (_7B, 4, ["gate_proj", "up_proj", "down_proj"]),
            "Llama-2-70B at rank 64 on down_proj alone": (_70B, 64, ["down_proj"]),
            "Llama-3.2-1B at rank 32 on all seven": (
                _1B,
                32,
                ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            ),
            "Llama-3.1-8B with no layer named": (_8B, 16, []),
        },
    ),
)


# ---- 1.3


def _leaves_room(s: dict, card_gib: float) -> bool:
    shape = find_shape(s)
    rest = shape.parameters - shape.linear_parameters
    return (shape.linear_parameters * BITS / 8 + 2 * rest) / GIB + 2 <= card_gib


room = Exercise(
    number="1.3",
    title="room on the card",
    kind="build",
    difficulty="easy",
    minutes=5,
    hints=(
        "Which unit does the card have, and which have your weights?",
        "Take the bytes of qlora_weight_bytes, with scales and all that stays in 16 bits; a GiB is 2**30 of them.",
    ),
    fault=function(
        _leaves_room,
        cases={
            "Llama-3.1-8B on a T4 of 14.56 GiB": (_8B, 14.56),
            "Llama-3.1-8B on 7.5 GiB": (_8B, 7.5),  # 7.31 are needed; who counts the weights in GB needs 7.70
            "Llama-3.1-8B on 7.2 GiB": (_8B, 7.2),  # who takes 2 GB for 2 GiB needs 7.17
            "Mistral-7B on 5.5 GiB": (_7B, 5.5),
            "Llama-2-70B on 36.5 GiB": (_70B, 36.5),  # 35.87; in GB 38.36
            "Llama-2-70B on 24 GiB": (_70B, 24),
            "Llama-2-70B on 34 GiB": (_70B, 34),  # the weights alone would fit
        },
    ),
)


# ---- 1.4


def config_of_a_colleague() -> peft.LoraConfig:
    """The config of a run that takes more memory than LoRA should."""
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )


def _fault_of_config(answer: Any) -> str:
    if not isinstance(answer, peft.LoraConfig):
        return f"your answer is {answer!r}, and not a LoraConfig."
    model = load_model(hardware=detect("cpu"))
    layers = {name for name, _ in linear_layers(model)}
    model = peft.get_peft_model(model, copy.deepcopy(answer))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = sum(parameter.numel() for name, parameter in trained.items() if "lora_" not in name)
    if others:
        return f"with it, {others:,} numbers are trained that belong to no adapter."
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained}
    if adapted - layers:
        return f"with it, {', '.join(sorted(adapted - layers))} has an adapter, too."
    if layers - adapted:
        return f"with it, {len(adapted)} of {len(layers)} linear layers have an adapter."
    ranks = {min(parameter.shape) for parameter in trained.values()}
    if ranks != {RANK}:
        return f"with it, the adapters have the rank {', '.join(map(str, sorted(ranks)))}."
    return ""


too_much = Exercise(
    number="1.4",
    title="a run that takes too much",
    kind="run",
    difficulty="medium",
    minutes=15,
    hints=(
        "Make the model with get_peft_model and look at named_parameters(): which of them have requires_grad?",
        "An adapter's parameters have lora_ in their names. What else is trained? Print their_config, and look for it there.",
    ),
    fault=_fault_of_config,
)
