"""The shapes of known models, against their published parameter counts."""

import pytest

from qlora_helpers.models import linear_layers
from qlora_helpers.shapes import KNOWN, meta_model

PUBLISHED = {  # parameters in all; in the linear layers of the decoder
    "Llama-3.2-1B": (1_235_814_400, 973_078_528),
    "Mistral-7B": (7_241_732_096, 6_979_321_856),
    "Llama-3.1-8B": (8_030_261_248, 6_979_321_856),
    "Llama-2-70B": (68_976_648_192, 68_451_041_280),
    "Llama-3.1-70B": (70_553_706_496, 68_451_041_280),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameter_counts(name):
    model = meta_model(KNOWN[name])
    linear = sum(layer.weight.numel() for _, layer in linear_layers(model))
    assert (model.num_parameters(), linear) == PUBLISHED[name]
