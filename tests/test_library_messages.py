"""Each message that is hidden from the lessons still comes from the installed libraries, and nothing else is hidden."""

import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import trainer_utils
from transformers.integrations.bitsandbytes import dequantize_and_replace
from transformers.utils import logging as transformers_logging

from qlora_helpers import library_messages
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.saving import save_model
from qlora_helpers.training.trainer import SFTConfig
from tests.support.short_runs import CPU

import bitsandbytes as bnb  # isort: skip (qlora_helpers quietens it first)


def misses_an_optional_package(monkeypatch, tmp_path):
    """Run bitsandbytes' module a second time, as on a CPU with AVX512-BF16, without registering anything."""
    monkeypatch.setitem(sys.modules, "kernels", None)  # as if it were not installed
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb._ops, "register_kernel", lambda *names: lambda function: function)
    spec = importlib.util.find_spec("bitsandbytes.backends.cpu.ops")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def aligns_special_tokens(monkeypatch, tmp_path):
    config = SimpleNamespace(pad_token_id=None, bos_token_id=1, eos_token_id=2)
    config.get_text_config = lambda: config
    tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    trainer_utils.align_special_tokens(SimpleNamespace(config=config, generation_config=None), tokenizer)


def dequantises(monkeypatch, tmp_path):
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    for dtype in (None, torch.float32):  # two wordings
        model = torch.nn.ModuleDict({"layer": layer})
        dequantize_and_replace(model, quantization_config=config, dtype=dtype)


def writes_checkpoints_at_once(monkeypatch, tmp_path):
    for step in (8, 16):
        (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
    assert len(trainer_utils.sort_checkpoints(str(tmp_path), use_mtime=True)) == 2


LOGGED = {
    ("bitsandbytes.backends.cpu.ops", library_messages._BITSANDBYTES): misses_an_optional_package,
    ("transformers.trainer_utils", library_messages._ALIGNED): aligns_special_tokens,
    ("transformers.trainer_utils", library_messages._NO_SECOND_APART): writes_checkpoints_at_once,
    ("transformers.integrations.bitsandbytes", library_messages._DEQUANTISED): dequantises,
}


def dropped() -> dict[tuple[str, str], logging.Filter]:
    """The filters that are installed in this process."""
    loggers = [logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict)]
    return {
        (logger.name, one.beginning): one
        for logger in loggers
        for one in logger.filters
        if isinstance(one, library_messages._Drop)
    }


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    """A function that makes a call and returns what the libraries log during it."""
    roots, handler = [logging.getLogger(name) for name in ("transformers", "bitsandbytes")], Heard()
    for root in roots:
        root.addHandler(handler)

    def listen(call) -> list[str]:
        transformers_logging.warning_once.cache_clear()  # an earlier test may have triggered it already
        handler.messages.clear()
        call()
        return list(handler.messages)

    yield listen
    for root in roots:
        root.removeHandler(handler)


def test_each_filter_has_its_message_here():
    library_messages.quieten()
    assert dropped().keys() == LOGGED.keys()


@pytest.mark.parametrize(("logger", "beginning"), LOGGED)
def test_a_message_that_a_library_logs_is_kept_out_and_would_come(logger, beginning, heard, monkeypatch, tmp_path):
    library_messages.quieten()
    provoke = lambda: LOGGED[logger, beginning](monkeypatch, tmp_path)  # noqa: E731
    assert heard(provoke) == []
    one = dropped()[logger, beginning]
    monkeypatch.setattr(logging.getLogger(logger), "filters", [])
    loud = heard(provoke)
    assert loud and all(message.startswith(beginning) for message in loud)
    monkeypatch.setattr(logging.getLogger(logger), "filters", [one])
    assert heard(lambda: logging.getLogger(logger).warning("another message")) == ["another message"]


def test_a_renamed_option_warns_and_is_kept_out(tmp_path):
    def warned(quietened: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if quietened:
                library_messages.quieten()
            SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
            warnings.warn("another message", FutureWarning, stacklevel=1)
        return [str(warning.message) for warning in seen]

    loud, silent = warned(quietened=False), warned(quietened=True)
    assert any("`gradient_checkpointing` is deprecated" in message for message in loud)
    assert silent == ["another message"]


def test_quietening_twice_adds_nothing():
    library_messages.quieten()
    before = [len(logging.getLogger(name).filters) for name, _ in LOGGED]
    library_messages.quieten()
    assert [len(logging.getLogger(name).filters) for name, _ in LOGGED] == before


def test_the_profiler_says_nothing_unless_the_user_has_set_its_log():
    code = (
        "import qlora_helpers, torch\n"
        "profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])\n"
        "profile.start(), profile.stop()"
    )
    for level, words in (("", ""), ("0", "profiler_start")):
        set_by_user = {"KINETO_LOG_LEVEL": level} if level else {}
        environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"} | set_by_user
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0 and (words in done.stderr if words else done.stderr == "")


# ---- Progress bars


def saves_and_loads(folder) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    tokenizer = load_tokenizer()
    save_model(transformers.AutoModelForCausalLM.from_config(config), tokenizer, folder)
    load_model(str(folder), quantization=None, hardware=CPU)


def test_a_small_model_is_saved_and_loaded_without_bars_that_would_stay_on_the_page(tmp_path, capfd, monkeypatch):
    transformers_logging.enable_progress_bar()
    saves_and_loads(tmp_path / "small")
    assert "%|" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled()
    monkeypatch.setattr(library_messages, "_SOON_DONE", 0)  # as if it were large
    saves_and_loads(tmp_path / "large")
    shown = capfd.readouterr().err
    assert "Writing model shards: 100%|" in shown and "Loading weights: 100%|" in shown


def test_bars_that_a_user_has_switched_off_stay_off_and_an_error_switches_them_on_again():
    with pytest.raises(KeyError), library_messages.without_short_bars(1):
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError
    assert transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with library_messages.without_short_bars(1):
            pass
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()


def test_warnings_of_a_logger_are_printed_on_the_page_and_nowhere_else(capsys, caplog):
    log = logging.getLogger("some.library")
    with library_messages.printed("some.library", "it says:"):
        log.warning("mind the %s", "gap")
        log.debug("nothing of interest")
    assert capsys.readouterr().out == "it says: mind the gap\n"
    assert caplog.messages == []
    log.warning("as before")
    assert caplog.messages == ["as before"]
    assert capsys.readouterr().out == ""


def test_a_logger_is_as_before_after_an_error_too():
    log = logging.getLogger("some.library")
    with pytest.raises(RuntimeError, match="in between"), library_messages.printed("some.library", "it says:"):
        raise RuntimeError("in between")
    assert log.propagate and not log.handlers
