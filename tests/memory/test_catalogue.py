"""The configs of known models, checked against their published parameter counts."""

import pytest

from qlora_helpers.memory import known_config
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import linear_layers

PUBLISHED = {  # all parameters; those in the linear layers of the decoder
    "Llama-3.2-1B": (1_235_814_400, 973_078_528),
    "Mistral-7B-v0.1": (7_241_732_096, 6_979_321_856),
    "Llama-3.1-8B": (8_030_261_248, 6_979_321_856),
    "Llama-2-70b-hf": (68_976_648_192, 68_451_041_280),
    "Llama-3.1-70B": (70_553_706_496, 68_451_041_280),
    "Llama-2-7b-hf": (6_738_415_616, 6_476_005_376),
    "Qwen2.5-1.5B": (1_543_714_304, 1_310_195_712),
    "Qwen2.5-3B": (3_085_938_688, 2_774_532_096),
    "Qwen2.5-7B": (7_615_616_512, 6_525_288_448),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    model = meta_model(known_config(name))
    linear = sum(layer.weight.numel() for _, layer in linear_layers(model))
    assert (model.num_parameters(), linear) == PUBLISHED[name]
