"""A model made ready on the meta device, as the libraries make one ready."""

from dataclasses import replace

import pytest
import torch

from qlora_helpers.memory import find_gpu
from qlora_helpers.memory.fake.four_bit import Fake4bit
from qlora_helpers.memory.fake.model import attention_of, prepare
from qlora_helpers.models.attention import REPEATED_KV
from tests.memory.fake.models import DEEPSEEK, GEMMA3, GPU, LLAMA, QWEN3_MOE, RUN


def base_of(prepared):
    return prepared.model.get_base_model()


def test_some_layers_stand_for_all():
    prepared = prepare(GEMMA3, RUN, GPU)
    assert (prepared.places, prepared.template) == ([0, 2, 3, 8], [0, 2, 1, 2, 2, 1, 2, 2, 3])
    assert list(base_of(prepared).model.layers) == prepared.layers and len(prepared.layers) == 4
    whole = prepare(GEMMA3, RUN, GPU, whole=True)
    assert whole.places == whole.template == list(range(9)) and len(whole.layers) == 9


def test_qlora_has_4_bit_layers_with_adapters_and_trains_only_these():
    model = prepare(LLAMA, RUN, GPU).model
    four_bit = [module for module in model.modules() if isinstance(module, Fake4bit)]
    assert len(four_bit) == 3 * 7  # of the three layers that are run, and not the output head
    assert {layer.compute_dtype for layer in four_bit} == {torch.bfloat16}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 3 * 7 and all(".lora_" in name for name in trained)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_the_methods_differ_in_what_is_in_4_bits_and_in_what_is_trained():
    for method, trained in (("lora", 2 * 3 * 7), ("full", 3 + 3 * 9)):
        model = prepare(LLAMA, replace(RUN, method=method), GPU).model
        assert not any(isinstance(module, Fake4bit) for module in model.modules())
        assert sum(parameter.requires_grad for parameter in model.parameters()) == trained


def test_modules_on_the_skip_list_stay_as_they_are():
    model = base_of(prepare(LLAMA, replace(RUN, target_modules=("q_proj",)), GPU, skip=["lm_head", "down_proj"]))
    kinds = {name.rpartition(".")[2]: type(m) for name, m in model.named_modules() if hasattr(m, "in_features")}
    assert kinds["down_proj"] is torch.nn.Linear and kinds["up_proj"] is Fake4bit


@pytest.mark.parametrize(("layers", "checkpointed"), [(None, 6), (0, 0), (2, 2), (4, 4), (99, 6)])
def test_the_first_layers_are_checkpointed(layers, checkpointed):
    prepared = prepare(LLAMA, replace(RUN, checkpointed_layers=layers), GPU, whole=True)
    assert [layer.gradient_checkpointing for layer in prepared.layers] == [place < checkpointed for place in range(6)]
    short = prepare(LLAMA, replace(RUN, checkpointed_layers=layers), GPU)
    of_all = [short.layers[of].gradient_checkpointing for of in short.template]
    assert of_all == [place < checkpointed for place in range(6)]


def test_without_checkpointing_no_layer_is():
    prepared = prepare(LLAMA, replace(RUN, gradient_checkpointing=False), GPU)
    assert not any(layer.gradient_checkpointing for layer in prepared.layers)


def test_16_bit_weights_made_float32_remember_what_they_were_loaded_in():
    base = base_of(prepare(LLAMA, replace(RUN, upcast_fp32=True), GPU))
    table = base.get_input_embeddings().weight
    assert (table.dtype, table.loaded_width) == (torch.float32, 2)
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8  # packed ones stay


def test_the_attention_is_that_of_the_card():
    assert attention_of(RUN, find_gpu("h200")) == "sdpa"
    assert attention_of(RUN, find_gpu("t4")) == REPEATED_KV
    for name, expected in (("math", "sdpa"), ("eager", "eager")):
        assert attention_of(replace(RUN, attention=name), find_gpu("t4")) == expected


def test_routers_report_and_are_counted_where_the_trainer_balances_them():
    prepared = prepare(QWEN3_MOE, replace(RUN, target_modules=("q_proj",)), GPU)
    assert prepared.routed == 5  # two of the seven are dense
    assert base_of(prepared).config.output_router_logits
    silent = prepare(QWEN3_MOE | {"router_aux_loss_coef": 0.0}, replace(RUN, target_modules=("q_proj",)), GPU)
    assert not base_of(silent).config.output_router_logits
    assert prepare(DEEPSEEK, replace(RUN, target_modules=("o_proj",)), GPU).routed == 5
