"""What a config says of its quantisation, held against the libraries' own words."""

import importlib.metadata
import re
from pathlib import Path

import peft.import_utils
import pytest
import transformers.utils.quantization_config as their_configs
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import import_utils

from qlora_helpers.memory import saved_format as module
from qlora_helpers.memory.saved_format import saved_format

LLAMA = {"model_type": "llama"}


def of(**entry):
    return saved_format(LLAMA | {"quantization_config": entry})


@pytest.mark.parametrize("config", [LLAMA, LLAMA | {"quantization_config": None}, {"text_config": 3}])
def test_a_model_that_is_not_quantised_has_no_format(config):
    assert saved_format(config) is None


@pytest.mark.parametrize("part", ["whole", "text"])
def test_bitsandbytes_4_bits_are_loaded_here_with_the_modules_that_stay(part):
    entry = {
        "quantization_config": {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "vision_tower"],
        }
    }  # fmt: skip
    found = saved_format(LLAMA | (entry if part == "whole" else {"text_config": entry}))
    assert (found.bits, found.stays, found.trainable, found.is_loaded_here) == (
        4,
        ("lm_head", "vision_tower"),
        True,
        True,
    )
    assert str(found) == "saved in bitsandbytes 4 bits; not quantised: lm_head, vision_tower; LoRA can be trained on it"


@pytest.mark.parametrize(
    ("entry", "label", "bits", "trainable", "stays"),
    [
        ({"load_in_4bit": True}, "bitsandbytes 4 bits", 4, True, None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8 bits", 8, True, None),
        ({"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}, "FP8 by blocks", 8, True, ("lm_head",)),
        ({"quant_method": "fp8", "ignored_layers": ["gate"]}, "FP8 by blocks", 8, True, ("gate",)),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["a", "b"]}, "MXFP4", 4, False, ("a", "b")),
        ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": None}, "AWQ", 4, False, None),
        ({"quant_method": "gptq", "bits": 8}, "GPTQ", 8, False, None),
        ({"quant_method": "fbgemm_fp8"}, "FP8 of FBGEMM", 8, False, None),
        ({"quant_method": "no_such_method", "bits": 3}, "'no_such_method'", 3, None, None),
        ({}, "'a way that is not named'", None, None, None),
        ({"quant_method": ["gptq"]}, "'a way that is not named'", None, None, None),
        ({"quant_method": "gptq", "load_in_4bit": True}, "GPTQ", None, False, None),
    ],
)
def test_each_method_is_read(entry, label, bits, trainable, stays):
    found = of(**entry)
    assert (found.label, found.bits, found.trainable, found.stays) == (label, bits, trainable, stays)
    assert found.is_loaded_here == (label == "bitsandbytes 4 bits")
    assert label in str(found)


def test_the_width_of_compressed_tensors_is_that_of_its_groups():
    groups = {"group_0": {"weights": {"num_bits": 4}}, "group_1": {"weights": {"num_bits": 8}}}
    entry = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
    assert of(**entry, config_groups={"group_0": groups["group_0"]}).bits == 4
    found = of(**entry, config_groups=groups)
    assert found.bits is None and found.stays == ("lm_head",)


def test_an_entry_that_is_no_object_is_said_to_say_nothing():
    assert "says nothing" in str(saved_format(LLAMA | {"quantization_config": "nf4"}))


def test_missing_packages_are_named_and_one_that_is_there_in_a_version_too_old(monkeypatch):
    assert of(quant_method="gptq", bits=4).missing == ("gptqmodel>=7.0.0", "optimum>=1.24.0")
    assert "LoRA on it needs gptqmodel>=7.0.0 and optimum>=1.24.0" in str(of(quant_method="gptq"))
    there = {"gptqmodel": "7.1", "optimum": "1.23.9"}
    monkeypatch.setattr(importlib.metadata, "version", there.__getitem__)
    assert of(quant_method="gptq").missing == ("optimum>=1.24.0",)
    there["optimum"] = "1.24.0"
    assert of(quant_method="gptq").trainable is True


# ---- Against the libraries


@pytest.mark.parametrize("method", sorted(module._METHODS))
def test_what_is_said_of_training_is_what_transformers_says(method):
    kind = AUTO_QUANTIZER_MAPPING[method]  # every method here is one of theirs
    said, quantizer = module._METHODS[method].trainable, object.__new__(kind)
    try:
        theirs = quantizer.is_trainable
    except (AttributeError, importlib.metadata.PackageNotFoundError) as error:
        # it depends on the config, or on the version of a package that is not here
        assert said is None or isinstance(error, importlib.metadata.PackageNotFoundError), method
    else:
        assert said == theirs


def test_every_way_to_dequantise_exists_and_no_other_of_these_methods_has_one():
    for method, known in module._METHODS.items():
        config = module_config(method)
        takes_it = "dequantize" in config.__init__.__code__.co_varnames
        assert takes_it == bool(known.dequantise), method
        if takes_it:
            assert known.dequantise == f"{config.__name__}(dequantize=True)"


def module_config(method):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return AUTO_QUANTIZATION_CONFIG_MAPPING[method]


def test_the_versions_are_those_that_the_libraries_ask_for():
    asked = {package.partition(">=")[::2] for known in module._METHODS.values() for package in known.packages}
    theirs = Path(peft.import_utils.__file__).read_text(encoding="utf-8")
    for name, constant in (("gptqmodel", "GPTQMODEL"), ("optimum", "OPTIMUM"), ("torchao", "TORCHAO")):
        least = re.search(rf'{constant}_MINIMUM_VERSION = packaging\.version\.parse\("([\d.]+)"\)', theirs)[1]
        assert (name, least) in asked
    for name in ("compressed-tensors", "hqq", "gguf"):
        assert (name, getattr(import_utils, f"{name.upper().replace('-', '_')}_MIN_VERSION")) in asked


def test_the_keys_of_what_stays_are_those_of_the_libraries_configs():
    for method, known in module._METHODS.items():
        names = module_config(method).__init__.__code__.co_varnames
        if known.stays != ("modules_to_not_convert",):
            assert known.stays[0] in names, method
    assert '"ignored_layers" in kwargs' in Path(their_configs.__file__).read_text(encoding="utf-8")
