"""Fixtures of several tests of memory."""

import pytest

from qlora_helpers.memory import (
    ladder,
    predict,
    search,
)
from qlora_helpers.memory.measurement import Measurement, MemoryCallback
from qlora_helpers.models.loading import load_model
from qlora_helpers.settings import Settings
from qlora_helpers.training.trainer import build_trainer
from tests.support.short_runs import CHATS, CPU, TOKENIZER


@pytest.fixture
def asked(monkeypatch):
    """Every call of the predictor."""
    calls = []

    def count(*arguments):
        calls.append(arguments)
        return predict(*arguments)

    for module in (ladder, search):
        monkeypatch.setattr(module, "predict", count)
    return calls


TWO_STEPS = Settings(steps=2, batch_size=3, rank=4, dropout=0.1, max_length=48)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of the shipped model on this CPU, its trainer and what was measured."""
    measurement = Measurement()
    with measurement.phase("load"):
        model = load_model(hardware=CPU)
    trainer = build_trainer(model, TOKENIZER, CHATS, tmp_path_factory.mktemp("measured"), TWO_STEPS, CPU)
    trainer.add_callback(MemoryCallback(measurement))
    trainer.train()
    return trainer, measurement
