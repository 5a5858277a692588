"""A model without memory has the layers and the parameters of the real one."""

import pytest
import torch

from qlora_helpers.models.meta import meta_model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_its_tensors_have_shapes_and_no_values(family):
    config = {"model_type": family, **SMALL}
    model = meta_model(config)
    assert model.config.model_type == family and len(model.model.layers) == 2
    assert model.model.layers[0].mlp.up_proj.weight.shape == (128, 64)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.zeros(1).device.type == "cpu"  # tensors of others are made as before
    assert config == {"model_type": family, **SMALL}


def test_a_config_without_a_family_is_refused():
    with pytest.raises(KeyError, match="model_type"):
        meta_model(SMALL)
