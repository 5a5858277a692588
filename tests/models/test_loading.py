"""What is loaded, and what is refused."""

import re

import pytest

from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path

CPU = detect("cpu")


def test_an_unknown_quantisation_is_refused():
    with pytest.raises(ValueError, match="quantization='int4': choose one of nf4, fp4, or None"):
        load_model(quantization="int4", hardware=CPU)


@pytest.mark.parametrize("value", ["no", 1, None, 0])
def test_what_is_no_switch_is_refused(value):
    with pytest.raises(ValueError, match=f"^double_quant={value!r}: must be True or False$"):
        load_model(double_quant=value, hardware=CPU)


@pytest.mark.parametrize("value", ["cpu", 0, {"gear": "cpu"}])
def test_what_is_no_hardware_is_refused(value):
    said = rf"^hardware={re.escape(repr(value))}: pass what qlora_helpers.hardware.detect\(\) returns, or None$"
    with pytest.raises(ValueError, match=said):
        load_model(hardware=value)


def test_a_folder_without_a_tokenizer_is_refused_in_our_words(tmp_path):
    adapter = data_path("adapters", "sentences")
    with pytest.raises(ValueError, match=f"^name={str(adapter)!r}: is the folder of an adapter: load its base"):
        load_tokenizer(str(adapter))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: pass the folder of a model$"):
        load_tokenizer(str(tmp_path))
