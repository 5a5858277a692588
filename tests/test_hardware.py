"""The gear that each kind of machine gets, on simulated machines."""

import os
from types import SimpleNamespace

import pytest
import torch

from qlora_helpers.hardware import GEARS, detect, peak_memory_bytes


@pytest.fixture(autouse=True)
def no_gear_is_set(monkeypatch):
    monkeypatch.delenv("QLORA_GEAR", raising=False)


@pytest.fixture
def pretend(monkeypatch):
    """Make torch see this GPU, or no GPU."""

    def see(name=None, capability=(0, 0), native_bfloat16=False):
        def is_bf16_supported(including_emulation=True):
            return True if including_emulation else native_bfloat16  # as torch does: emulation counts by default

        properties = SimpleNamespace(name=name, total_memory=16 * 1024**3, major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return see


def pretend_t4(pretend):
    pretend("Tesla T4", (7, 5), native_bfloat16=False)


def pretend_a100(pretend):
    pretend("NVIDIA A100", (8, 0), native_bfloat16=True)


def test_no_gpu_is_the_cpu_gear_in_float32(pretend):
    pretend()
    hardware = detect()
    assert (hardware.gear, hardware.device, hardware.compute_dtype) == ("cpu", "cpu", torch.float32)
    assert (hardware.gpu_name, hardware.gpu_bytes, hardware.capability) == (None, 0, None)
    assert hardware.native_bfloat16 is False
    assert hardware.chosen_by == "detection"


def test_a_t4_which_only_emulates_bfloat16_is_the_t4_gear_in_float16(pretend):
    pretend_t4(pretend)
    assert torch.cuda.is_bf16_supported()  # the answer that must not be trusted
    hardware = detect()
    assert (hardware.gear, hardware.device, hardware.compute_dtype) == ("t4", "cuda", torch.float16)
    assert (hardware.gpu_name, hardware.gpu_bytes, hardware.capability) == ("Tesla T4", 16 * 1024**3, (7, 5))
    assert hardware.native_bfloat16 is False


def test_a_gpu_with_native_bfloat16_is_the_ampere_gear(pretend):
    pretend_a100(pretend)
    hardware = detect()
    assert (hardware.gear, hardware.device, hardware.compute_dtype) == ("ampere", "cuda", torch.bfloat16)
    assert hardware.native_bfloat16 is True


# QLORA_GEAR


@pytest.mark.parametrize("gear", ["cpu", "t4", "ampere"])
def test_a_new_gpu_runs_every_gear_that_qlora_gear_asks_for(gear, pretend, monkeypatch):
    pretend_a100(pretend)
    monkeypatch.setenv("QLORA_GEAR", gear)
    hardware = detect()
    assert (hardware.gear, hardware.chosen_by) == (gear, "QLORA_GEAR")
    assert hardware.compute_dtype == GEARS[gear]
    assert hardware.device == ("cpu" if gear == "cpu" else "cuda")
    assert hardware.gpu_name == "NVIDIA A100"


@pytest.mark.parametrize("value", ["", "  "], ids=repr)
def test_an_empty_qlora_gear_counts_as_unset(value, pretend, monkeypatch):
    pretend_t4(pretend)
    monkeypatch.setenv("QLORA_GEAR", value)
    assert (detect().gear, detect().chosen_by) == ("t4", "detection")


def test_blanks_around_a_gear_do_not_matter(pretend, monkeypatch):
    pretend_t4(pretend)
    monkeypatch.setenv("QLORA_GEAR", " cpu ")
    assert detect().gear == "cpu"


@pytest.mark.parametrize("value", ["gpu", "T4", "cuda", "1"])
def test_an_unknown_gear_is_refused_with_the_choice(value, pretend, monkeypatch):
    pretend_t4(pretend)
    monkeypatch.setenv("QLORA_GEAR", value)
    with pytest.raises(ValueError, match=rf"QLORA_GEAR='{value}': choose one of cpu, t4, ampere"):
        detect()


@pytest.mark.parametrize("value", ["t4", "ampere"])
def test_a_gpu_gear_without_a_gpu_is_refused(value, pretend, monkeypatch):
    pretend()
    monkeypatch.setenv("QLORA_GEAR", value)
    with pytest.raises(ValueError, match=rf"QLORA_GEAR='{value}' needs a GPU that torch can see, and there is none"):
        detect()


def test_the_ampere_gear_on_a_t4_is_refused(pretend, monkeypatch):
    pretend_t4(pretend)
    monkeypatch.setenv("QLORA_GEAR", "ampere")
    with pytest.raises(ValueError, match=r"QLORA_GEAR='ampere' needs a GPU with native bfloat16, .*use.*t4"):
        detect()


# the argument `gear`


def test_an_argument_goes_before_qlora_gear(pretend, monkeypatch):
    pretend_a100(pretend)
    monkeypatch.setenv("QLORA_GEAR", "t4")
    hardware = detect("cpu")
    assert (hardware.gear, hardware.chosen_by) == ("cpu", "gear")


def test_an_argument_that_cannot_be_had_is_refused_by_its_own_name(pretend):
    pretend()
    with pytest.raises(ValueError, match="gear='t4' needs a GPU"):
        detect("t4")
    with pytest.raises(ValueError, match="gear='gpu': choose one of"):
        detect("gpu")


# the rest of the machine


def test_cores_are_those_that_this_process_may_use(pretend, monkeypatch):
    pretend()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert detect().cores == 3


def test_peak_memory_is_less_than_all_of_it(pretend):
    pretend()
    assert 0 < peak_memory_bytes() <= detect().host_bytes


def test_peak_memory_counts_bytes():
    held = torch.ones(64 * 1024**2)
    assert peak_memory_bytes() > held.nbytes
