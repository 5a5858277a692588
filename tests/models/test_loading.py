"""What is loaded, and what is refused."""

import pytest

from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model

CPU = detect("cpu")


def test_an_unknown_quantisation_is_refused():
    with pytest.raises(ValueError, match="quantization='int4': choose one of nf4, fp4, or None"):
        load_model(quantization="int4", hardware=CPU)
